"""Linear and linear + ReLU.

With input x, weight w, bias b, output y and its gradient gy (``kernels/linear.py`` has the kernels)::

    y  = relu(x w^T + b)
    gz = gy where not y <= 0, else 0        (gz = gy without ReLU)
    gx = gz w,   gw = gz^T x,   gb = sum of gz over rows

The mask does not depend on anything smoothly, so the second derivatives are those of the three products above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import linear as ops
from .function import Function, add, gradients, rows, saved_for


def _mask(grad: Tensor, output: Tensor | None) -> Tensor:
    return grad if output is None else torch.where(output <= 0, 0, grad)


@torch.compiler.allow_in_graph
class LinearBackward(Function):
    """``(gx, gw, gb)`` as differentiable functions of ``(gy, x, w)``; what is not needed is an empty tensor."""

    raw = ops.linear_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.set_materialize_grads(False)
        ctx.need_bias = inputs[4]

    @staticmethod
    def backward(ctx: Any, gg_input: Tensor | None, gg_weight: Tensor | None, gg_bias: Tensor | None) -> Any:
        grad_output, input, weight, output = ctx.saved_tensors
        gz = _mask(grad_output, output)
        grad_gz = add(
            None if gg_input is None else gg_input @ weight.t(),
            None if gg_weight is None else input @ gg_weight.t(),
            gg_bias,
        )
        return (
            None if grad_gz is None else _mask(grad_gz.expand_as(gz), output),
            None if gg_weight is None else gz @ gg_weight,
            None if gg_input is None else rows(gz).t() @ rows(gg_input),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        t_grad_output: Tensor | None,
        t_input: Tensor | None,
        t_weight: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_output, input, weight, output = ctx.saved_tensors
        gz = _mask(grad_output, output)
        t_gz = torch.zeros_like(gz) if t_grad_output is None else _mask(t_grad_output, output)
        absent = gz.new_zeros(0)
        t_grad_input = t_grad_weight = absent
        if weight is not None:
            t_grad_input = t_gz @ weight if t_weight is None else t_gz @ weight + gz @ t_weight
        if input is not None:
            t_grad_weight = rows(t_gz).t() @ rows(input)
            if t_input is not None:
                t_grad_weight = t_grad_weight + rows(gz).t() @ rows(t_input)
        return t_grad_input, t_grad_weight, rows(t_gz).sum(0) if ctx.need_bias else absent


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    arguments = (grad_output, input if needs[1] else None, weight if needs[0] else None, output, needs[2], ctx.backend)
    return (*gradients(LinearBackward, needs, *arguments), None)


def _jvp(ctx: Any, t_input: Tensor | None, t_weight: Tensor | None, t_bias: Tensor | None, _: None) -> Tensor:
    input, weight, output = ctx.saved_tensors
    tangent = add(
        None if t_input is None else t_input @ weight.t(),
        None if t_weight is None else input @ t_weight.t(),
        t_bias,
    )
    assert tangent is not None
    return _mask(tangent.expand(*input.shape[:-1], weight.shape[0]), output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    input, weight, _, ctx.backend = inputs
    needs_input, needs_weight = saved_for(ctx)
    ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, output)
    ctx.save_for_forward(input, weight, output)


@torch.compiler.allow_in_graph
class Linear(Function):
    """``x w^T + b``: [..., K], [N, K], [N] -> [..., N]."""

    raw = ops.linear

    @staticmethod
    def raw_arguments(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Any, ...]:
        return input, weight, bias, False, backend

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, None)

    backward = staticmethod(_backward)
    jvp = staticmethod(_jvp)


@torch.compiler.allow_in_graph
class LinearReLU(Function):
    """``relu(x w^T + b)``: [..., K], [N, K], [N] -> [..., N]."""

    raw = ops.linear

    @staticmethod
    def raw_arguments(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Any, ...]:
        return input, weight, bias, True, backend

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)

    backward = staticmethod(_backward)
    jvp = staticmethod(_jvp)
