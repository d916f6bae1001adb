"""Mean squared error.

With d = input - target, n elements, and the gradient g of the loss::

    gi = s d g,   gt = -gi,   s = 2/n for 'mean', else 2

For h = (gradient of gi) - (gradient of gt): the second derivatives are s d h for g and s g h for d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import mse as ops
from .function import Function, gradients


def _slope(input: Tensor, reduction: str) -> float:
    return 2 / input.numel() if reduction == "mean" else 2


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else -b
    return a - b


@torch.compiler.allow_in_graph
class MSELossBackward(Function):
    """``(gi, gt)`` as differentiable functions of ``(g, input, target)``; what is not needed is an empty tensor."""

    raw = ops.mse_loss_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.need_input, ctx.need_target = inputs[3:6]

    @staticmethod
    def backward(ctx: Any, gg_input: Tensor | None, gg_target: Tensor | None) -> Any:
        grad_output, input, target = ctx.saved_tensors
        h = _difference(gg_input if ctx.need_input else None, gg_target if ctx.need_target else None)
        if h is None:
            return (None,) * 7
        sh = _slope(input, ctx.reduction) * h
        for_grad_output = sh * (input - target)
        if ctx.reduction != "none":
            for_grad_output = for_grad_output.sum()
        for_input = sh * grad_output
        return for_grad_output, for_input, -for_input, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, t_grad_output: Tensor | None, t_input: Tensor | None, t_target: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        grad_output, input, target = ctx.saved_tensors
        tangent = torch.zeros_like(input)
        if t_grad_output is not None:
            tangent = tangent + t_grad_output * (input - target)
        t_difference = _difference(t_input, t_target)
        if t_difference is not None:
            tangent = tangent + grad_output * t_difference
        tangent = _slope(input, ctx.reduction) * tangent
        absent = input.new_zeros(0)
        return tangent if ctx.need_input else absent, -tangent if ctx.need_target else absent


@torch.compiler.allow_in_graph
class MSELoss(Function):
    """Squared error of two tensors of one shape: that shape for ``'none'``, 0-d for ``'mean'`` and ``'sum'``."""

    raw = ops.mse_loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, ctx.reduction, ctx.backend = inputs
        ctx.save_for_backward(input, target)
        ctx.save_for_forward(input, target)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needs = ctx.needs_input_grad[:2]
        arguments = (grad_output, *ctx.saved_tensors, ctx.reduction, *needs, ctx.backend)
        return (*gradients(MSELossBackward, needs, *arguments), None, None)

    @staticmethod
    def jvp(ctx: Any, t_input: Tensor | None, t_target: Tensor | None, *_: None) -> Tensor:
        input, target = ctx.saved_tensors
        t_difference = _difference(t_input, t_target)
        assert t_difference is not None
        tangent = _slope(input, ctx.reduction) * (input - target) * t_difference
        return tangent if ctx.reduction == "none" else tangent.sum()
