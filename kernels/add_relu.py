"""Sum of two tensors with ReLU, as at the end of a residual block: one pass forward, one backward.

With ``a`` and ``b`` the inputs, ``y`` the output and ``g`` its gradient::

    y = relu(a + b)
    ga = gb = g where not y <= 0, else 0

The kernels run over memory in one dense layout, as all elementwise ones do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import elementwise_config, elementwise_strides, in_layout
from .launch import launch
from .reduce import covering_tile, tile_alignment


@triton.jit
def add_relu_kernel(
    input_ptr,  # [size]
    other_ptr,  # [size]
    output_ptr,  # [size]
    size,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements."""
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32

    positions, fresh = covering_tile(tl.program_id(0).to(tl.int64), size, BLOCK, ALIGNMENT)
    total = tl.load(input_ptr + positions).to(ACCUMULATOR) + tl.load(other_ptr + positions).to(ACCUMULATOR)
    output = tl.where(total <= 0, 0.0, total).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + positions, output, mask=fresh)


@triton.jit
def add_relu_backward_kernel(
    grad_output_ptr,  # [size]
    output_ptr,  # [size]
    grad_ptr,  # [size]
    size,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements."""
    positions, fresh = covering_tile(tl.program_id(0).to(tl.int64), size, BLOCK, ALIGNMENT)
    grad = tl.where(tl.load(output_ptr + positions) <= 0, 0.0, tl.load(grad_output_ptr + positions))
    tl.store(grad_ptr + positions, grad.to(grad_ptr.dtype.element_ty), mask=fresh)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """``relu(input + other)`` of two tensors of one shape and dtype, not empty, any strides."""
    return _elementwise(add_relu_kernel, input, other)


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The gradient of `add_relu` for both inputs alike, in the layout of ``output``."""
    return _elementwise(add_relu_backward_kernel, grad_output, output, output.stride())


def _elementwise(kernel: object, first: Tensor, second: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """Run a kernel of two inputs over memory in the layout of ``strides``, or in that of torch's own result."""
    strides = strides or elementwise_strides(first, second)
    size = first.numel()
    block, num_warps = elementwise_config(size, first.device)
    result = torch.empty_strided(first.shape, strides, dtype=first.dtype, device=first.device)
    launch(
        kernel,
        (triton.cdiv(size, block),),
        in_layout(first, strides),
        in_layout(second, strides),
        result,
        size,
        ALIGNMENT=tile_alignment(size, block),
        BLOCK=block,
        num_warps=num_warps,
    )
    return result
