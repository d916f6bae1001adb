"""Sum of two tensors with ReLU, as at the end of a residual block: one pass forward, one backward.

With ``a`` and ``b`` the inputs, ``y`` the output and ``g`` its gradient::

    y = relu(a + b)
    ga = gb = g where not y <= 0, else 0

The kernels run over memory in one dense layout, as all elementwise ones do.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import planned
from .elementwise import Elements, elementwise_plan, in_layout, load_tile, store_tile
from .launch import Plan, launch


@triton.jit
def add_relu_kernel(
    input_ptr,  # [size]
    other_ptr,  # [size]
    output_ptr,  # [size]
    size,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    total = load_tile(input_ptr, start, size, EVEN, BLOCK) + load_tile(other_ptr, start, size, EVEN, BLOCK)
    store_tile(output_ptr, tl.where(total <= 0, 0.0, total), start, size, EVEN, BLOCK)


@triton.jit
def add_relu_backward_kernel(
    grad_output_ptr,  # [size]
    output_ptr,  # [size]
    grad_ptr,  # [size]
    size,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    output = load_tile(output_ptr, start, size, EVEN, BLOCK)
    grad = load_tile(grad_output_ptr, start, size, EVEN, BLOCK)
    store_tile(grad_ptr, tl.where(output <= 0, 0.0, grad), start, size, EVEN, BLOCK)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """``relu(input + other)`` of two tensors of one shape and dtype, not empty, any strides."""
    elements = Elements(input.device, input.dtype, input.shape, input.stride(), other.stride())
    return _elementwise(*add_relu_plan(add_relu_kernel, elements), input, other)


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The gradient of `add_relu` for both inputs alike, in the layout of ``output``, which is dense."""
    elements = Elements(output.device, output.dtype, output.shape, output.stride(), output.stride())
    return _elementwise(*add_relu_plan(add_relu_backward_kernel, elements), grad_output, output)


@planned
def add_relu_plan(kernel: Any, elements: Elements) -> tuple[Plan, tuple[int, ...]]:
    """The launch of a kernel of two inputs, and the strides that all tensors get."""
    return elementwise_plan(kernel, elements), elements.result_strides()


def _elementwise(plan: Plan, strides: tuple[int, ...], first: Tensor, second: Tensor) -> Tensor:
    if first.stride() != strides:
        first = in_layout(first, strides)
    if second.stride() != strides:
        second = in_layout(second, strides)
    result = first.new_empty_strided(first.shape, strides)
    launch(plan, first, second, result)
    return result
