"""The patched interpreter computes bfloat16 as torch does, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, sum_ptr, product_ptr, masked_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + lanes), tl.load(y_ptr + lanes)
    tl.store(sum_ptr + lanes, x + y)
    tl.store(product_ptr + lanes, x * y)
    tl.store(masked_ptr + lanes, tl.where(x <= 0, y, x))


@triton.jit
def cast_kernel(x_ptr, narrow_ptr, wide_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    narrow = tl.load(x_ptr + lanes).to(tl.bfloat16)
    tl.store(narrow_ptr + lanes, narrow)
    tl.store(wide_ptr + lanes, narrow.to(tl.float64))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    square = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def test_arithmetic_and_comparison() -> None:
    x, y = torch.randn(2, 256).bfloat16()
    x[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    results = torch.empty(3, 256, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, *results, SIZE=256)
    for result, expected in zip(results, (x + y, x * y, torch.where(x <= 0, y, x)), strict=True):
        assert same(result, expected)


def test_casts_round_to_nearest_even() -> None:
    x = torch.randn(256)
    x[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1e39, float("nan")])
    narrow, wide = torch.empty(256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.float64)
    cast_kernel[(1,)](x, narrow, wide, SIZE=256)
    assert same(narrow, x.bfloat16()) and same(wide, x.bfloat16().double())


def test_dot() -> None:
    a, b = torch.randint(-9, 9, (2, 16, 16)).bfloat16()  # all sums are exact
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, SIZE=16)
    assert same(c, a.float() @ b.float())
