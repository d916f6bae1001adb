"""What the reductions share: tiles that count every element once, and the fixed-order sum of partial sums."""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.jit
def covering_tile(index, size, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Positions of tile number ``index``, all inside the dimension, and which lanes are the first with their position.

    No load needs a mask, and accesses are as wide as the ``ALIGNMENT`` of `tile_alignment` allows: the last tile is
    moved back so that it ends at the edge, and in a tile larger than the dimension (less than twice) the lanes past the
    edge repeat positions of the first half.
    """
    lanes = tl.arange(0, BLOCK)
    if ALIGNMENT < 0:
        UNIT: tl.constexpr = -ALIGNMENT
        fresh = lanes < size // UNIT * UNIT  # equals size, but the compiler sees that UNIT divides it
        positions = tl.where(fresh, lanes, lanes - BLOCK // 2).to(tl.int64)
    else:
        start = tl.minimum(index * BLOCK, size - BLOCK).to(tl.int64)
        positions = tl.multiple_of(start, ALIGNMENT) + lanes
        fresh = positions >= index * BLOCK
    return positions, fresh


def tile_alignment(size: int, block: int) -> int:
    """The greatest divisor, up to 16, of ``size`` and the start of every tile; negated if one tile exceeds the size."""
    assert block < 2 * size
    alignment = math.gcd(size, block, 16)
    return alignment if size >= block else -alignment


@triton.jit
def sum_of_partials(partials_ptr, count, BLOCK: tl.constexpr):
    """Sum of ``count`` contiguous values, in an order that depends on ``count`` alone."""
    total = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        inside = positions < count
        total += tl.load(partials_ptr + tl.where(inside, positions, 0), mask=inside, other=0.0)
    return tl.sum(total, 0)
