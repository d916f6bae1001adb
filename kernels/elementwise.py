"""What elementwise passes share: one order of the elements in memory for all tensors, and what losses do with it.

An elementwise pass needs no indices, only the order of the elements in memory: the launchers bring all tensors into one
dense layout (a copy only where layouts differ) and the kernels run over it as over a vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

    Triton vectorizes a masked access only if the mask is constant over each 16 bytes, as it is where ``size`` is a
    multiple of 16 elements (``EVEN``). Else only the last tile is masked, in a branch of its own. No address is
    outside, even where the mask is false: it is that of one of the last elements.
    """
    lanes = tl.arange(0, BLOCK)
    positions = start + lanes
    inside = positions < size
    if EVEN:
        within = tl.minimum(start + lanes // 16 * 16, size // 16 * 16 - 16) + lanes % 16
        values = tl.load(pointer + within, mask=inside, other=0.0)
    elif start + BLOCK <= size:
        values = tl.load(pointer + positions)
    else:
        values = tl.load(pointer + tl.minimum(positions, size - 1), mask=inside, other=0.0)
    return values.to(tl.float64 if values.dtype == tl.float64 else tl.float32)


@triton.jit
def store_tile(pointer, values, start, size, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile where `load_tile` would load it, rounded to the tensor's dtype."""
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
def store_loss(pointer, loss, start, size, divisor, SUM: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile of losses, 0 past the end, or the program's sum of them over ``divisor``."""
    if SUM:
        part = tl.sum(loss, 0) / divisor
        tl.store(pointer + tl.program_id(0), part.to(pointer.dtype.element_ty))
    else:
        store_tile(pointer, loss, start, size, EVEN, BLOCK)


@triton.jit
def load_grad_output(pointer, input_ptr, start, size, SCALAR: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of a tile, or the ``SCALAR`` one of all elements, in the dtype to compute in."""
    if SCALAR:
        grad_output = tl.load(pointer).to(tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32)
    else:
        grad_output = load_tile(pointer, start, size, EVEN, BLOCK)
    return grad_output


@triton.jit
def total_kernel(partials_ptr, loss_ptr, programs, divisor, BLOCK: tl.constexpr):
    """One program: the sum of all partial sums over ``divisor``."""
    total = sum_of_partials(partials_ptr, programs, BLOCK) / divisor
    tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))


def elementwise_config(size: int, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Elements and warps of one program; the interpreter pays per operation, not per element.

    A number of float64 takes two registers: of 2048, some kernels spill.
    """
    block, num_warps = 1024 if dtype is torch.float64 else 2048, 4
    if device.type == "cpu":
        block, num_warps = 1 << 20, 1
    return min(block, triton.next_power_of_2(size)), num_warps


def elementwise_plan(kernel: Any, elements: Elements, *numbers: int, **constants: float | str) -> Plan:
    """A kernel over all elements; how many these are is its first number."""
    size = elements.shape.numel()
    block, num_warps = elementwise_config(size, elements.device, elements.dtype)
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


class Elements(NamedTuple):
    """Two tensors of one shape, as far as a plan depends on them."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    first_strides: tuple[int, ...]
    second_strides: tuple[int, ...]

    def result_strides(self) -> tuple[int, ...]:
        """The strides that torch gives to an elementwise result of the two, always dense."""
        strides = self.first_strides, self.second_strides
        both = [torch.empty_strided(self.shape, each, device="meta") for each in strides]
        return strides[0] if all(each.is_contiguous() for each in both) else torch.add(*both).stride()


class LossPlan(NamedTuple):
    """The launches of a loss, and the dense strides that all tensors get.

    The kernel writes each element's loss, or each program's sum. If there are several sums, a ``total`` of these
    ``partials`` follows; a program that is alone divides its sum by itself.
    """

    kernel: Plan
    strides: tuple[int, ...]
    reduced: bool
    partials: torch.dtype
    total: Plan | None


@planned
def loss_plan(kernel: Any, elements: Elements, reduction: str, *numbers: int, **constants: float | str) -> LossPlan:
    """`elementwise_loss`; ``numbers`` and ``constants`` are the kernel's own.

    A float is a constant: as a number Triton would round it to float32, in kernels for float64 too.
    """
    size, reduced = elements.shape.numel(), reduction != "none"
    divisor = size if reduction == "mean" else 1
    alone = elementwise_config(size, elements.device, elements.dtype)[0] >= size
    first = elementwise_plan(kernel, elements, divisor if alone else 1, *numbers, SUM=reduced, **constants)
    total = Plan(total_kernel, (1,), first.grid[0], divisor, BLOCK=1024) if reduced and not alone else None
    return LossPlan(first, elements.result_strides(), reduced, accumulator_dtype(elements.dtype), total)


def elementwise_loss(plan: LossPlan, input: Tensor, target: Tensor, *others: Tensor) -> Tensor:
    """The loss: 0-d, or for reduction 'none' the loss of each element. ``others`` are in the plan's layout already."""
    first, strides, reduced, partials, total = plan
    if not reduced:
        result = input.new_empty_strided(input.shape, strides)
    elif total is None:
        result = input.new_empty(())
    else:
        result = input.new_empty(first.grid[0], dtype=partials)
    if input.stride() != strides:
        input = in_layout(input, strides)
    if target.stride() != strides:
        target = in_layout(target, strides)
    launch(first, input, target, *others, result)
    if total is None:
        return result
    loss = input.new_empty(())
    launch(total, result, loss)
    return loss


class LossBackwardPlan(NamedTuple):
    """The launch of a loss's gradients, the dense strides that all tensors get, and what the kernel does."""

    kernel: Plan
    strides: tuple[int, ...]
    scalar_grad: bool
    need_input: bool
    need_target: bool


@planned
def loss_backward_plan(
    kernel: Any,
    elements: Elements,
    reduction: str,
    choices: tuple[bool, bool, bool],
    *numbers: int,
    **constants: float | str,
) -> LossBackwardPlan:
    """`elementwise_loss_backward`; ``choices``: whether the loss has one gradient for all elements, and which of input
    and target need one.
    """
    size = elements.shape.numel()
    names = dict(zip(("SCALAR_GRAD", "NEED_INPUT", "NEED_TARGET"), choices, strict=True))
    divisor = size if reduction == "mean" else 1
    plan = elementwise_plan(kernel, elements, divisor, *numbers, **names, **constants)
    return LossBackwardPlan(plan, elements.result_strides(), *choices)


def elementwise_loss_backward(
    plan: LossBackwardPlan, grad_output: Tensor, input: Tensor, target: Tensor, *others: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `elementwise_loss` for input and target, those that are needed.

    ``grad_output`` is 0-d for 'mean' and 'sum'; for 'none' it has the input's shape, any strides, expanded ones too.
    """
    kernel, strides, scalar_grad, need_input, need_target = plan
    if input.stride() != strides:
        input = in_layout(input, strides)
    if target.stride() != strides:
        target = in_layout(target, strides)
    if not scalar_grad and grad_output.stride() != strides:
        grad_output = in_layout(grad_output, strides)
    grad_input = input.new_empty_strided(input.shape, strides) if need_input else None
    grad_target = input.new_empty_strided(input.shape, strides) if need_target else None
    results = input if grad_input is None else grad_input, input if grad_target is None else grad_target
    launch(kernel, grad_output, input, target, *others, *results)
    return grad_input, grad_target


def in_layout(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` with these dense strides, copied only if it has others."""
    if tensor.stride() == strides:
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
