"""Smooth L1 loss: one pass over input and target, and for a sum or mean a second, tiny one over partial sums.

With ``d`` the input less the target, ``b`` the option ``beta``, ``n`` elements and ``g`` the gradient of the loss::

    loss_i = d_i^2 / (2 b) if |d_i| < b else |d_i| - b / 2       'none'; 'sum' adds them up, 'mean' divides that by n
    gx_i = g (d_i / b if |d_i| < b else sign(d_i)) / divisor     divisor n for 'mean', else 1;  gy = -gx

Where ``b`` is 0 that is the L1 loss, in which as in torch the sign of NaN is 0. Else NaN stays NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import (
    Elements,
    elementwise_loss,
    elementwise_loss_backward,
    load_tile,
    loss_backward_plan,
    loss_plan,
    store_tile,
)


@triton.jit
def smooth_l1_loss_kernel(
    input_ptr,  # [size]
    target_ptr,  # [size]
    loss_ptr,  # [size], or [programs] partial sums, or the one result if there is one program
    size,
    divisor,
    BETA: tl.constexpr,
    SUM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements: their losses, or the sum of them over ``divisor``."""
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    input = load_tile(input_ptr, start, size, EVEN, BLOCK)
    difference = input - load_tile(target_ptr, start, size, EVEN, BLOCK)
    loss = tl.abs(difference) - 0.5 * BETA
    if BETA > 0:
        beta = tl.full((BLOCK,), BETA, difference.dtype)  # exact: a comparison with BETA would round it to float32
        loss = tl.where(tl.abs(difference) < beta, 0.5 * difference * difference / beta, loss)
    if SUM:
        part = tl.sum(loss, 0) / divisor
        tl.store(loss_ptr + program, part.to(loss_ptr.dtype.element_ty))
    else:
        store_tile(loss_ptr, loss, start, size, EVEN, BLOCK)


@triton.jit
def smooth_l1_loss_backward_kernel(
    grad_output_ptr,  # [size], or one element for all
    input_ptr,  # [size]
    target_ptr,  # [size]
    grad_input_ptr,  # [size]
    grad_target_ptr,  # [size]
    size,
    divisor,
    BETA: tl.constexpr,
    SCALAR_GRAD: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements of the gradients."""
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32

    start = tl.program_id(0).to(tl.int64) * BLOCK
    if SCALAR_GRAD:
        grad_output = tl.load(grad_output_ptr).to(ACCUMULATOR)
    else:
        grad_output = load_tile(grad_output_ptr, start, size, EVEN, BLOCK)
    input = load_tile(input_ptr, start, size, EVEN, BLOCK)
    difference = input - load_tile(target_ptr, start, size, EVEN, BLOCK)
    slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    if BETA > 0:
        beta = tl.full((BLOCK,), BETA, difference.dtype)
        slope = tl.where(tl.abs(difference) >= beta, slope, difference / beta)
    grad = grad_output / divisor * slope
    if NEED_INPUT:
        store_tile(grad_input_ptr, grad, start, size, EVEN, BLOCK)
    if NEED_TARGET:
        store_tile(grad_target_ptr, -grad, start, size, EVEN, BLOCK)


def smooth_l1_loss(input: Tensor, target: Tensor, reduction: str, beta: float) -> Tensor:
    """Smooth L1 loss of two tensors of one shape and dtype, not empty, any strides.

    ``reduction`` 'none' gives a tensor of that shape, 'mean' and 'sum' a 0-d one. Accumulates in float32 (float64 for
    float64) and rounds once.
    """
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), target.stride())
    return elementwise_loss(loss_plan(smooth_l1_loss_kernel, elements, reduction, BETA=float(beta)), input, target)


def smooth_l1_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str,
    beta: float,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`elementwise_loss_backward` of `smooth_l1_loss`."""
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), target.stride())
    choices = not any(grad_output.stride()), need_input, need_target
    plan = loss_backward_plan(smooth_l1_loss_backward_kernel, elements, reduction, choices, BETA=float(beta))
    return elementwise_loss_backward(plan, grad_output, input, target)
