"""Sum of two tensors with ReLU, as at the end of a residual block: one pass forward, one backward.

With ``a`` and ``b`` the inputs, ``y`` the output and ``g`` its gradient::

    y = relu(a + b)
    ga = gb = g where not y <= 0, else 0

The kernels run over memory in one dense layout, as all elementwise ones do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import elementwise_plan, elementwise_strides, in_layout, load_tile, store_tile
from .launch import launch


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
    return _elementwise(add_relu_kernel, input, other)


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The gradient of `add_relu` for both inputs alike, in the layout of ``output``."""
    return _elementwise(add_relu_backward_kernel, grad_output, output, output.stride())


def _elementwise(kernel: object, first: Tensor, second: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """Run a kernel of two inputs over memory in the layout of ``strides``, or in that of torch's own result."""
    strides = strides or elementwise_strides(first, second)
    result = first.new_empty_strided(first.shape, strides)
    plan = elementwise_plan(kernel, first.device, first.numel())
    launch(plan, in_layout(first, strides), in_layout(second, strides), result)
    return result
