"""What the reductions share: the fixed-order sum of partial sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_partials(partials_ptr, count, BLOCK: tl.constexpr):
    """Sum of ``count`` contiguous values, in an order that depends on ``count`` alone."""
    total = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        inside = positions < count
        total += tl.load(partials_ptr + tl.where(inside, positions, 0), mask=inside, other=0.0)
    return tl.sum(total, 0)
