"""Linear layer, optionally with ReLU: a matrix product and one pass over the output gradient.

With input ``x`` [M, K], weight ``w`` [N, K] and bias ``b`` [N]::

    y  = relu(x w^T + b)                     forward:     matmul, bias and ReLU in the epilogue
    gz = gy where not y <= 0, else 0         relu_mask_and_column_sum: gz and the partial sums of gb in one pass
    gx = gz w,   gw = gz^T x,   gb = sum over rows of gz

Both backward products are the forward's again, on transposed views. Masking inside the products would read less but
would starve the matrix units (the mask would run in the inner loop of both), so it is a pass of its own. A product has
two kernels: one with pointers, which takes everything, and a persistent one with tensor descriptors, for large and
aligned matrices where the GPU has descriptors.

``y <= 0`` and not ``y > 0``: torch's ReLU keeps NaN and lets its gradient through.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    MatmulConfig,
    PersistentConfig,
    inner_splits,
    matmul_config,
    multiprocessors,
    persistent_config,
    planned,
    register_limit,
)
from .launch import Plan, accumulator_dtype, input_precision, launch, reshaped


@triton.jit
def tile_start(index, size, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """First position, in int64, of tile number ``index`` along a dimension of ``size``.

    The last tile is moved back to end at the edge, so that no load leaves the tensor and none needs a mask.
    ``ALIGNMENT`` is a power of two that divides ``size`` and ``BLOCK``, or 0 if ``size`` < ``BLOCK``.
    """
    if ALIGNMENT == 0:
        return tl.full((), 0, tl.int64)
    return tl.multiple_of(tl.minimum(index * BLOCK, size - BLOCK).to(tl.int64), ALIGNMENT)


@triton.jit
def tile_lanes(size, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Positions inside a tile; those past the edge of a dimension smaller than the tile repeat its last element."""
    lanes = tl.arange(0, BLOCK)
    if ALIGNMENT == 0:
        lanes = tl.minimum(lanes, size - 1)
    return lanes


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
    first_step,
    last_step,
    K,
    stride_ak,
    stride_bk,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile [BLOCK_M, BLOCK_N] of A B from some of its steps of BLOCK_K, in the accumulators' dtype."""
    ACCUMULATOR: tl.constexpr = tl.float64 if a_ptrs.dtype.element_ty == tl.float64 else tl.float32

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for step in range(first_step, last_step):
        start = tile_start(step, K, BLOCK_K, ALIGNMENT_K)
        if EVEN_K:
            a = tl.load(a_ptrs + start * stride_ak)
            b = tl.load(b_ptrs + start * stride_bk)
        else:
            # The last step starts early: what the step before has seen counts as zero, and so does a repeated element.
            if ALIGNMENT_K == 0:
                fresh = tl.arange(0, BLOCK_K) < K
            else:
                fresh = start + tl.arange(0, BLOCK_K) >= step * BLOCK_K
            a = tl.load(a_ptrs + start * stride_ak, mask=fresh[None, :], other=0.0)
            b = tl.load(b_ptrs + start * stride_bk, mask=fresh[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION, out_dtype=ACCUMULATOR)
    return accumulator


@triton.jit
def with_bias_and_relu(accumulator, bias_ptr, columns, inside, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    """What follows a product, before it is rounded. Columns that are not ``inside`` have no meaning; None: all are."""
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns, mask=inside).to(accumulator.dtype)[None, :]
    if RELU:
        accumulator = tl.where(accumulator <= 0, 0.0, accumulator)
    return accumulator


@triton.jit
def matmul_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    bias_ptr,  # [N]
    c_ptr,  # [M, N], contiguous; [splits, M, N] if SPLIT
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT_M: tl.constexpr,
    ALIGNMENT_N: tl.constexpr,
    ALIGNMENT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program per tile of C = relu(A B + bias); with SPLIT one for each part of the inner dimension too."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)

    rows = tile_start(tile_m, M, BLOCK_M, ALIGNMENT_M) + tile_lanes(M, BLOCK_M, ALIGNMENT_M)
    columns = tile_start(tile_n, N, BLOCK_N, ALIGNMENT_N) + tile_lanes(N, BLOCK_N, ALIGNMENT_N)
    inner = tile_lanes(K, BLOCK_K, ALIGNMENT_K).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak
    b_ptrs = b_ptr + inner[:, None] * stride_bk + columns[None, :] * stride_bn

    first_step, last_step = 0, tl.cdiv(K, BLOCK_K)
    if SPLIT:
        split = tl.program_id(1)
        steps = tl.cdiv(last_step, tl.num_programs(1))
        first_step, last_step = split * steps, tl.minimum((split + 1) * steps, last_step)
        c_ptr += split.to(tl.int64) * M * N
    accumulator = product_tile(
        a_ptrs,
        b_ptrs,
        first_step,
        last_step,
        K,
        stride_ak,
        stride_bk,
        INPUT_PRECISION,
        ALIGNMENT_K,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    accumulator = with_bias_and_relu(accumulator, bias_ptr, columns, None, HAS_BIAS, RELU)
    own_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M) < M if ALIGNMENT_M == 0 else rows >= tile_m * BLOCK_M
    own_columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N) < N if ALIGNMENT_N == 0 else columns >= tile_n * BLOCK_N
    c_ptrs = c_ptr + rows[:, None] * N + columns[None, :]
    tl.store(c_ptrs, accumulator.to(c_ptr.dtype.element_ty), mask=own_rows[:, None] & own_columns[None, :])


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
def persistent_matmul_kernel(
    a_ptr,  # [M, K], [K, M] if A_TRANSPOSED: rows contiguous, each from a multiple of 16 bytes
    b_ptr,  # [K, N], [N, K] if B_TRANSPOSED, likewise
    bias_ptr,  # [N]
    c_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    stride_a,
    stride_b,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """C = relu(A B + bias), one tile after the other, as many at a time as there are programs.

    The steps and the epilogue are `matmul_kernel`'s, and so are the bits, unless K is larger than BLOCK_K and no
    multiple of it: there the last step of `matmul_kernel` starts early.
    """
    ACCUMULATOR: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    COLUMNS: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N  # that are stored at once

    a_tiles = tensor_descriptor(a_ptr, M, K, stride_a, A_TRANSPOSED, BLOCK_M, BLOCK_K)
    b_tiles = tensor_descriptor(b_ptr, K, N, stride_b, B_TRANSPOSED, BLOCK_K, BLOCK_N)
    c_tiles = tensor_descriptor(c_ptr, M, N, N, False, BLOCK_M, COLUMNS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        for step in range(0, tl.cdiv(K, BLOCK_K)):
            a = described_tile(a_tiles, row, step * BLOCK_K, A_TRANSPOSED)
            b = described_tile(b_tiles, step * BLOCK_K, column, B_TRANSPOSED)
            accumulator = tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION, out_dtype=ACCUMULATOR)

        columns = column + tl.arange(0, COLUMNS)
        inside = columns < N
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, COLUMNS)), (0, 2, 1)))
            left = with_bias_and_relu(left, bias_ptr, columns, inside, HAS_BIAS, RELU)
            c_tiles.store([row, column], left.to(c_ptr.dtype.element_ty))
            columns += COLUMNS
            inside = columns < N
            right = with_bias_and_relu(right, bias_ptr, columns, inside, HAS_BIAS, RELU)
            c_tiles.store([row, column + COLUMNS], right.to(c_ptr.dtype.element_ty))
        else:
            accumulator = with_bias_and_relu(accumulator, bias_ptr, columns, inside, HAS_BIAS, RELU)
            c_tiles.store([row, column], accumulator.to(c_ptr.dtype.element_ty))


@triton.jit
def sum_of_splits_kernel(
    partial_ptr,  # [splits, M, N], contiguous
    bias_ptr,  # [N]
    c_ptr,  # [M, N], contiguous
    splits,
    size,
    N,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements of C: relu(the sum of its parts, one after the other, + bias)."""
    program = tl.program_id(0)
    elements = tile_start(program, size, BLOCK, ALIGNMENT) + tile_lanes(size, BLOCK, ALIGNMENT)
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for split in range(0, splits):  # of few tiles: no offset needs 64 bits
        total += tl.load(partial_ptr + split * size + elements)
    if HAS_BIAS:
        total += tl.load(bias_ptr + elements % N).to(total.dtype)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)
    own = tl.arange(0, BLOCK) < size if ALIGNMENT == 0 else elements >= program * BLOCK
    tl.store(c_ptr + elements, total.to(c_ptr.dtype.element_ty), mask=own)


def alignment(size: int, block: int) -> int:
    """The `tile_start` alignment of a dimension: up to 16, as Triton itself assumes of divisible arguments."""
    if size < block:
        return 0
    return 16 if size % 16 == 0 else 1


def is_aligned(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a matrix has rows or columns that are contiguous, do not overlap, and begin at multiples of 16 bytes.

    They do if the first one does.
    """
    if 1 not in strides:
        return False
    inner = strides.index(1)
    stride = strides[1 - inner]
    return stride % 8 == 0 and stride >= shape[inner]


def at_multiples_of_16(*tensors: Tensor) -> bool:
    """Whether all tensors' addresses are, in bytes."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % 16 == 0


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    config: MatmulConfig | PersistentConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``relu(a @ b + bias)``: [M, K] x [K, N] -> contiguous [M, N], all dimensions at least 1, any strides.

    Accumulates in float32 (float64 for float64) and rounds once. ``config`` overrides the table; ``out``, contiguous,
    is written to. Where there are few tiles and a long sum it goes in parts, which a second pass adds up in order.
    """
    shape, columns, has_bias = a.shape, b.shape[1], bias is not None
    c = a.new_empty((shape[0], columns)) if out is None else out
    plan = product_plan(
        a.device,
        a.dtype,
        (shape[0], columns, shape[1]),
        a.stride(),
        b.stride(),
        at_multiples_of_16(a, b, c),
        has_bias,
        relu,
        input_precision(a),
        config,
    )
    bias = c if bias is None else bias.contiguous()
    if plan.addition is not None:
        partial = a.new_empty(plan.parts, dtype=accumulator_dtype(a.dtype))
        launch(plan.product, a, b, c, partial)
        launch(plan.addition, partial, bias, c)
    elif plan.product.kernel is persistent_matmul_kernel:
        launch_with_descriptors(plan.product, a, b, bias, c)
    else:
        launch(plan.product, a, b, bias, c)
    return c


class ProductPlan(NamedTuple):
    """The launch of a product; if it goes in ``parts`` [splits, M, N] that of their ``addition`` too."""

    product: Plan
    parts: tuple[int, ...] = ()
    addition: Plan | None = None


@planned
def product_plan(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    a_strides: tuple[int, ...],
    b_strides: tuple[int, ...],
    aligned_addresses: bool,
    has_bias: bool,
    relu: bool,
    precision: str,
    config: MatmulConfig | PersistentConfig | None,
) -> ProductPlan:
    """`matmul` of matrices with these strides and ``sizes`` M, N, K."""
    M, N, K = sizes
    aligned = aligned_addresses and is_aligned((M, K), a_strides) and is_aligned((K, N), b_strides)
    if config is None and aligned and is_aligned((M, N), (N, 1)):
        config = persistent_config(device, dtype, precision, M, N)
    config = config or matmul_config(device, dtype, precision, M, N, aligned)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    constants = {"HAS_BIAS": has_bias, "RELU": relu}
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
            INPUT_PRECISION=precision,
            GROUP_M=8,
            **constants,
            **config._asdict(),
        )
        return ProductPlan(product)

    steps, exact = triton.cdiv(K, config.BLOCK_K), accumulator_dtype(dtype)
    splits = inner_splits(device, tiles, steps, M * N * exact.itemsize, (M + N) * K * dtype.itemsize)
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none is empty
    whole = splits == 1
    product = Plan(
        matmul_kernel,
        (tiles, splits),
        M,
        N,
        K,
        *a_strides,
        *b_strides,
        SPLIT=not whole,
        INPUT_PRECISION=precision,
        ALIGNMENT_M=alignment(M, config.BLOCK_M),
        ALIGNMENT_N=alignment(N, config.BLOCK_N),
        ALIGNMENT_K=alignment(K, config.BLOCK_K),
        EVEN_K=K % config.BLOCK_K == 0,
        GROUP_M=8,
        **(constants if whole else dict.fromkeys(constants, False)),
        **config._asdict(),
        **register_limit(device),
    )
    if whole:
        return ProductPlan(product)
    block = 1024
    addition = Plan(
        sum_of_splits_kernel,
        (triton.cdiv(M * N, block),),
        splits,
        M * N,
        N,
        ALIGNMENT=alignment(M * N, block),
        BLOCK=block,
        **constants,
        **register_limit(device),
    )
    return ProductPlan(product, (splits, M, N), addition)


def launch_with_descriptors(plan: Plan, *tensors: Tensor) -> None:
    """`launch` a kernel that makes tensor descriptors: Triton gets their memory from torch's caching allocator.

    Triton keeps its allocator in a context variable. It is set in a copy of the context, so that the user's own stays.
    Allocation and launch are in the same stream: the memory may go back at once, and a CUDA graph captures both.
    """

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        launch(plan, *tensors)

    contextvars.copy_context().run(run)


@triton.jit
def relu_mask_and_column_sum_kernel(
    grad_ptr,  # [M, N]
    output_ptr,  # [M, N], contiguous
    masked_ptr,  # [M, N], contiguous
    sum_ptr,  # [programs along M, N], contiguous
    M,
    N,
    grad_row_stride,
    grad_column_stride,
    ROWS_PER_PROGRAM,
    MASK: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNMENT_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per ROWS_PER_PROGRAM x BLOCK_N strip: masked = grad where not output <= 0, and its column sums."""
    ACCUMULATOR: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32

    strip = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    columns = tile_start(tile, N, BLOCK_N, ALIGNMENT_N) + tile_lanes(N, BLOCK_N, ALIGNMENT_N)
    own_columns = tl.arange(0, BLOCK_N) < N if ALIGNMENT_N == 0 else columns >= tile * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for step in range(0, ROWS_PER_PROGRAM, BLOCK_M):
        rows = strip * ROWS_PER_PROGRAM + step + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None]
        safe_rows = tl.where(rows < M, rows, 0)[:, None]
        grad_ptrs = grad_ptr + safe_rows * grad_row_stride + columns[None, :] * grad_column_stride
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        if MASK:
            offsets = safe_rows * N + columns[None, :]
            output = tl.load(output_ptr + offsets, mask=inside, other=0.0)
            grad = tl.where(output <= 0, 0.0, grad).to(grad_ptr.dtype.element_ty)
            tl.store(masked_ptr + offsets, grad, mask=inside & own_columns[None, :])
        if SUM:
            total += grad.to(ACCUMULATOR)
    if SUM:
        tl.store(sum_ptr + strip * N + columns, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=own_columns)


def relu_mask_and_column_sum(grad: Tensor, output: Tensor | None, need_sum: bool) -> tuple[Tensor, Tensor | None]:
    """``(gz, gb)`` of the module's formulas, [M, N] and [N]. Without ``output`` there is no ReLU: ``gz`` is ``grad``.

    The sum over rows takes two stages, strips of rows and then the strips, in a fixed order: no atomics.
    """
    mask, shape = output is not None, grad.shape
    if not (mask or need_sum):
        return grad, None
    plan = column_sum_plan(grad.device, shape, grad.stride(), mask, need_sum)
    strips = plan.grid[1]
    masked = grad.new_empty(shape) if mask else grad
    sum_dtype = grad.dtype if strips == 1 else accumulator_dtype(grad.dtype)
    sums = grad.new_empty((strips, shape[1]), dtype=sum_dtype) if need_sum else masked
    launch(plan, grad, grad if output is None else output.contiguous(), masked, sums)
    if not need_sum:
        return masked, None
    if strips == 1:
        return masked, sums[0]
    _, total = relu_mask_and_column_sum(sums, None, True)
    assert total is not None
    return masked, total.to(grad.dtype)


@planned
def column_sum_plan(
    device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], mask: bool, need_sum: bool
) -> Plan:
    """`relu_mask_and_column_sum`, as many programs along the second axis as there are strips."""
    M, N = shape
    block_m, block_n = 16, 128  # short chains of additions: as exact as torch's own sum
    if device.type == "cpu":  # the interpreter: few large tiles, none much larger than the tensor
        block_n = min(1024, triton.next_power_of_2(N))
    steps = min(max(4, triton.cdiv(triton.cdiv(M, 128), block_m)), triton.cdiv(M, block_m))
    rows_per_program = steps * block_m
    return Plan(
        relu_mask_and_column_sum_kernel,
        (triton.cdiv(N, block_n), triton.cdiv(M, rows_per_program)),
        M,
        N,
        *strides,
        rows_per_program,
        MASK=mask,
        SUM=need_sum,
        ALIGNMENT_N=alignment(N, block_n),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        **register_limit(device),
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``relu(input @ weight.T + bias)``: [..., K], [N, K], [N] -> [..., N], no dimension empty."""
    output = matmul(input.reshape(-1, input.shape[-1]), weight.t(), bias, relu)
    return reshaped(output, (*input.shape[:-1], weight.shape[0]))


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``output`` is the forward's result if it had a ReLU, else None.
    """
    N = grad_output.shape[-1]
    grad, grad_bias = relu_mask_and_column_sum(
        grad_output.reshape(-1, N), None if output is None else output.reshape(-1, N), need_bias
    )
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = reshaped(matmul(grad, weight), (*grad_output.shape[:-1], weight.shape[1]))
    if input is not None:
        grad_weight = matmul(grad.t(), input.reshape(-1, input.shape[-1]))
    return grad_input, grad_weight, grad_bias
