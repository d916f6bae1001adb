"""Matrix product with a bias and an activation in its epilogue, of matrices with any strides.

It has two kernels: one with pointers, which takes everything, and a persistent one with tensor descriptors, for large
and aligned matrices where the GPU has descriptors.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import NONE, RELU, Activation
from .configs import (
    Kind,
    PersistentConfig,
    Tile,
    inner_splits,
    matmul_config,
    multiprocessors,
    narrowed,
    persistent_config,
    planned,
    register_limit,
)
from .epilogue import activated
from .launch import Plan, accumulator_dtype, input_precision, launch, units_of
from .tiles import multiply_add, tile_positions


@triton.jit
def tile_of_program(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the tile of a program: groups of GROUP_M rows of tiles share columns of B in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + program % (GROUP_M * tiles_n) % group_rows
    return tile_m, program % (GROUP_M * tiles_n) // group_rows


@triton.jit
def product_tile(
    a_ptrs,  # [BLOCK_M, BLOCK_K]: the first step of the rows
    b_ptrs,  # [BLOCK_K, BLOCK_N]: the first step of the columns
    k_strides,  # of A and B, from one element of the inner dimension to the next
    first_step,
    last_step,
    K,
    DIVISOR: tl.constexpr,  # of K, a power of 2
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Tile [BLOCK_M, BLOCK_N] of A B from some of its steps of BLOCK_K, in the accumulators' dtype."""
    ACCUMULATOR: tl.constexpr = tl.float64 if a_ptrs.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_K: tl.constexpr = a_ptrs.shape[1]
    UNIT: tl.constexpr = min(BLOCK_K, DIVISOR)

    accumulator = tl.zeros((a_ptrs.shape[0], b_ptrs.shape[1]), ACCUMULATOR)
    full = last_step if EVEN_K else tl.minimum(last_step, K // BLOCK_K)
    for step in range(first_step, full):
        start = tl.cast(step * BLOCK_K, tl.int64)
        a = tl.load(a_ptrs + start * k_strides[0])
        b = tl.load(b_ptrs + start * k_strides[1])
        accumulator = multiply_add(a, b, accumulator, INPUT_PRECISION)
    if not EVEN_K and full < last_step:  # not in the loop, where each mask takes four instructions
        lanes = tl.arange(0, BLOCK_K)
        inside = lanes < K - full * BLOCK_K
        # Past the end the last unit is repeated, as in `tile_positions`: a mask does not keep every prefetch away.
        starts = tl.minimum(full * BLOCK_K, K - UNIT - lanes // UNIT * UNIT).to(tl.int64)
        a = tl.load(a_ptrs + (starts * k_strides[0])[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(b_ptrs + (starts * k_strides[1])[:, None], mask=inside[:, None], other=0.0)
        accumulator = multiply_add(a, b, accumulator, INPUT_PRECISION)
    return accumulator


@triton.jit
def with_bias(accumulator, bias_ptr, columns, inside, HAS_BIAS: tl.constexpr):
    """A product with its bias, before it is rounded. The bias is loaded where ``inside``; None: everywhere."""
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns, mask=inside).to(accumulator.dtype)[None, :]
    return accumulator


@triton.jit(
    do_not_specialize=["M", "N", "K"],
    do_not_specialize_on_alignment=["stride_am", "stride_ak", "stride_bk", "stride_bn"],
)
def matmul_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    bias_ptr,  # [N]
    c_ptr,  # [M, N], contiguous; [splits, M, N] if SPLIT
    before_ptr,  # [M, N], contiguous: the results before the activation
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    UNITS: tl.constexpr,  # of the sizes and strides
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_BEFORE: tl.constexpr,
    ADD: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program per tile of C = activation(A B + bias), with what C was if ADD.

    With SPLIT there is one for each part of the inner dimension too.
    """
    M, N, K = M * UNITS[0], N * UNITS[1], K * UNITS[2]
    stride_am, stride_ak = stride_am * UNITS[3], stride_ak * UNITS[4]
    stride_bk, stride_bn = stride_bk * UNITS[5], stride_bn * UNITS[6]
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)

    rows, own_rows = tile_positions(tile_m, M, BLOCK_M, UNITS[0])
    columns, own_columns = tile_positions(tile_n, N, BLOCK_N, UNITS[1])
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    # Offsets are added up first: pointers would be, two by two, in each step of the loop.
    a_ptrs = a_ptr + (rows[:, None] * stride_am + inner[None, :] * stride_ak)
    b_ptrs = b_ptr + (inner[:, None] * stride_bk + columns[None, :] * stride_bn)

    first_step, last_step = 0, tl.cdiv(K, BLOCK_K)
    if SPLIT:
        split = tl.program_id(1)
        steps = tl.cdiv(last_step, tl.num_programs(1))
        first_step, last_step = split * steps, tl.minimum((split + 1) * steps, last_step)
        c_ptr += split.to(tl.int64) * M * N
    strides = stride_ak, stride_bk
    accumulator = product_tile(a_ptrs, b_ptrs, strides, first_step, last_step, K, UNITS[2], INPUT_PRECISION, EVEN_K)
    z = with_bias(accumulator, bias_ptr, columns, None, HAS_BIAS)
    offsets, own = rows[:, None] * N + columns[None, :], own_rows[:, None] & own_columns[None, :]
    if ADD:
        z += tl.load(c_ptr + offsets)
    if SAVE_BEFORE:
        tl.store(before_ptr + offsets, z.to(c_ptr.dtype.element_ty), mask=own)
    tl.store(c_ptr + offsets, activated(z, ACTIVATION).to(c_ptr.dtype.element_ty), mask=own)


@triton.jit
def tensor_descriptor(
    pointer, rows, columns, stride, TRANSPOSED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Descriptor of a matrix [rows, columns] in tiles; of its transpose if that is what lies row by row."""
    if TRANSPOSED:
        return tl.make_tensor_descriptor(pointer, [columns, rows], [stride, 1], [BLOCK_COLUMNS, BLOCK_ROWS])
    else:
        return tl.make_tensor_descriptor(pointer, [rows, columns], [stride, 1], [BLOCK_ROWS, BLOCK_COLUMNS])


@triton.jit
def described_tile(descriptor, row, column, TRANSPOSED: tl.constexpr):
    """The tile of the matrix from ``row`` and ``column``, zeros past its edges."""
    if TRANSPOSED:
        return descriptor.load([column, row]).T
    else:
        return descriptor.load([row, column])


@triton.jit
def store_tile(
    accumulator,
    bias_ptr,
    c_tiles,
    before_tiles,
    row,
    column,
    N,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_BEFORE: tl.constexpr,
    ADD: tl.constexpr,
):
    """The epilogue of `persistent_matmul_kernel` for the columns from ``column``."""
    columns = column + tl.arange(0, accumulator.shape[1])
    z = with_bias(accumulator, bias_ptr, columns, columns < N, HAS_BIAS)
    if ADD:
        z += c_tiles.load([row, column])
    if SAVE_BEFORE:
        before_tiles.store([row, column], z.to(before_tiles.dtype))
    c_tiles.store([row, column], activated(z, ACTIVATION).to(c_tiles.dtype))


@triton.jit(do_not_specialize=["M", "N", "K", "stride_a", "stride_b"])
def persistent_matmul_kernel(
    a_ptr,  # [M, K], [K, M] if A_TRANSPOSED: rows contiguous, each from a multiple of 16 bytes
    b_ptr,  # [K, N], [N, K] if B_TRANSPOSED, likewise
    bias_ptr,  # [N]
    c_ptr,  # [M, N], contiguous
    before_ptr,  # [M, N], contiguous: the results before the activation
    M,
    N,
    K,
    stride_a,
    stride_b,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_BEFORE: tl.constexpr,
    ADD: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """C = activation(A B + bias), with what C was if ADD, tile after tile, as many at a time as there are programs.

    Its results equal those of `matmul_kernel` bit by bit.
    """
    ACCUMULATOR: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    COLUMNS: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N  # that are stored at once

    a_tiles = tensor_descriptor(a_ptr, M, K, stride_a, A_TRANSPOSED, BLOCK_M, BLOCK_K)
    b_tiles = tensor_descriptor(b_ptr, K, N, stride_b, B_TRANSPOSED, BLOCK_K, BLOCK_N)
    c_tiles = tensor_descriptor(c_ptr, M, N, N, False, BLOCK_M, COLUMNS)
    before_tiles = c_tiles
    if SAVE_BEFORE:
        before_tiles = tensor_descriptor(before_ptr, M, N, N, False, BLOCK_M, COLUMNS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        for step in range(0, tl.cdiv(K, BLOCK_K)):
            a = described_tile(a_tiles, row, step * BLOCK_K, A_TRANSPOSED)
            b = described_tile(b_tiles, step * BLOCK_K, column, B_TRANSPOSED)
            accumulator = multiply_add(a, b, accumulator, INPUT_PRECISION)

        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, COLUMNS)), (0, 2, 1)))
            store_tile(left, bias_ptr, c_tiles, before_tiles, row, column, N, HAS_BIAS, ACTIVATION, SAVE_BEFORE, ADD)
            column += COLUMNS
            store_tile(right, bias_ptr, c_tiles, before_tiles, row, column, N, HAS_BIAS, ACTIVATION, SAVE_BEFORE, ADD)
        else:
            store_tile(
                accumulator, bias_ptr, c_tiles, before_tiles, row, column, N, HAS_BIAS, ACTIVATION, SAVE_BEFORE, ADD
            )


@triton.jit(do_not_specialize=["splits", "M", "N", "positions"])
def sum_of_splits_kernel(
    partial_ptr,  # [splits, M, N], contiguous
    bias_ptr,  # [N]
    c_ptr,  # [M, N], contiguous; [M / positions, N, positions] if not LAST
    before_ptr,  # [M, N], contiguous: the results before the activation
    splits,
    M,
    N,
    positions,
    UNIT: tl.constexpr,  # of N
    LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_BEFORE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements of C: activation(sum of its parts, in order, + bias), with what C was if ADD."""
    N = N * UNIT
    elements, own = tile_positions(tl.program_id(0), M * N, BLOCK, UNIT)
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for split in range(0, splits):  # only results of few tiles are split, so offsets fit 32 bits
        total += tl.load(partial_ptr + split * M * N + elements)
    if HAS_BIAS:
        total += tl.load(bias_ptr + elements % N).to(total.dtype)
    if ADD:
        total += tl.load(c_ptr + elements)
    if SAVE_BEFORE:
        tl.store(before_ptr + elements, total.to(c_ptr.dtype.element_ty), mask=own)
    if not LAST:
        row = elements // N
        elements = (row // positions * N + elements % N) * positions + row % positions
    tl.store(c_ptr + elements, activated(total, ACTIVATION).to(c_ptr.dtype.element_ty), mask=own)


def row_unit(dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements are sure to lie side by side wherever a multiple of so many starts in a row (or column) of a
    matrix: at most 16 bytes of them; 1 where neither rows nor columns are contiguous, or where they overlap.
    """
    if 1 not in strides:
        return 1
    inner = strides.index(1)
    stride = strides[1 - inner]
    return math.gcd(stride, 16 // dtype.itemsize) if stride >= shape[inner] else 1


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: Activation = NONE,
    config: Tile | None = None,
    out: Tensor | None = None,
    before: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """``activation(a @ b + bias)``: [M, K] x [K, N] -> contiguous [M, N], all dimensions at least 1, any strides.

    Accumulates in float32 (float64 for float64) and rounds once. ``config`` overrides the table. The result is written
    to ``out`` if given, with ``add`` added to what is there, in the accumulators' dtype; and what it was before the
    activation to ``before``: contiguous, of M * N elements. Where there
    are few tiles and a long sum, the inner dimension is split; a second kernel adds up the partial results in a fixed
    order.
    """
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty((M, N)) if out is None else out
    aligned = (a.data_ptr() | b.data_ptr() | c.data_ptr()) % 16 == 0
    kind = a.device, a.dtype, input_precision(a)
    epilogue = bias is not None, activation, before is not None
    plan = product_plan(kind, (M, N, K), (a.stride(), b.stride()), aligned, epilogue, config, add)
    multiply(plan, a, b, bias, c, before)
    return c


Epilogue: TypeAlias = tuple[bool, Activation, bool]  # has a bias; its activation; its results before that are stored
NO_EPILOGUE: Final[Epilogue] = (False, NONE, False)


def constants_of(epilogue: Epilogue) -> dict[str, Any]:
    """The epilogue as the kernels' constants."""
    return dict(zip(("HAS_BIAS", "ACTIVATION", "SAVE_BEFORE"), epilogue, strict=True))


class ProductPlan(NamedTuple):
    """How a product is launched; if its sum is split, the shape [splits, M, N] of the ``parts``, and their addition."""

    product: Plan
    single: bool = False  # one launch, without tensor descriptors
    parts: tuple[int, ...] = ()
    parts_dtype: torch.dtype | None = None
    addition: Plan | None = None


def multiply(
    plan: ProductPlan, a: Tensor, b: Tensor, bias: Tensor | None, c: Tensor, before: Tensor | None = None
) -> None:
    """Write the product of ``a`` and ``b`` into the memory of ``c``, which is contiguous, and of ``before``."""
    # Without a bias any tensor will do: the kernel does not read it. Likewise it writes no results that nobody wants.
    bias, before = c if bias is None else bias.contiguous(), c if before is None else before
    if plan.single:
        launch(plan.product, a, b, bias, c, before)
    elif plan.addition is not None:
        partial = a.new_empty(plan.parts, dtype=plan.parts_dtype)
        launch(plan.product, a, b, c, partial, c)
        launch(plan.addition, partial, bias, c, before)
    else:
        contextvars.copy_context().run(launch_with_descriptors, plan.product, a, b, bias, c, before)


@planned
def product_plan(
    kind: Kind,
    sizes: tuple[int, int, int],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    aligned_addresses: bool,
    epilogue: Epilogue = NO_EPILOGUE,
    config: Tile | None = None,
    add: bool = False,
) -> ProductPlan:
    """The product of two matrices of ``sizes`` M, N, K and these ``strides``, and what follows before it is stored."""
    device, dtype, precision = kind
    (M, N, K), (a_strides, b_strides) = sizes, strides
    matrices = ((M, K), a_strides), ((K, N), b_strides), ((M, N), (N, 1))
    row_units = [row_unit(dtype, *matrix) if aligned_addresses else 1 for matrix in matrices]
    given, activation = config, epilogue[1]
    if config is None and all(unit * dtype.itemsize == 16 for unit in row_units):
        config = persistent_config(*kind, M, N)
    # Of sizes, kernels know only those along contiguous rows, which tell how wide an access can be: not a batch's.
    inner = 1 in (a_strides[1], b_strides[0])
    known = M if a_strides[0] == 1 else 1, N, K if inner else 1
    unit = math.gcd(*row_units[:2], K if a_strides[1] == 1 else M, K if b_strides[0] == 1 else N)
    config = config or matmul_config(*kind, M, N, unit * dtype.itemsize)
    if given is None and activation not in (NONE, RELU):
        config = narrowed(config, device)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    constants = constants_of(epilogue)
    if isinstance(config, PersistentConfig):
        product = Plan(
            persistent_matmul_kernel,
            (min(tiles, multiprocessors(device)),),
            M,
            N,
            K,
            max(a_strides),
            max(b_strides),
            A_TRANSPOSED=a_strides[0] == 1,
            B_TRANSPOSED=b_strides[0] == 1,
            ADD=add,
            INPUT_PRECISION=precision,
            GROUP_M=8,
            **constants,
            **config._asdict(),
        )
        return ProductPlan(product)

    units = units_of(dtype, *known, *a_strides, *b_strides)
    splits, _ = split(kind, tiles, triton.cdiv(K, config.BLOCK_K), M * N, (M + N) * K)
    single = splits == 1
    product = Plan(
        matmul_kernel,
        (tiles, splits),
        *(number // unit for number, unit in zip((M, N, K, *a_strides, *b_strides), units, strict=True)),
        UNITS=units,
        SPLIT=not single,
        ADD=add and single,
        INPUT_PRECISION=precision,
        EVEN_K=inner and K % config.BLOCK_K == 0,
        GROUP_M=8,
        **constants_of(epilogue if single else NO_EPILOGUE),
        **config._asdict(),
        **register_limit(device, dtype is torch.float32 and precision == "ieee"),
    )
    return with_addition(kind, product, (M, N), epilogue, add=add)


def split(kind: Kind, tiles: int, steps: int, result: int, operands: int) -> tuple[int, int]:
    """Into how many parts the sum of a product is split, and how many of its ``steps`` each but the last has.

    ``result`` and ``operands`` count elements.
    """
    exact, itemsize = accumulator_dtype(kind[1]).itemsize, kind[1].itemsize
    each = triton.cdiv(steps, inner_splits(kind[0], tiles, steps, result * exact, operands * itemsize))
    return triton.cdiv(steps, each), each  # none is empty


def with_addition(
    kind: Kind, product: Plan, shape: tuple[int, int], epilogue: Epilogue, positions: int = 0, add: bool = False
) -> ProductPlan:
    """The launches of a product [M, N] whose grid has one program for each tile and part of its sum.

    The result of several parts is [M, N], or, with the ``positions`` of a sample, [M / positions, N, positions].
    """
    splits, (M, N) = product.grid[1], shape
    if splits == 1:
        return ProductPlan(product, True)
    (unit,) = units_of(kind[1], N)
    block = 1024
    addition = Plan(
        sum_of_splits_kernel,
        (triton.cdiv(M * N, block),),
        splits,
        M,
        N // unit,
        positions,
        UNIT=unit,
        LAST=positions == 0,
        ADD=add,
        BLOCK=block,
        **constants_of(epilogue),
        **register_limit(kind[0]),
    )
    return ProductPlan(product, False, (splits, M, N), accumulator_dtype(kind[1]), addition)


def launch_with_descriptors(plan: Plan, *tensors: Tensor) -> None:
    """`launch` a kernel that makes tensor descriptors, in a copy of the thread's context that nobody uses afterwards.

    Triton asks its allocator, a context variable, for the descriptors' memory. The user's own allocator stays set
    outside of the copy; in the copy it is torch's caching allocator. Its memory may be freed at once, as allocation and
    launch are in the same stream, and a CUDA graph captures both.
    """
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    launch(plan, *tensors)
