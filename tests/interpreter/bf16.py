"""Makes bfloat16 right in Triton's interpreter, which keeps such numbers as bare 16-bit integers.

Unpatched it adds, compares and multiplies the integers, and cuts float32 off to bfloat16 where a GPU rounds to nearest.
Patched, every operation decodes to float32, computes, and rounds as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastops import dispatch

Array = np.ndarray[Any, Any]


def decode(bits: Array) -> Array:
    return torch.tensor(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


def encode(values: Array) -> Array:
    return torch.tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def as_float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(decode(handle.data), tl.float32) if is_bf16(handle) else handle


def install() -> None:
    """Patch the interpreter of this process. A second call changes nothing."""
    cast, binary_op, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.create_dot
    convert = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if dtype.scalar == tl.bfloat16:
            return source if is_bf16(source) else TensorHandle(encode(source.data), tl.bfloat16)
        return cast(self, as_float32(source), dtype)

    def create_fp_to_fp(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype, rounding: Any) -> TensorHandle:
        if is_bf16(source) or dtype.scalar == tl.bfloat16:
            return cast_impl(self, source, dtype)
        return convert(self, source, dtype, rounding)

    def bf16_binary_op(
        self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, operation: Callable[[Array, Array], Array]
    ) -> TensorHandle:
        if not is_bf16(left):
            return binary_op(self, left, right, operation)
        result = operation(decode(left.data), decode(right.data))
        is_comparison = result.dtype == np.bool_
        return TensorHandle(result, tl.int1) if is_comparison else TensorHandle(encode(result), tl.bfloat16)

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *options: Any
    ) -> TensorHandle:
        return dot(self, as_float32(a), as_float32(b), accumulator, *options)

    dispatch.interpreter_has_bfloat16 = True
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.binary_op = bf16_binary_op
    InterpreterBuilder.create_dot = create_dot
