"""Binary cross-entropy of logits: one pass over input and target, and for a sum or mean a second, tiny one.

With ``x`` the input, ``y`` the target, ``w`` the weight and ``v`` the weight of positives (1 if none), ``n`` elements,
``g`` the gradient of the loss and ``s(x) = 1 / (1 + exp(-x))``::

    loss_i = w_i ((1 - y_i) x_i - (1 + (v_i - 1) y_i) log s(x_i))      'none'; 'sum' adds up, 'mean' divides that by n
    gx_i = g w_i ((1 + (v_i - 1) y_i) s(x_i) - v_i y_i) / divisor      divisor n for 'mean', else 1
    gy_i = g w_i (log s(-x_i) - v_i log s(x_i)) / divisor              the logarithms' difference is -x_i if v_i = 1

All of them come from ``z = exp(-|x|)``, which cannot overflow: ``log s(x) = min(x, 0) - log(1 + z)``.

The weights broadcast. If the dimensions along which a weight varies are adjacent in the memory order of the elements,
its element is found by a division of the position; else the weight is expanded to a tensor of full size first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import planned, register_limit
from .elementwise import (
    Elements,
    LossBackwardPlan,
    LossPlan,
    elementwise_loss,
    elementwise_loss_backward,
    in_layout,
    load_grad_output,
    load_tile,
    loss_backward_plan,
    loss_plan,
    store_loss,
    store_tile,
)


@triton.jit
def load_factor(factor_ptr, start, size, repeats, DENSE: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """A weight for a tile: one for each element, or for element i number i // inner % period; ``repeats``: both."""
    if DENSE:
        factor = load_tile(factor_ptr, start, size, EVEN, BLOCK)
    else:
        factor = tl.load(factor_ptr + (start + tl.arange(0, BLOCK)) // repeats[0] % repeats[1])
    return factor.to(tl.float64 if factor.dtype == tl.float64 else tl.float32)


@triton.jit
def log_of_1_plus(z):
    """log(1 + z) for z from 0 to 1, exact where z is small too: corrected for the rounding of 1 + z."""
    u = 1.0 + z
    return tl.log(u) - ((u - 1.0) - z) / u


@triton.jit
def bce_kernel(
    input_ptr,  # [size]
    target_ptr,  # [size]
    weight_ptr,
    pos_weight_ptr,
    loss_ptr,  # [size], or [programs] partial sums, or the one result if there is one program
    size,
    divisor,
    weight_inner,
    weight_period,
    pos_weight_inner,
    pos_weight_period,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_DENSE: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    POS_WEIGHT_DENSE: tl.constexpr,
    SUM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements: their losses, or the sum of them over ``divisor``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x = load_tile(input_ptr, start, size, EVEN, BLOCK)
    y = load_tile(target_ptr, start, size, EVEN, BLOCK)
    log_sigmoid = tl.where(x < 0, x, 0.0) - log_of_1_plus(tl.exp(-tl.abs(x)))
    if HAS_POS_WEIGHT:
        repeats = pos_weight_inner, pos_weight_period
        v = load_factor(pos_weight_ptr, start, size, repeats, POS_WEIGHT_DENSE, EVEN, BLOCK)
        log_sigmoid *= 1.0 + (v - 1.0) * y
    loss = (1.0 - y) * x - log_sigmoid
    if HAS_WEIGHT:
        loss *= load_factor(weight_ptr, start, size, (weight_inner, weight_period), WEIGHT_DENSE, EVEN, BLOCK)
    loss = tl.where(start + tl.arange(0, BLOCK) < size, loss, 0.0)
    store_loss(loss_ptr, loss, start, size, divisor, SUM, EVEN, BLOCK)


@triton.jit
def bce_backward_kernel(
    grad_output_ptr,  # [size], or one element for all
    input_ptr,  # [size]
    target_ptr,  # [size]
    weight_ptr,
    pos_weight_ptr,
    grad_input_ptr,  # [size]
    grad_target_ptr,  # [size]
    size,
    divisor,
    weight_inner,
    weight_period,
    pos_weight_inner,
    pos_weight_period,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_DENSE: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    POS_WEIGHT_DENSE: tl.constexpr,
    SCALAR_GRAD: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements of the gradients."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    scale = load_grad_output(grad_output_ptr, input_ptr, start, size, SCALAR_GRAD, EVEN, BLOCK)
    if HAS_WEIGHT:
        scale *= load_factor(weight_ptr, start, size, (weight_inner, weight_period), WEIGHT_DENSE, EVEN, BLOCK)
    v = 1.0
    if HAS_POS_WEIGHT:
        repeats = pos_weight_inner, pos_weight_period
        v = load_factor(pos_weight_ptr, start, size, repeats, POS_WEIGHT_DENSE, EVEN, BLOCK)
    x = load_tile(input_ptr, start, size, EVEN, BLOCK)
    z = tl.exp(-tl.abs(x))
    if NEED_INPUT:
        y = load_tile(target_ptr, start, size, EVEN, BLOCK)
        # s(-|x|) has a small relative error, 1 - s(|x|) has not: where x > 0, s(x) is written as 1 - s(-x). Around 0,
        # where both are 1/2, 1 - y would be rounded for nothing.
        small = (1.0 + (v - 1.0) * y) * z / (1.0 + z)
        grad = scale * tl.where((x < 0) | (z == 1.0), small - v * y, (1.0 - y) - small) / divisor
        store_tile(grad_input_ptr, grad, start, size, EVEN, BLOCK)
    if NEED_TARGET:
        slope = -x
        if HAS_POS_WEIGHT:
            rest = log_of_1_plus(z)
            slope = (tl.where(x > 0, -x, 0.0) - rest) - v * (tl.where(x < 0, x, 0.0) - rest)
        grad = scale * slope / divisor
        store_tile(grad_target_ptr, grad, start, size, EVEN, BLOCK)


class Factor(NamedTuple):
    """How `load_factor` reads a weight: in which order its dimensions must lie, None if it is written out in full."""

    order: tuple[int, ...] | None
    inner: int
    period: int

    @classmethod
    def of(cls, shape: tuple[int, ...] | None, full: tuple[int, ...], strides: tuple[int, ...]) -> Factor:
        """Of a weight of ``shape``, which broadcasts to the ``full`` one, for elements with these dense strides."""
        if shape is None:
            return cls(None, 1, 1)
        own = (1,) * (len(full) - len(shape)) + tuple(shape)
        order = sorted((d for d in range(len(full)) if full[d] > 1), key=lambda d: -strides[d])
        varying = [place for place, d in enumerate(order) if own[d] > 1]
        if len(varying) == len(order) or varying != list(range(varying[0], varying[-1] + 1) if varying else ()):
            return cls(None, 1, math.prod(full))
        inner = math.prod(full[d] for d in order[varying[-1] + 1 :]) if varying else 1
        ones = (d for d in range(len(full)) if full[d] == 1)
        return cls((*order, *ones), inner, math.prod(own))

    def values(self, weight: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        """The weight's elements in that order."""
        if self.order is None:
            return in_layout(weight.expand(shape), strides)
        return weight.reshape((1,) * (len(shape) - weight.dim()) + tuple(weight.shape)).permute(self.order).contiguous()


Plans = TypeVar("Plans", LossPlan, LossBackwardPlan)
Shapes: TypeAlias = tuple[tuple[int, ...] | None, tuple[int, ...] | None]  # of the weights


@planned
def bce_plan(
    choose: Callable[..., Plans], kernel: Any, elements: Elements, shapes: Shapes, *words: Any
) -> tuple[Plans, Factor, Factor]:
    """What ``choose`` returns, `loss_plan` or `loss_backward_plan` for a ``kernel`` and ``words``, and both weights."""
    strides, size = elements.result_strides(), elements.shape.numel()
    w, v = (Factor.of(shape, elements.shape, strides) for shape in shapes)
    constants = {
        "HAS_WEIGHT": shapes[0] is not None,
        "WEIGHT_DENSE": w.period == size,
        "HAS_POS_WEIGHT": shapes[1] is not None,
        "POS_WEIGHT_DENSE": v.period == size,
        **register_limit(elements.device),
    }
    return choose(kernel, elements, *words, *w[1:], *v[1:], **constants), w, v


def bce(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
    """Binary cross-entropy of two tensors of one shape and dtype, not empty, any strides.

    ``weight`` and ``pos_weight`` have the same dtype and broadcast to that shape. ``reduction`` 'none' gives a tensor
    of that shape, 'mean' and 'sum' a 0-d one. Accumulates in float32 (float64 for float64) and rounds once.
    """
    elements = Elements(input.device, input.dtype, input.shape, target.stride(), target.stride())
    shapes = None if weight is None else weight.shape, None if pos_weight is None else pos_weight.shape
    plan, w, v = bce_plan(loss_plan, bce_kernel, elements, shapes, reduction)
    weight = input if weight is None else w.values(weight, input.shape, plan.strides)
    pos_weight = input if pos_weight is None else v.values(pos_weight, input.shape, plan.strides)
    return elementwise_loss(plan, input, target, weight, pos_weight)


def bce_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`elementwise_loss_backward` of `bce`."""
    elements = Elements(input.device, input.dtype, input.shape, target.stride(), target.stride())
    shapes = None if weight is None else weight.shape, None if pos_weight is None else pos_weight.shape
    choices = not any(grad_output.stride()), need_input, need_target
    plan, w, v = bce_plan(loss_backward_plan, bce_backward_kernel, elements, shapes, reduction, choices)
    weight = input if weight is None else w.values(weight, input.shape, plan.strides)
    pos_weight = input if pos_weight is None else v.values(pos_weight, input.shape, plan.strides)
    return elementwise_loss_backward(plan, grad_output, input, target, weight, pos_weight)
