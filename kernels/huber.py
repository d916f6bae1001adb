"""Huber loss: one pass over input and target, and for a sum or mean a second, tiny one over partial sums.

With ``d`` the input less the target, ``D`` the option ``delta``, ``n`` elements and ``g`` the gradient of the loss::

    loss_i = d_i^2 / 2 if |d_i| < D else D (|d_i| - D / 2)       'none'; 'sum' adds them up, 'mean' divides that by n
    gx_i = g (d_i if |d_i| < D else D sign(d_i)) / divisor       divisor n for 'mean', else 1;  gy = -gx

NaN stays NaN.
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
def huber_loss_kernel(
    input_ptr,  # [size]
    target_ptr,  # [size]
    loss_ptr,  # [size], or [programs] partial sums, or the one result if there is one program
    size,
    divisor,
    DELTA: tl.constexpr,
    SUM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements: their losses, or the sum of them over ``divisor``."""
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    input = load_tile(input_ptr, start, size, EVEN, BLOCK)
    difference = input - load_tile(target_ptr, start, size, EVEN, BLOCK)
    absolute = tl.abs(difference)
    delta = tl.full((BLOCK,), DELTA, difference.dtype)  # exact: a comparison with DELTA would round it to float32
    loss = tl.where(absolute < delta, 0.5 * difference * difference, delta * (absolute - 0.5 * delta))
    if SUM:
        part = tl.sum(loss, 0) / divisor
        tl.store(loss_ptr + program, part.to(loss_ptr.dtype.element_ty))
    else:
        store_tile(loss_ptr, loss, start, size, EVEN, BLOCK)


@triton.jit
def huber_loss_backward_kernel(
    grad_output_ptr,  # [size], or one element for all
    input_ptr,  # [size]
    target_ptr,  # [size]
    grad_input_ptr,  # [size]
    grad_target_ptr,  # [size]
    size,
    divisor,
    DELTA: tl.constexpr,
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
    delta = tl.full((BLOCK,), DELTA, difference.dtype)
    slope = tl.where(tl.abs(difference) >= delta, tl.where(difference > 0, delta, -delta), difference)
    grad = grad_output / divisor * slope
    if NEED_INPUT:
        store_tile(grad_input_ptr, grad, start, size, EVEN, BLOCK)
    if NEED_TARGET:
        store_tile(grad_target_ptr, -grad, start, size, EVEN, BLOCK)


def huber_loss(input: Tensor, target: Tensor, reduction: str, delta: float) -> Tensor:
    """Huber loss of two tensors of one shape and dtype, not empty, any strides.

    ``reduction`` 'none' gives a tensor of that shape, 'mean' and 'sum' a 0-d one. Accumulates in float32 (float64 for
    float64) and rounds once.
    """
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), target.stride())
    return elementwise_loss(loss_plan(huber_loss_kernel, elements, reduction, DELTA=float(delta)), input, target)


def huber_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str,
    delta: float,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`elementwise_loss_backward` of `huber_loss`."""
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), target.stride())
    choices = not any(grad_output.stride()), need_input, need_target
    plan = loss_backward_plan(huber_loss_backward_kernel, elements, reduction, choices, DELTA=float(delta))
    return elementwise_loss_backward(plan, grad_output, input, target)
