"""What the elementwise losses share: one order of the elements in memory for all tensors, programs, and the last sum.

An elementwise pass needs no indices, only the order of the elements in memory: the launchers bring all tensors into one
dense layout (a copy only where layouts differ) and the kernels run over it as over a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
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
    launch(total_kernel, (1,), partials, result, partials.numel(), divisor, BLOCK=1024)
    return result


def elementwise_config(size: int, device: torch.device) -> tuple[int, int]:
    """Elements and warps of one program; the interpreter pays per operation, not per element."""
    block, num_warps = (1 << 20, 1) if device.type == "cpu" else (2048, 4)
    return min(block, triton.next_power_of_2(size)), num_warps


def elementwise_strides(input: Tensor, target: Tensor) -> tuple[int, ...]:
    """The strides that torch gives to an elementwise result of the two, always dense."""
    if input.is_contiguous() and target.is_contiguous():
        return input.stride()
    metas = (torch.empty_strided(tensor.shape, tensor.stride(), device="meta") for tensor in (input, target))
    return torch.add(*metas).stride()


def in_layout(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` with these dense strides, copied only if it has others."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
