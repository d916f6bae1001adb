"""Convolution in one, two or three dimensions, optionally with an activation f, as implicit matrix products.

Every tensor is seen in three spatial dimensions (the missing ones have size 1), channels last. With a position p of the
output, a tap k of the kernel, and x(p, k) the input position that tap k meets at p::

    y[p, o]    = f(z[p, o]), z[p, o] = sum over k, c of x[x(p, k), c] w[o, k, c] + b[o]
    gz         = gy f'(z)                            (`activation_backward`, which also sums the bias gradient)
    gx[i, c]   = sum over k, o of gz[p, o] w[o, k, c]       with p such that x(p, k) = i
    gw[o, k, c] = sum over p of gz[p, o] x[x(p, k), c]

Each is a matrix product whose one operand is gathered while it is loaded; taps that meet the padding load zeros. A step
of the inner loop lies within one tap where the channels are a multiple of its size. Where they are not (``FLAT``), its
lanes run over taps and channels as one dimension.

The gradient of the input is computed by *residue class*: the input positions i with equal ``i % stride`` meet the same
taps, a tap out of ``stride`` (over its common divisor with the dilation), so that no tap is loaded in vain.
Where a result has few tiles and long sums, these are split into parts, which a second kernel adds up in a fixed order:
no atomics. So are most gradients of weights, which are sums over positions.

A convolution of 1×1 with stride 1 is a linear layer over positions and runs as one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import activated
from .tiles import multiply_add, tile_positions

# Sizes that vary from one batch of images to the next, so that no kernel is made for some of them; but a size of 1 is.
_SIZES = [f"{tensor}_{side}" for tensor in ("input", "output") for side in ("depth", "height", "width")]


@triton.jit
def unravel(index, size):
    """Batch, depth, row and column of flat positions in [batch, *size]."""
    column = index % size[2]
    index = index // size[2]
    row = index % size[1]
    index = index // size[1]
    return index // size[0], index % size[0], row, column


@triton.jit
def quotient(index, divisor, magic, shift):
    """``index // divisor`` of int32 numbers from 0 on by a product with a `magic` number; as it is of int64, and by the
    constant 1."""
    if index.dtype == tl.int64 or isinstance(divisor, int):
        return index // divisor
    n = index.to(tl.uint32)
    product = tl.umulhi(n, tl.zeros_like(n) + tl.cast(magic, tl.uint32)) + n
    return (product >> tl.cast(shift, tl.uint32)).to(tl.int32)


@triton.jit
def unravel_by_magic(index, size, magic_height, shift_height, magic_width, shift_width):
    """`unravel`, for the inner loop: a division takes five times as many instructions as a product."""
    row = quotient(index, size[2], magic_width, shift_width)
    depth = quotient(row, size[1], magic_height, shift_height)
    return depth // size[0], depth % size[0], row - depth * size[1], index - row * size[2]


@triton.jit
def flat_position(batch, depth, row, column, size):
    """The reverse of `unravel`."""
    return ((batch * size[0] + depth) * size[1] + row) * size[2] + column


@triton.jit
def inside(depth, row, column, size):
    """Whether a position lies in the tensor, not in its padding."""
    return (depth >= 0) & (depth < size[0]) & (row >= 0) & (row < size[1]) & (column >= 0) & (column < size[2])


@triton.jit
def tap_and_channel(block, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Tap and channels of block number ``block`` of the dimension [taps, CHANNELS]: one tap unless FLAT."""
    if FLAT:
        lanes = block * BLOCK + tl.arange(0, BLOCK)
        return lanes // CHANNELS, lanes % CHANNELS
    else:
        BLOCKS: tl.constexpr = CHANNELS // BLOCK
        return tl.full((), 0, tl.int32) + block // BLOCKS, block % BLOCKS * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["steps_of_part", "positions"], do_not_specialize_on_alignment=_SIZES)
def conv_kernel(
    input_ptr,  # [batch, *input_size, channels], contiguous
    weight_ptr,  # [out_channels, REAL_CHANNELS, taps], of WEIGHT_STRIDES
    bias_ptr,  # [out_channels]
    output_ptr,  # [positions, out_channels], contiguous; [batch, out_channels, *output_size] if not OUTPUT_LAST;
    # [splits, positions, out_channels] if SPLIT
    before_ptr,  # [positions, out_channels], contiguous: the results before the activation, written if SAVE_BEFORE
    steps_of_part,  # of the sum over taps and channels, if SPLIT
    positions,
    input_depth,
    input_height,
    input_width,
    output_depth,
    output_height,
    output_width,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    REAL_CHANNELS: tl.constexpr,  # that the weight has: the others only pad the input
    WEIGHT_STRIDES: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,  # of a group
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_BEFORE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    LARGE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_M positions and BLOCK_N output channels of a group, the channels fastest; with SPLIT, one
    for each part of the sum over taps and channels too."""
    input_size = input_depth, input_height, input_width
    output_size = output_depth, output_height, output_width
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32
    POSITION: tl.constexpr = tl.int64 if LARGE else tl.int32
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    TILES_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N

    program = tl.program_id(0)
    tile_n = program % TILES_N
    group = program // TILES_N % GROUPS
    own_rows = (program // (TILES_N * GROUPS)).to(POSITION) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, own_columns = tile_positions(tile_n, OUT_CHANNELS, BLOCK_N, OUT_CHANNELS)
    columns += group * OUT_CHANNELS

    rows = tl.minimum(own_rows, positions - 1)
    batch, depth, row, column = unravel(rows[:, None], output_size)
    depth = depth * STRIDE[0] - PADDING[0]
    row = row * STRIDE[1] - PADDING[1]
    column = column * STRIDE[2] - PADDING[2]
    # What the first tap meets: it may lie in the padding.
    origin = flat_position(batch, depth, row, column, input_size)
    weight_rows = weight_ptr + columns[None, :] * WEIGHT_STRIDES[0]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    first_step, last_step = 0, (TAPS * CHANNELS + BLOCK_K - 1) // BLOCK_K
    if SPLIT:
        first_step = tl.program_id(1) * steps_of_part
        last_step = tl.minimum(first_step + steps_of_part, last_step)
        output_ptr += tl.program_id(1).to(tl.int64) * positions * (GROUPS * OUT_CHANNELS)
    for step in range(first_step, last_step):
        tap, channel = tap_and_channel(step, CHANNELS, BLOCK_K, FLAT)
        across = tap[None, :] if FLAT else tap
        d = across // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        r = across // KERNEL[2] % KERNEL[1] * DILATION[1]
        c = across % KERNEL[2] * DILATION[2]
        met = inside(depth + d, row + r, column + c, input_size)
        if FLAT:
            met &= across < TAPS
        position = tl.where(met, origin + flat_position(0, d, r, c, input_size), 0).to(tl.int64)
        x_ptrs = input_ptr + position * (GROUPS * CHANNELS) + (group * CHANNELS + channel)[None, :]
        x = tl.load(x_ptrs, mask=met, other=0.0)
        if FLAT or REAL_CHANNELS != CHANNELS:
            real = (tap < TAPS) & (channel < REAL_CHANNELS)
            offsets = tl.where(real, tap * WEIGHT_STRIDES[2] + channel * WEIGHT_STRIDES[1], 0)
            w = tl.load(weight_rows + offsets[:, None], mask=real[:, None], other=0.0)
        else:
            w = tl.load(weight_rows + (tap * WEIGHT_STRIDES[2] + channel * WEIGHT_STRIDES[1])[:, None])
        accumulator = multiply_add(x, w, accumulator, INPUT_PRECISION)

    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns).to(ACCUMULATOR)[None, :]
    own = own_rows < positions
    offsets = rows[:, None].to(tl.int64) * (GROUPS * OUT_CHANNELS) + columns[None, :]
    if SAVE_BEFORE:
        before = accumulator.to(output_ptr.dtype.element_ty)
        tl.store(before_ptr + offsets, before, mask=own[:, None] & own_columns[None, :])
    result = activated(accumulator, ACTIVATION).to(output_ptr.dtype.element_ty)
    if OUTPUT_LAST:
        tl.store(output_ptr + offsets, result, mask=own[:, None] & own_columns[None, :])
    else:
        size = output_depth * output_height * output_width
        outer = (rows // size).to(tl.int64) * (GROUPS * OUT_CHANNELS) * size + rows % size
        output_ptrs = output_ptr + outer[None, :] + columns[:, None] * size
        tl.store(output_ptrs, tl.trans(result), mask=own_columns[:, None] & own[None, :])


@triton.jit
def first_tap(residue, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
              STEP: tl.constexpr):  # fmt: skip
    """The first tap that meets input positions of this residue; KERNEL if none does. The others follow by STEP."""
    tap = tl.full((), KERNEL, tl.int32)
    for candidate in tl.static_range(STEP):
        meets = (residue + PADDING - (STEP - 1 - candidate) * DILATION) % STRIDE == 0
        tap = tl.where(meets, tl.minimum(STEP - 1 - candidate, KERNEL), tap)
    return tap


@triton.jit(do_not_specialize=["steps_of_part", "batch_size", "tiles_m"], do_not_specialize_on_alignment=_SIZES)
def conv_grad_input_kernel(
    grad_ptr,  # [positions, out_channels], contiguous
    weight_ptr,  # [out_channels, CHANNELS, taps], of WEIGHT_STRIDES
    output_ptr,  # [batch, *input_size, channels], contiguous; [batch, channels, *input_size] if not OUTPUT_LAST;
    # [splits, batch, *input_size, channels] if SPLIT
    steps_of_part,  # of the sum over taps and output channels, if SPLIT
    batch_size,
    tiles_m,
    input_depth,
    input_height,
    input_width,
    output_depth,
    output_height,
    output_width,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    WEIGHT_STRIDES: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,  # of a group
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,  # from one tap of a class to the next: STRIDE / gcd(STRIDE, DILATION)
    INPUT_PRECISION: tl.constexpr,
    LARGE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_M input positions of a residue class and BLOCK_N channels of a group, the class slowest;
    with SPLIT, one for each part of the sum over taps and output channels too."""
    input_size = input_depth, input_height, input_width
    output_size = output_depth, output_height, output_width
    ACCUMULATOR: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    POSITION: tl.constexpr = tl.int64 if LARGE else tl.int32
    TILES_N: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N

    program = tl.program_id(0)
    tile_n = program % TILES_N
    group = program // TILES_N % GROUPS
    tile_m = program // (TILES_N * GROUPS) % tiles_m
    residue = program // (TILES_N * GROUPS) // tiles_m
    depth0 = residue // (STRIDE[1] * STRIDE[2])
    row0 = residue // STRIDE[2] % STRIDE[1]
    column0 = residue % STRIDE[2]
    # The positions of the class, in each dimension.
    depths = (input_size[0] - depth0 + STRIDE[0] - 1) // STRIDE[0]
    rows_ = (input_size[1] - row0 + STRIDE[1] - 1) // STRIDE[1]
    columns_ = (input_size[2] - column0 + STRIDE[2] - 1) // STRIDE[2]
    members = depths.to(POSITION) * rows_ * columns_ * batch_size
    own_rows = tile_m.to(POSITION) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tile_m.to(POSITION) * BLOCK_M < members:
        columns, own_columns = tile_positions(tile_n, CHANNELS, BLOCK_N, CHANNELS)
        batch, depth, row, column = unravel(tl.minimum(own_rows, members - 1)[:, None], (depths, rows_, columns_))
        depth = depth * STRIDE[0] + depth0
        row = row * STRIDE[1] + row0
        column = column * STRIDE[2] + column0

        tap_d = first_tap(depth0, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], STEP[0])
        tap_r = first_tap(row0, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], STEP[1])
        tap_c = first_tap(column0, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2], STEP[2])
        taps_r = (KERNEL[1] - tap_r + STEP[1] - 1) // STEP[1]
        taps_c = (KERNEL[2] - tap_c + STEP[2] - 1) // STEP[2]
        taps = (KERNEL[0] - tap_d + STEP[0] - 1) // STEP[0] * taps_r * taps_c
        # What the first tap meets: these divisions leave no rest in a class that has taps.
        out_d = (depth + PADDING[0] - tap_d * DILATION[0]) // STRIDE[0]
        out_r = (row + PADDING[1] - tap_r * DILATION[1]) // STRIDE[1]
        out_c = (column + PADDING[2] - tap_c * DILATION[2]) // STRIDE[2]

        accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        first_step, last_step = 0, (taps * OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K
        if SPLIT:
            first_step = tl.program_id(1) * steps_of_part
            last_step = tl.minimum(first_step + steps_of_part, last_step)
            size = input_depth * input_height * input_width
            output_ptr += tl.program_id(1).to(tl.int64) * batch_size * size * (GROUPS * CHANNELS)
        for step in range(first_step, last_step):
            number, channel = tap_and_channel(step, OUT_CHANNELS, BLOCK_K, FLAT)
            if FLAT:
                real = number < taps
                number = tl.where(real, number, 0)
            d = number // (taps_r * taps_c)
            r = number // taps_c % taps_r
            c = number % taps_c
            tap = ((tap_d + d * STEP[0]) * KERNEL[1] + tap_r + r * STEP[1]) * KERNEL[2] + tap_c + c * STEP[2]
            out_channel = group * OUT_CHANNELS + channel
            w_ptrs = weight_ptr + out_channel[:, None].to(tl.int64) * WEIGHT_STRIDES[0]
            w_ptrs += (columns * WEIGHT_STRIDES[1])[None, :]
            if FLAT:
                d, r, c = d[None, :], r[None, :], c[None, :]
                w = tl.load(w_ptrs + tap[:, None] * WEIGHT_STRIDES[2], mask=real[:, None], other=0.0)
            else:
                w = tl.load(w_ptrs + tap * WEIGHT_STRIDES[2])
            out_depth = out_d - d * (STEP[0] * DILATION[0] // STRIDE[0])
            out_row = out_r - r * (STEP[1] * DILATION[1] // STRIDE[1])
            out_column = out_c - c * (STEP[2] * DILATION[2] // STRIDE[2])
            met = inside(out_depth, out_row, out_column, output_size)
            if FLAT:
                met &= real[None, :]
            position = tl.where(met, flat_position(batch, out_depth, out_row, out_column, output_size), 0)
            grad_ptrs = grad_ptr + position.to(tl.int64) * (GROUPS * OUT_CHANNELS) + out_channel[None, :]
            grad = tl.load(grad_ptrs, mask=met, other=0.0)
            accumulator = multiply_add(grad, w, accumulator, INPUT_PRECISION)

        result = accumulator.to(output_ptr.dtype.element_ty)
        own = own_rows < members
        columns += group * CHANNELS
        if OUTPUT_LAST:
            position = flat_position(batch, depth, row, column, input_size).to(tl.int64)
            output_ptrs = output_ptr + position * (GROUPS * CHANNELS) + columns[None, :]
            tl.store(output_ptrs, result, mask=own[:, None] & own_columns[None, :])
        else:
            size = input_depth * input_height * input_width
            outer = batch.to(tl.int64) * (GROUPS * CHANNELS) * size
            outer += flat_position(0, depth, row, column, input_size)
            output_ptrs = output_ptr + tl.trans(outer) + columns[:, None] * size
            tl.store(output_ptrs, tl.trans(result), mask=own_columns[:, None] & own[None, :])


@triton.jit(
    do_not_specialize=[
        "positions",
        "positions_per_split",
        "magic_height",
        "shift_height",
        "magic_width",
        "shift_width",
    ],
    do_not_specialize_on_alignment=_SIZES,
)
def conv_grad_weight_kernel(
    grad_ptr,  # [positions, out_channels], contiguous
    input_ptr,  # [batch, *input_size, channels], contiguous
    output_ptr,  # [splits, out_channels, taps, CHANNELS] if SPLIT; [out_channels, REAL_CHANNELS, taps], OUTPUT_STRIDES
    positions,
    positions_per_split,
    input_depth,
    input_height,
    input_width,
    output_depth,
    output_height,
    output_width,
    magic_height,
    shift_height,
    magic_width,
    shift_width,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group
    REAL_CHANNELS: tl.constexpr,  # without those that only pad
    OUTPUT_STRIDES: tl.constexpr,
    SPLIT: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,  # of a group
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    LARGE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_M output channels, BLOCK_N taps and channels, group and part of the positions.

    The sum of the only part is the gradient itself; those of several are added up by `conv_sum_of_splits_kernel`.
    """
    input_size = input_depth, input_height, input_width
    ACCUMULATOR: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    POSITION: tl.constexpr = tl.int64 if LARGE else tl.int32
    INNER: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2] * CHANNELS
    TILES_M: tl.constexpr = (OUT_CHANNELS + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N

    program = tl.program_id(0)
    tile_m = program % TILES_M
    tile_n = program // TILES_M % TILES_N
    group = program // (TILES_M * TILES_N) % GROUPS
    split = program // (TILES_M * TILES_N * GROUPS)
    rows, own_rows = tile_positions(tile_m, OUT_CHANNELS, BLOCK_M, OUT_CHANNELS)
    rows += group * OUT_CHANNELS
    tap, channel = tap_and_channel(tile_n, CHANNELS, BLOCK_N, FLAT)
    across = tap[None, :] if FLAT else tap
    d = across // (KERNEL[1] * KERNEL[2]) * DILATION[0] - PADDING[0]
    r = across // KERNEL[2] % KERNEL[1] * DILATION[1] - PADDING[1]
    c = across % KERNEL[2] * DILATION[2] - PADDING[2]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    start = split.to(POSITION) * positions_per_split
    end = tl.minimum(start + positions_per_split, positions)
    for first in range(start, end, BLOCK_K):
        own = first + tl.arange(0, BLOCK_K)
        position = tl.minimum(own, end - 1)
        grad_ptrs = grad_ptr + position[None, :].to(tl.int64) * (GROUPS * OUT_CHANNELS) + rows[:, None]
        grad = tl.load(grad_ptrs, mask=(own < end)[None, :], other=0.0)
        batch, depth, row, column = unravel_by_magic(
            position[:, None],
            (output_depth, output_height, output_width),  # a variable would hold a constant 1 as a number
            magic_height,
            shift_height,
            magic_width,
            shift_width,
        )
        depth = depth * STRIDE[0] + d
        row = row * STRIDE[1] + r
        column = column * STRIDE[2] + c
        met = inside(depth, row, column, input_size) & (own < end)[:, None]
        if FLAT:
            met &= across * CHANNELS < INNER
        position = tl.where(met, flat_position(batch, depth, row, column, input_size), 0).to(tl.int64)
        x_ptrs = input_ptr + position * (GROUPS * CHANNELS) + (group * CHANNELS + channel)[None, :]
        x = tl.load(x_ptrs, mask=met, other=0.0)
        accumulator = multiply_add(grad, x, accumulator, INPUT_PRECISION)

    if SPLIT:
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        own_columns = column < INNER
        output_rows = (split.to(tl.int64) * (GROUPS * OUT_CHANNELS) + rows) * INNER
    else:
        column = channel * OUTPUT_STRIDES[1] + tap * OUTPUT_STRIDES[2]
        own_columns = (channel < REAL_CHANNELS) & (tap * CHANNELS < INNER)
        output_rows = rows * OUTPUT_STRIDES[0]
    output_ptrs = output_ptr + output_rows[:, None] + column[None, :]
    tl.store(output_ptrs, accumulator.to(output_ptr.dtype.element_ty), mask=own_rows[:, None] & own_columns[None, :])


@triton.jit(do_not_specialize=["splits"])
def conv_sum_of_splits_kernel(
    partial_ptr,  # [splits, out_channels, TAPS, CHANNELS], contiguous
    output_ptr,  # [out_channels, channels, taps], any strides
    splits,
    size,
    channels,  # without the channels that only pad
    output_channel_stride,
    channel_stride,
    tap_stride,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements of the weight's gradient: the sum of its parts, one after the other."""
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.minimum(own, size - 1)
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for _ in range(0, splits):
        total += tl.load(partial_ptr + index)
        index += size
    index = tl.minimum(own, size - 1)
    channel = index % CHANNELS
    offsets = index // (TAPS * CHANNELS) * output_channel_stride + channel * channel_stride
    offsets += index // CHANNELS % TAPS * tap_stride
    own_element = (own < size) & (channel < channels)
    tl.store(output_ptr + offsets, total.to(output_ptr.dtype.element_ty), mask=own_element)
