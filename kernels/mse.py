"""Mean squared error: one pass over input and target, and for a sum or mean a second, tiny one over partial sums.

With ``x`` the input, ``y`` the target, ``n`` elements and ``g`` the gradient of the loss::

    loss_i = (x_i - y_i)^2                  'none'; 'sum' adds them up, 'mean' divides that by n
    gx_i = 2 g (x_i - y_i) / divisor        divisor n for 'mean', else 1;  gy = -gx
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import elementwise_config, elementwise_strides, in_layout, load_tile, store_tile, total
from .launch import accumulator_dtype, launch


@triton.jit
def mse_loss_kernel(
    input_ptr,  # [size]
    target_ptr,  # [size]
    loss_ptr,  # [size], or [programs] partial sums, or the one result if there is one program
    size,
    divisor,
    SUM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements: their losses, or the sum of them over ``divisor``."""
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    input = load_tile(input_ptr, start, size, EVEN, BLOCK)
    difference = input - load_tile(target_ptr, start, size, EVEN, BLOCK)
    loss = difference * difference
    if SUM:
        part = tl.sum(loss, 0) / divisor
        tl.store(loss_ptr + program, part.to(loss_ptr.dtype.element_ty))
    else:
        store_tile(loss_ptr, loss, start, size, EVEN, BLOCK)


@triton.jit
def mse_loss_backward_kernel(
    grad_output_ptr,  # [size], or one element for all
    input_ptr,  # [size]
    target_ptr,  # [size]
    grad_input_ptr,  # [size]
    grad_target_ptr,  # [size]
    size,
    divisor,
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
    grad = 2.0 * grad_output / divisor * difference
    if NEED_INPUT:
        store_tile(grad_input_ptr, grad, start, size, EVEN, BLOCK)
    if NEED_TARGET:
        store_tile(grad_target_ptr, -grad, start, size, EVEN, BLOCK)


def mse_loss(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Squared error of two tensors of one shape and dtype, not empty, any strides.

    ``reduction`` 'none' gives a tensor of that shape, 'mean' and 'sum' a 0-d one. Accumulates in float32 (float64 for
    float64) and rounds once.
    """
    strides = elementwise_strides(input, target)
    size = input.numel()
    divisor = size if reduction == "mean" else 1
    block, num_warps = elementwise_config(size, input.device)
    programs = triton.cdiv(size, block)

    if reduction == "none":
        loss = torch.empty_strided(input.shape, strides, dtype=input.dtype, device=input.device)
    elif programs == 1:
        loss = input.new_empty(())
    else:
        loss = input.new_empty(programs, dtype=accumulator_dtype(input.dtype))
    launch(
        mse_loss_kernel,
        (programs,),
        in_layout(input, strides),
        in_layout(target, strides),
        loss,
        size,
        divisor if programs == 1 else 1,
        SUM=reduction != "none",
        EVEN=size % 16 == 0,
        BLOCK=block,
        num_warps=num_warps,
    )
    if reduction == "none" or programs == 1:
        return loss
    return total(loss, divisor, input.dtype)


def mse_loss_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, reduction: str, need_input: bool, need_target: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `mse_loss` for input and target, those that are needed.

    ``grad_output`` is 0-d for 'mean' and 'sum'; for 'none' it has the input's shape, any strides, expanded ones too.
    """
    strides = elementwise_strides(input, target)
    size = input.numel()
    block, num_warps = elementwise_config(size, input.device)
    scalar_grad = not any(grad_output.stride())
    grad_input, grad_target = (
        torch.empty_strided(input.shape, strides, dtype=input.dtype, device=input.device) if needed else None
        for needed in (need_input, need_target)
    )
    launch(
        mse_loss_backward_kernel,
        (triton.cdiv(size, block),),
        grad_output if scalar_grad else in_layout(grad_output, strides),
        in_layout(input, strides),
        in_layout(target, strides),
        input if grad_input is None else grad_input,
        input if grad_target is None else grad_target,
        size,
        size if reduction == "mean" else 1,
        SCALAR_GRAD=scalar_grad,
        NEED_INPUT=need_input,
        NEED_TARGET=need_target,
        EVEN=size % 16 == 0,
        BLOCK=block,
        num_warps=num_warps,
    )
    return grad_input, grad_target
