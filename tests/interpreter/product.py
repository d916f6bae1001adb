"""Makes the matrix products of Triton's interpreter the same on every processor.

Unpatched they are numpy's `matmul`, that is OpenBLAS, whose order of summation, and whether it rounds between a product
and its sum, is another for each family of processors. Patched, every element is summed up in the order of the inner
dimension, with all roundings of the accumulator's dtype: bits depend on the operands alone, not on the tile's sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = np.ndarray[Any, Any]


def product(a: Array, b: Array, dtype: np.dtype[Any]) -> Array:
    """``a @ b``, computed in ``dtype``.

    `einsum` takes no library for two contiguous operands: it adds one product after the other to a row of the result,
    if that has more than one element. No tile of a kernel is narrower than 16.
    """
    assert b.shape[-1] > 1
    return np.einsum("...ik,...kj->...ij", np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype))


def install() -> None:
    """Patch the interpreter of this process. Operands of 8 bits, which no kernel here has, are none for it."""

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *options: Any
    ) -> TensorHandle:
        assert all(handle.dtype.scalar.primitive_bitwidth >= 16 for handle in (a, b))
        total = product(a.data, b.data, accumulator.data.dtype) + accumulator.data
        return TensorHandle(total, accumulator.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
