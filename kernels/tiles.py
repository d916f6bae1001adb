"""What the tiles of all products share: positions of which every address lies inside, and a step of the product."""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.jit
def tile_positions(index, size, BLOCK: tl.constexpr, DIVISOR: tl.constexpr):
    """Positions, in int64, of tile number ``index`` along a dimension of ``size``, and which of them lie inside.

    No load leaves the tensor and none needs a mask: past the edge the last unit of positions is repeated. A unit is as
    many as divide ``BLOCK``, a power of 2, and ``DIVISOR``, which divides ``size``. They follow each other: one access
    can load them, or the addresses of all are that of the first and constants.
    """
    UNIT: tl.constexpr = (BLOCK | DIVISOR) & -(BLOCK | DIVISOR)
    lanes = tl.arange(0, BLOCK)
    unit = tl.minimum(index * BLOCK + lanes // UNIT * UNIT, size - UNIT).to(tl.int64)
    return unit + lanes % UNIT, index * BLOCK + lanes < size


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


@triton.jit
def multiply_add(a, b, accumulator, INPUT_PRECISION: tl.constexpr):
    """``accumulator`` and the product of two tiles, of one step of a sum.

    In float32 outside of matrix units a step is added up by itself: error grows with the number of additions in a row,
    and this makes of a sum of 4096 terms, in steps of 16, one of 256.
    """
    if INPUT_PRECISION == "ieee" and accumulator.dtype == tl.float32 and a.dtype == tl.float32:
        step = tl.dot(a, b, input_precision=INPUT_PRECISION, out_dtype=tl.float32)
        return tl.fma(step, 1.0, accumulator)  # an addition would be merged into the product
    else:
        return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION, out_dtype=accumulator.dtype)


def tile_alignment(size: int, block: int, row: int = 0) -> int:
    """The greatest divisor, up to 16, of ``size`` and the start of every tile; negated if one tile exceeds the size.

    It divides a ``row`` too, if the size is that of several.
    """
    assert block < 2 * size
    alignment = math.gcd(size, row, block, 16)
    return alignment if size >= block else -alignment
