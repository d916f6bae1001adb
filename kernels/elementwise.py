"""What elementwise passes share: one order of the elements in memory for all tensors, and what losses do with it.

An elementwise pass needs no indices, only the order of the elements in memory: the launchers bring all tensors into one
dense layout (a copy only where layouts differ) and the kernels run over it as over a vector.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import planned
from .launch import Plan, accumulator_dtype, launch
from .reduce import sum_of_partials


@triton.jit
def load_tile(pointer, start, size, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from ``start`` in the dtype to compute in, and 0 from ``size`` on, where nothing is read.

    Triton widens an access only if its mask is the same over 16 bytes: it is where ``size`` is a multiple of 16
    elements (``EVEN``). Else the one tile that needs a mask takes a way of its own.
    """
    positions = start + tl.arange(0, BLOCK)
    pointers, inside = pointer + positions, positions < size
    if EVEN:
        values = tl.load(pointers, mask=inside, other=0.0)
    elif start + BLOCK <= size:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=0.0)
    return values.to(tl.float64 if values.dtype == tl.float64 else tl.float32)


@triton.jit
def store_tile(pointer, values, start, size, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `load_tile` would load, rounded to the dtype there."""
    positions = start + tl.arange(0, BLOCK)
    pointers, inside = pointer + positions, positions < size
    values = values.to(pointer.dtype.element_ty)
    if EVEN:
        tl.store(pointers, values, mask=inside)
    elif start + BLOCK <= size:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside)


@triton.jit
def total_kernel(partials_ptr, loss_ptr, programs, divisor, BLOCK: tl.constexpr):
    """One program: the sum of all partial sums over ``divisor``."""
    total = sum_of_partials(partials_ptr, programs, BLOCK) / divisor
    tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))


def total(partials: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """The 0-d sum of partial sums over ``divisor``."""
    result = partials.new_empty((), dtype=dtype)
    launch(total_plan(partials.numel(), divisor), partials, result)
    return result


@planned
def total_plan(programs: int, divisor: int) -> Plan:
    """`total`, on any device."""
    return Plan(total_kernel, (1,), programs, divisor, BLOCK=1024)


def elementwise_config(size: int, device: torch.device) -> tuple[int, int]:
    """Elements and warps of one program; the interpreter pays per operation, not per element."""
    block, num_warps = (1 << 20, 1) if device.type == "cpu" else (2048, 4)
    return min(block, triton.next_power_of_2(size)), num_warps


@planned
def elementwise_plan(kernel: Any, device: torch.device, size: int, *numbers: int, **constants: bool) -> Plan:
    """A kernel over ``size`` elements, its first number."""
    block, num_warps = elementwise_config(size, device)
    return Plan(
        kernel,
        (triton.cdiv(size, block),),
        size,
        *numbers,
        EVEN=size % 16 == 0,
        BLOCK=block,
        num_warps=num_warps,
        **constants,
    )


@planned
def loss_plan(
    kernel: Any, device: torch.device, size: int, reduction: str, *numbers: int, **constants: bool
) -> tuple[Plan, int]:
    """A kernel that writes each element's loss, or each program's sum, and the divisor that is left for their sum.

    A program that is alone divides its sum itself.
    """
    divisor = size if reduction == "mean" else 1
    alone = elementwise_config(size, device)[0] >= size
    words = (divisor, 1) if alone else (1, divisor)
    return elementwise_plan(kernel, device, size, words[0], *numbers, SUM=reduction != "none", **constants), words[1]


def elementwise_loss(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
    reduction: str,
    *numbers: int,
    **constants: bool,
) -> Tensor:
    """The loss of elements with these strides: for 'none' in that layout, else 0-d. The first tensor is the input."""
    input = tensors[0]
    plan, divisor = loss_plan(kernel, input.device, input.numel(), reduction, *numbers, **constants)
    programs = plan.grid[0]
    if reduction == "none":
        result = input.new_empty_strided(input.shape, strides)
    elif programs == 1:
        result = input.new_empty(())
    else:
        result = input.new_empty(programs, dtype=accumulator_dtype(input.dtype))
    launch(plan, *tensors, result)
    return result if reduction == "none" or programs == 1 else total(result, divisor, input.dtype)


def elementwise_loss_backward(
    kernel: Any,
    grad_output: Tensor,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
    reduction: str,
    need_input: bool,
    need_target: bool,
    *numbers: int,
    **constants: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `elementwise_loss` for the first two tensors, those that are needed.

    ``grad_output`` is 0-d for 'mean' and 'sum'; for 'none' it has the input's shape, any strides, expanded ones too.
    """
    input, size = tensors[0], tensors[0].numel()
    scalar_grad = not any(grad_output.stride())
    grad_input, grad_target = (
        input.new_empty_strided(input.shape, strides) if needed else None for needed in (need_input, need_target)
    )
    plan = elementwise_plan(
        kernel,
        input.device,
        size,
        size if reduction == "mean" else 1,
        *numbers,
        SCALAR_GRAD=scalar_grad,
        NEED_INPUT=need_input,
        NEED_TARGET=need_target,
        **constants,
    )
    launch(
        plan,
        grad_output if scalar_grad else in_layout(grad_output, strides),
        *tensors,
        input if grad_input is None else grad_input,
        input if grad_target is None else grad_target,
    )
    return grad_input, grad_target


def elementwise_strides(input: Tensor, target: Tensor) -> tuple[int, ...]:
    """The strides that torch gives to an elementwise result of the two, always dense."""
    if input.is_contiguous() and target.is_contiguous():
        return input.stride()
    return result_strides(input.shape, input.stride(), target.stride())


@planned
def result_strides(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[int, ...]:
    return torch.add(*(torch.empty_strided(shape, each, device="meta") for each in strides)).stride()


def in_layout(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` with these dense strides, copied only if it has others."""
    if tensor.stride() == strides:
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
