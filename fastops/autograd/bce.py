"""Binary cross-entropy of logits.

With input x, target y, weight w and weight of positives v (1 if none), n elements, s the sigmoid and the gradient g of
the loss, over n for 'mean'::

    loss = w ((1 - y) x - (1 + (v - 1) y) log s(x))
    gx = g w ((1 - y) s(x) - v y s(-x))
    gy = g w (log s(-x) - v log s(x))

Second derivatives, for h the gradient of gx and k the gradient of gy, with m = -(s(x) + v s(-x))::

    for g:  w (h ((1 - y) s(x) - v y s(-x)) + k (log s(-x) - v log s(x)))
    for x:  g w (h (1 + (v - 1) y) s(x) s(-x) + k m)
    for y:  g w h m
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import bce as ops
from ..ops.bce import unscaled_gradients
from .function import Function, add, gradients


def _second_derivatives(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``w (1 + (v - 1) y) s(x) s(-x)`` and ``w m``: of each element's loss for x twice, and for x and y."""
    v = 1 if pos_weight is None else pos_weight
    positive, negative = torch.sigmoid(input), torch.sigmoid(-input)
    twice, mixed = (1 + (v - 1) * target) * positive * negative, -(positive + v * negative)
    return (twice, mixed) if weight is None else (weight * twice, weight * mixed)


def _times(a: Tensor | None, b: Tensor) -> Tensor | None:
    return None if a is None else a * b


@torch.compiler.allow_in_graph
class BCEWithLogitsBackward(Function):
    """``(gx, gy)`` as differentiable functions of ``(g, x, y)``; what is not needed is an empty tensor."""

    raw = ops.binary_cross_entropy_with_logits_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.need_input, ctx.need_target = inputs[5:8]

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, k: Tensor | None) -> Any:
        grad_output, *tensors = ctx.saved_tensors
        h, k = h if ctx.need_input else None, k if ctx.need_target else None
        if h is None and k is None:
            return (None,) * 9
        divisor = tensors[0].numel() if ctx.reduction == "mean" else 1
        for_input, for_target = unscaled_gradients(*tensors)
        twice, mixed = _second_derivatives(*tensors)
        for_grad_output = add(_times(h, for_input), _times(k, for_target))
        along_input = add(_times(h, twice), _times(k, mixed))
        assert for_grad_output is not None and along_input is not None
        if ctx.reduction != "none":
            for_grad_output = for_grad_output.sum()
        scale = grad_output / divisor
        return (for_grad_output / divisor, scale * along_input, _times(h, scale * mixed), *(None,) * 6)

    @staticmethod
    def jvp(
        ctx: Any, t_grad_output: Tensor | None, t_input: Tensor | None, t_target: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        grad_output, *tensors = ctx.saved_tensors
        divisor = tensors[0].numel() if ctx.reduction == "mean" else 1
        for_input, for_target = unscaled_gradients(*tensors)
        twice, mixed = _second_derivatives(*tensors)
        scale = grad_output / divisor
        t_scale = torch.zeros_like(grad_output) if t_grad_output is None else t_grad_output / divisor
        t_gx, t_gy = t_scale * for_input, t_scale * for_target
        if t_input is not None:
            t_gx, t_gy = t_gx + scale * twice * t_input, t_gy + scale * mixed * t_input
        if t_target is not None:
            t_gx = t_gx + scale * mixed * t_target
        absent = tensors[0].new_zeros(0)
        return t_gx if ctx.need_input else absent, t_gy if ctx.need_target else absent


@torch.compiler.allow_in_graph
class BCEWithLogits(Function):
    """Binary cross-entropy of two tensors of one shape: that shape for ``'none'``, 0-d for ``'mean'`` and ``'sum'``.

    The weights broadcast to that shape and are constants.
    """

    raw = ops.binary_cross_entropy_with_logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needs = ctx.needs_input_grad[:2]
        arguments = (grad_output, *ctx.saved_tensors, ctx.reduction, *needs, ctx.backend)
        return (*gradients(BCEWithLogitsBackward, needs, *arguments), *(None,) * 4)

    @staticmethod
    def jvp(ctx: Any, t_input: Tensor | None, t_target: Tensor | None, *_: None) -> Tensor:
        input, target, weight, pos_weight = ctx.saved_tensors
        for_input, for_target = unscaled_gradients(input, target, weight, pos_weight)
        tangent = torch.zeros_like(for_input)
        if t_input is not None:
            tangent = tangent + for_input * t_input
        if t_target is not None:
            tangent = tangent + for_target * t_target
        if ctx.reduction == "none":
            return tangent
        return tangent.mean() if ctx.reduction == "mean" else tangent.sum()
