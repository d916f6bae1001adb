"""Losses of ``d = input - target``: one pass over both, and for a sum or mean a second, tiny one over partial sums.

With ``f`` the loss of an element, ``n`` elements and ``g`` the gradient of the loss::

    loss_i = f(d_i)                   'none'; 'sum' adds them up, 'mean' divides that by n
    gx_i = g f'(d_i) / divisor        divisor n for 'mean', else 1;  gy = -gx

======================= ============ ============================================ ===================================
name                    option       f(d)                                         f'(d)
======================= ============ ============================================ ===================================
``mse_loss``                         d^2                                          2 d
``l1_loss``                          abs(d)                                       sign(d)
``smooth_l1_loss``      b = beta     d^2 / (2 b) if abs(d) < b else abs(d) - b/2  d / b if abs(d) < b else sign(d)
``huber_loss``          D = delta    d^2 / 2 if abs(d) < D else D (abs(d) - D/2)  d if abs(d) < D else D sign(d)
======================= ============ ============================================ ===================================

As in torch the sign of 0 is 0 and that of NaN too; but smooth L1 with b > 0 and Huber leave NaN as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import (
    Elements,
    elementwise_loss,
    elementwise_loss_backward,
    load_grad_output,
    load_tile,
    loss_backward_plan,
    loss_plan,
    store_loss,
    store_tile,
)


@triton.jit
def loss_of(d, LOSS: tl.constexpr, OPTION: tl.constexpr, BLOCK: tl.constexpr):
    """f(d). The option is made a tensor before it is compared: Triton would round a constant to float32 there."""
    option = tl.full((BLOCK,), OPTION, d.dtype)
    if LOSS == "mse_loss":
        loss = d * d
    elif LOSS == "huber_loss":
        loss = tl.where(tl.abs(d) < option, 0.5 * d * d, option * (tl.abs(d) - 0.5 * option))
    else:
        loss = tl.abs(d) - 0.5 * OPTION
        if OPTION > 0:
            loss = tl.where(tl.abs(d) < option, 0.5 * d * d / option, loss)
    return loss


@triton.jit
def slope_of(d, LOSS: tl.constexpr, OPTION: tl.constexpr, BLOCK: tl.constexpr):
    """f'(d)"""
    option = tl.full((BLOCK,), OPTION, d.dtype)
    if LOSS == "mse_loss":
        slope = 2.0 * d
    elif LOSS == "huber_loss":
        slope = tl.where(tl.abs(d) >= option, tl.where(d > 0, option, -option), d)
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        if OPTION > 0:
            slope = tl.where(tl.abs(d) >= option, slope, d / option)
    return slope


@triton.jit
def pair_loss_kernel(
    input_ptr,  # [size]
    target_ptr,  # [size]
    loss_ptr,  # [size], or [programs] partial sums, or the one result if there is one program
    size,
    divisor,
    LOSS: tl.constexpr,
    OPTION: tl.constexpr,
    SUM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements: their losses, or the sum of them over ``divisor``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    difference = load_tile(input_ptr, start, size, EVEN, BLOCK) - load_tile(target_ptr, start, size, EVEN, BLOCK)
    loss = loss_of(difference, LOSS, OPTION, BLOCK)  # 0 past the end, where both are
    store_loss(loss_ptr, loss, start, size, divisor, SUM, EVEN, BLOCK)


@triton.jit
def pair_loss_backward_kernel(
    grad_output_ptr,  # [size], or one element for all
    input_ptr,  # [size]
    target_ptr,  # [size]
    grad_input_ptr,  # [size]
    grad_target_ptr,  # [size]
    size,
    divisor,
    LOSS: tl.constexpr,
    OPTION: tl.constexpr,
    SCALAR_GRAD: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements of the gradients."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    grad_output = load_grad_output(grad_output_ptr, input_ptr, start, size, SCALAR_GRAD, EVEN, BLOCK)
    difference = load_tile(input_ptr, start, size, EVEN, BLOCK) - load_tile(target_ptr, start, size, EVEN, BLOCK)
    slope = slope_of(difference, LOSS, OPTION, BLOCK)  # before the division: so ptxas needs no spills in float64
    grad = grad_output / divisor * slope
    if NEED_INPUT:
        store_tile(grad_input_ptr, grad, start, size, EVEN, BLOCK)
    if NEED_TARGET:
        store_tile(grad_target_ptr, -grad, start, size, EVEN, BLOCK)


def pair_loss(name: str, input: Tensor, target: Tensor, reduction: str, option: float = 0.0) -> Tensor:
    """The loss ``name`` of two tensors of one shape and dtype, not empty, any strides.

    ``reduction`` 'none' gives a tensor of that shape, 'mean' and 'sum' a 0-d one. Accumulates in float32 (float64 for
    float64) and rounds once.
    """
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), target.stride())
    plan = loss_plan(pair_loss_kernel, elements, reduction, LOSS=name, OPTION=float(option))
    return elementwise_loss(plan, input, target)


def pair_loss_backward(
    name: str, grad_output: Tensor, input: Tensor, target: Tensor, reduction: str, *rest: float
) -> tuple[Tensor | None, Tensor | None]:
    """`elementwise_loss_backward` of `pair_loss`; ``rest``: its option, if any, ``need_input`` and ``need_target``."""
    *option, need_input, need_target = rest
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), target.stride())
    choices = not any(grad_output.stride()), bool(need_input), bool(need_target)
    plan = loss_backward_plan(pair_loss_backward_kernel, elements, reduction, choices, LOSS=name, OPTION=float(*option))
    return elementwise_loss_backward(plan, grad_output, input, target)
