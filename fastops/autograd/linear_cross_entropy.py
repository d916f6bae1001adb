"""Linear + cross-entropy, as `autograd.cross_entropy` of the logits z = x w^T + b, which are never kept.

With gz the gradient of the logits by the formulas of that module::

    gx = gz w,   gw = gz^T x,   gb = sum of gz over rows

First derivatives make gz a tile at a time, forward and backward. Second derivatives and tangents are plain expressions
over all logits at once: they take the memory that the first ones save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import linear_cross_entropy as ops
from ..ops.cross_entropy import row_scale, unscaled_gradients
from .cross_entropy import second_derivatives, tangents_of_gradients
from .function import Function, add, gradients, may_overwrite


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> Tensor:
    """[N, C, P], in the dtype that losses are computed in."""
    exact = torch.promote_types(input.dtype, torch.float32)
    z = input.to(exact) @ linear_weight.to(exact).t()
    z = z if linear_bias is None else z + linear_bias.to(exact)
    return z.reshape(input.shape[0], -1, target.shape[-1])


def _change(logits: Tensor, *terms: Tensor | None) -> Tensor | None:
    """The sum of the terms [N, C P] or [C P] that are there, in the shape and dtype of the logits."""
    total = add(*terms)
    return None if total is None else total.to(logits.dtype).expand(logits.shape[0], -1).reshape(logits.shape)


@torch.compiler.allow_in_graph
class LinearCrossEntropyBackward(Function):
    """``(gx, gw, gb, gq)`` as differentiable functions of ``(gradient of the loss, x, w, b, q)``; else empty."""

    raw = ops.linear_cross_entropy_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], inputs[9])
        ctx.save_for_forward(*inputs[:6], inputs[9])
        ctx.set_materialize_grads(False)
        ctx.options, ctx.needs = inputs[13:16], inputs[16:20]

    @staticmethod
    def backward(ctx: Any, h_input: Any, h_weight: Any, h_bias: Any, k: Any) -> Any:
        grad_output, input, linear_weight, linear_bias, target, weight, denominator = ctx.saved_tensors
        h_input, h_weight, h_bias, k = (
            h if need else None for h, need in zip((h_input, h_weight, h_bias, k), ctx.needs, strict=True)
        )
        z = _logits(input, linear_weight, linear_bias, target)
        x, w = input.to(z.dtype), linear_weight.to(z.dtype)
        h_input, h_weight, h_bias, k = (None if h is None else h.to(z.dtype) for h in (h_input, h_weight, h_bias, k))
        h = _change(
            z,
            None if h_input is None else h_input @ w.t(),
            None if h_weight is None else x @ h_weight.t(),
            h_bias,
        )
        of_loss = (ctx.options, grad_output, z, target, weight, denominator)
        for_grad_output, for_z, for_target = second_derivatives(h, k, *of_loss)
        scale = row_scale(grad_output, z, denominator, ctx.options[0])
        gz = (scale * unscaled_gradients(z, target, weight, *ctx.options[1:])[0]).reshape(len(x), -1)
        for_z = for_z.reshape(len(x), -1)
        for_input = add(for_z @ w, None if h_weight is None else gz @ h_weight)
        for_weight = add(for_z.t() @ x, None if h_input is None else gz.t() @ h_input)
        assert for_input is not None and for_weight is not None
        return (
            for_grad_output,
            for_input.to(input.dtype),
            for_weight.to(input.dtype),
            None if linear_bias is None else for_z.sum(0).to(input.dtype),
            None if for_target is None else for_target.to(target.dtype),
            *(None,) * 17,
        )

    @staticmethod
    def jvp(ctx: Any, t_grad_output: Any, t_input: Any, t_weight: Any, t_bias: Any, t_target: Any, *_: Any) -> Any:
        grad_output, input, linear_weight, linear_bias, target, weight, denominator = ctx.saved_tensors
        z = _logits(input, linear_weight, linear_bias, target)
        x, w = input.to(z.dtype), linear_weight.to(z.dtype)
        t_z = _change(
            z, None if t_input is None else t_input @ w.t(), None if t_weight is None else x @ t_weight.t(), t_bias
        )
        of_loss = (ctx.options, grad_output, z, target, weight, denominator)
        t_gz, t_gq = tangents_of_gradients(t_grad_output, t_z, t_target, *of_loss)
        scale = row_scale(grad_output, z, denominator, ctx.options[0])
        gz = (scale * unscaled_gradients(z, target, weight, *ctx.options[1:])[0]).reshape(len(x), -1)
        t_gz = t_gz.reshape(len(x), -1)
        t_gx = add(t_gz @ w, None if t_weight is None else gz @ t_weight.to(z.dtype))
        t_gw = add(t_gz.t() @ x, None if t_input is None else gz.t() @ t_input.to(z.dtype))
        tangents = (t_gx, t_gw, t_gz.sum(0), t_gq)
        absent = input.new_zeros(0)
        return tuple(
            t.to(target.dtype if number == 3 else input.dtype) if need and t is not None else absent
            for number, (t, need) in enumerate(zip(tangents, ctx.needs, strict=True))
        )


@torch.compiler.allow_in_graph
class LinearCrossEntropy(Function):
    """``(loss, m, e, T, denominator)`` of `chunked_logits.losses`, and the loss's ``(gx, gw, gb)``, or empty ones.

    Only the loss is differentiable. Where the forward pass made the gradients, the backward pass has but to scale them.

    [N, K], [C P, K], [C P] and a target [N, P] or [N, C, P]; the loss is 0-d, or [N, P] for ``'none'``.
    """

    raw = ops.linear_cross_entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.budget, ctx.backend = inputs[5:8], inputs[9], inputs[-1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for the gradients of gradients that the forward pass made
        ctx.save_for_backward(*inputs[:5], *output[1:])
        ctx.save_for_forward(*inputs[:5], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 14
        needs = ctx.needs_input_grad[:4]
        saved = ctx.saved_tensors  # read once: a checkpoint hands them out no second time
        made = saved[9:]
        if ops.has_made(made, needs) and may_overwrite(grad_output, *made):
            scaled = (part.mul_(grad_output) if need else None for part, need in zip(made, needs[:3], strict=True))
            return (*scaled, *(None,) * 11)
        arguments = (grad_output, *saved, *ctx.options, *needs, ctx.budget, ctx.backend)
        return (*gradients(LinearCrossEntropyBackward, needs, *arguments), *(None,) * 10)

    @staticmethod
    def jvp(ctx: Any, t_input: Any, t_weight: Any, t_bias: Any, t_target: Any, *_: None) -> Any:
        input, linear_weight, linear_bias, target, weight, *_, denominator, _, _, _ = ctx.saved_tensors
        z = _logits(input, linear_weight, linear_bias, target)
        t_z = _change(
            z,
            None if t_input is None else t_input @ linear_weight.t(),
            None if t_weight is None else input @ t_weight.t(),
            t_bias,
        )
        for_z, for_target = unscaled_gradients(z, target, weight, *ctx.options[1:])
        tangent = add(None if t_z is None else for_z * t_z, None if t_target is None else for_target * t_target)
        assert tangent is not None
        losses = tangent.sum(1)
        if ctx.options[0] != "none":
            losses = losses.sum() / denominator
        return (losses, *(None,) * 7)
