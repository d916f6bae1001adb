"""Batch norm with an activation f, or with a sum and f: one or three launches each way in training.

With x the input, n values of it in each channel, their mean m and (biased) variance v, or the running ones in
evaluation, weight w, bias b, residual r, output y and its gradient g::

    s  = 1 / sqrt(v + eps)
    y  = f(z),  z = (x - m) (w s) + b + r
    gz = g f'(z),    gr = gz
    gb = sum of gz,    gw = s * sum of gz (x - m)
    gx = w s (gz - gb / n - (x - m) s gw / n) in training, w s gz in evaluation

One kernel for each pass serves both layouts: tiles are [positions, channels] where channels are last, ``LAST``, else
[channels, positions]. The second dimension is the contiguous one. Samples of few positions, [N, C, positions], go as
[N, C x positions] with channels last, ``FOLD`` columns of a channel beside each other. Every tile lies inside the
tensor (`covering_tile`), so that no access has a mask. A *unit* is one tile of positions; a program has a tile of
channels and a *strip* of several units. How many strips there are depends on the sizes alone: sums have the same bits
on every GPU.

Where channels have few positions, one strip has them all, ``WHOLE``: the kernel that writes the output first finds the
statistics itself, and the one that writes the input's gradient first sums. A tile then goes on from one sample to the
next. No thread reads what another one wrote.

The variance never comes from a difference of large numbers: each lane of a tile sums x - k and (x - k)^2 with k its own
first element. Lanes, then strips, are merged as (count, mean, sum of squares around the mean), the mean in two steps.
torch adds float32 up in float64 on a CPU: here lanes are merged in that.

The backward pass computes z, or y, again, as the forward pass did, for the slope of the activation. With a residual it
reads a bit for each element that a ReLU let through, or the output where the bits of a row would not fill bytes or the
slope is had from that, else the residual.

The running statistics move in the last launch of the forward pass: if a kernel cannot be compiled, none has moved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import activated, gradient_before
from .tiles import covering_tile


@triton.jit
def over_channels(vector, LAST: tl.constexpr):
    """A vector over channels, as part of a tile."""
    if LAST:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def over_positions(vector, LAST: tl.constexpr):
    """A vector over positions, as part of a tile."""
    if LAST:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def tile_of(
    unit,
    channel,
    inner,
    outer,
    channels,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Offsets of the rows of a unit, those of the lanes in a row, and which positions are met for the first time."""
    UNIT_P: tl.constexpr = ALIGN_P if ALIGN_P > 0 else -ALIGN_P
    UNIT_C: tl.constexpr = ALIGN_C if ALIGN_C > 0 else -ALIGN_C
    tiles = (inner + BLOCK_P - 1) // BLOCK_P
    even = inner // UNIT_P * UNIT_P  # equals inner, but the compiler sees that UNIT_P divides it
    if LAST:
        position, fresh = covering_tile(unit, inner, BLOCK_P, ALIGN_P)
        return position * (channels // UNIT_C * UNIT_C), channel, fresh
    elif WHOLE:
        position, fresh = covering_tile(unit, outer * inner, BLOCK_P, ALIGN_P)
        position = position.to(tl.int32)
        return channel * even, (position // even).to(tl.int64) * channels * even + position % even, fresh
    else:
        position, fresh = covering_tile(unit % tiles, inner, BLOCK_P, ALIGN_P)
        return ((unit // tiles).to(tl.int64) * channels + channel) * even, position, fresh


@triton.jit
def positions_before(unit, inner, outer, BLOCK_P: tl.constexpr):
    """How many positions lie in the units before this one."""
    tiles = (inner + BLOCK_P - 1) // BLOCK_P
    unit = tl.minimum(unit, outer * tiles)
    return (unit // tiles).to(tl.int64) * inner + tl.minimum(unit % tiles * BLOCK_P, inner)


@triton.jit
def strip_of(steps, inner, outer, BLOCK_P: tl.constexpr):
    """The first unit of this program's strip of ``steps`` units, and the one behind the last."""
    begin = tl.program_id(1) * steps
    return begin, tl.minimum(begin + steps, outer * ((inner + BLOCK_P - 1) // BLOCK_P))


@triton.jit
def statistics_of(
    begin,
    end,
    channel,
    x_ptr,
    inner,
    outer,
    channels,
    EXACT: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The mean of a strip, and its sum of squares around that, for each channel."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 0 if LAST else 1
    row, lane, fresh = tile_of(begin, channel, inner, outer, channels, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P)
    k = tl.load(x_ptr + (row[:, None] + lane[None, :])).to(ACC)
    first = tl.zeros_like(k)
    second = tl.zeros_like(k)
    count = tl.zeros((BLOCK_P,), ACC)
    for unit in range(begin, end):
        row, lane, fresh = tile_of(unit, channel, inner, outer, channels, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P)
        x = tl.load(x_ptr + (row[:, None] + lane[None, :])).to(ACC)
        d = tl.where(over_positions(fresh, LAST), x - k, 0.0)
        first += d
        second += d * d
        count += fresh.to(ACC)
    n = over_positions(count, LAST)
    total = tl.sum(count, 0)
    off = first / tl.maximum(n, 1.0)
    local = k + off
    near = tl.sum(n * local, AXIS) / total  # about the mean
    e = k - over_channels(near, LAST) + off  # not from the rounded local mean
    squares = tl.sum(second - first * off + n * e * e, AXIS)
    d = k.to(EXACT) - over_channels(near.to(EXACT), LAST) + off
    correction = tl.sum(n * d, AXIS) / total
    return near + correction, squares - (total * correction * correction).to(ACC)


@triton.jit
def statistics_kernel(
    x_ptr,  # [outer, channels, inner], or [inner, channels] if LAST
    partial_ptr,  # [2, strips, channels]: mean of a strip, and its sum of squares around that
    inner,
    outer,
    channels,
    steps,
    LAST: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C channels and strip of ``steps`` units."""
    EXACT: tl.constexpr = partial_ptr.dtype.element_ty
    channel, own = covering_tile(tl.program_id(0), channels, BLOCK_C, ALIGN_C)
    begin, end = strip_of(steps, inner, outer, BLOCK_P)
    mean, squares = statistics_of(
        begin, end, channel, x_ptr, inner, outer, channels, EXACT, LAST, False, ALIGN_P, ALIGN_C, BLOCK_P
    )
    partial_ptrs = partial_ptr + tl.program_id(1) * channels + channel
    tl.store(partial_ptrs, mean, mask=own)
    tl.store(partial_ptrs + tl.num_programs(1) * channels, squares, mask=own)


@triton.jit
def part_of(start, channel, strips, channels, FOLD: tl.constexpr, BLOCK_S: tl.constexpr):
    """Strips of BLOCK_S partial results from ``start`` on, which of these exist, and their offsets for each channel."""
    part = start + tl.arange(0, BLOCK_S)
    real = (part < strips * FOLD)[:, None]
    part = tl.minimum(part, strips * FOLD - 1)
    strip = part // FOLD
    return strip, real, (strip * channels * FOLD + part % FOLD)[:, None] + channel[None, :] * FOLD


@triton.jit
def moved(pointers, value, momentum, inside):
    """Move running statistics towards ``value``, in the dtype of that."""
    old = tl.load(pointers).to(value.dtype)
    new = old * (1 - momentum).to(value.dtype) + value * momentum.to(value.dtype)
    tl.store(pointers, new.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def inverse_deviation(variance, EPS: tl.constexpr):
    """``1 / sqrt(variance + EPS)``, each step rounded to nearest."""
    if variance.dtype == tl.float64:
        return 1.0 / tl.sqrt(variance + EPS)
    else:
        return tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(variance + EPS))


@triton.jit
def of_a_sample(variance, total):
    """The variance of all, estimated from that of ``total`` values."""
    return variance * (total / (total - 1))


@triton.jit
def merge_statistics_kernel(
    partial_ptr,  # [2, strips, channels x FOLD]
    mean_ptr,  # [channels]
    inverse_ptr,  # [channels]: 1 / standard deviation
    unbiased_ptr,  # [channels]: the variance of all, estimated from the batch, written if TRACK
    strips,
    inner,
    outer,
    channels,
    steps,
    EPS: tl.constexpr,
    TRACK: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C channels."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    channel = tl.minimum(channel, channels - 1)
    total = (tl.full((), FOLD, tl.int64) * outer * inner).to(ACC)
    mean = tl.zeros((BLOCK_C,), ACC)
    squares = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    for step in tl.static_range(2):  # the mean, then what it is off by and the squares around it
        weighted = tl.zeros((BLOCK_S, BLOCK_C), ACC)
        for start in range(0, strips * FOLD, BLOCK_S):
            strip, real, offsets = part_of(start, channel, strips, channels, FOLD, BLOCK_S)
            end = positions_before((strip + 1) * steps, inner, outer, BLOCK_P)
            n = (end - positions_before(strip * steps, inner, outer, BLOCK_P)).to(ACC)[:, None]
            d = tl.where(real, tl.load(partial_ptr + offsets) - mean[None, :], 0.0)
            weighted += n * d
            if step == 1:
                own = tl.load(partial_ptr + (offsets + strips * channels * FOLD))
                squares += tl.where(real, own + n * d * d, 0.0)
        correction = tl.sum(weighted, 0) / total
        mean += correction
        if step == 1:
            variance = (tl.sum(squares, 0) - total * correction * correction) / total
            tl.store(mean_ptr + channel, mean, mask=inside)
            tl.store(inverse_ptr + channel, inverse_deviation(variance, EPS), mask=inside)
            if TRACK:
                tl.store(unbiased_ptr + channel, of_a_sample(variance, total), mask=inside)


@triton.jit
def coefficients(
    channel,
    mean,
    spread,
    weight_ptr,
    bias_ptr,
    ACC: tl.constexpr,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Mean, scale and bias of a tile's channels, as parts of the tile."""
    mean, scale = mean.to(ACC), spread
    if not TRAINING:
        scale = inverse_deviation(scale.to(ACC), EPS)
    if WEIGHT:
        scale *= tl.load(weight_ptr + channel).to(scale.dtype)
    scale = scale.to(ACC)
    bias = tl.zeros_like(mean)
    if BIAS:
        bias += tl.load(bias_ptr + channel).to(ACC)
    return over_channels(mean, LAST), over_channels(scale, LAST), over_channels(bias, LAST)


@triton.jit
def affine(x, scale, bias):
    """x * scale + bias, rounded once whatever the compiler would fuse: both passes must agree on its sign."""
    return tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(bias, x.shape))


@triton.jit
def packed(flags, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] flags -> bytes [ROWS, COLUMNS / 8]."""
    values = tl.full((), 1, tl.int32) << tl.arange(0, 8)
    return tl.sum(tl.reshape(flags.to(tl.int32), (ROWS, COLUMNS // 8, 8)) * values[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpacked(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse of `packed`."""
    flags = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(flags, (ROWS, COLUMNS)) != 0


@triton.jit
def byte_offsets(row, lane, COLUMNS: tl.constexpr):
    """Offset of the byte of each 8 elements, which begin at a multiple of 8."""
    return (row >> 3)[:, None] + (tl.min(tl.reshape(lane, (COLUMNS // 8, 8)), 1) >> 3)[None, :]


@triton.jit(do_not_specialize=["momentum_bits"])
def apply_kernel(
    x_ptr,  # [outer, channels, inner], or [inner, channels] if LAST, like all large tensors
    residual_ptr,  # the same, not read unless RESIDUAL
    mean_ptr,  # [channels / FOLD], like the next three; written if WHOLE, else read
    spread_ptr,  # 1 / standard deviation, or the variance unless TRAINING; written if WHOLE, else read
    weight_ptr,  # not read unless WEIGHT
    bias_ptr,  # not read unless BIAS
    y_ptr,
    bits_ptr,  # a byte for each 8 elements, not written unless BITS
    unbiased_ptr,  # [channels / FOLD], not read if WHOLE, like the next two, which are changed if TRACK
    running_mean_ptr,
    running_var_ptr,
    inner,
    outer,
    channels,
    steps,
    momentum_bits,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BITS: tl.constexpr,
    TRACK: tl.constexpr,
    FOLD: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C channels and strip of ``steps`` units. What is met twice is written twice, the same.

    Floats are constants or bits: as numbers Triton would round them to float32.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    channel, own = covering_tile(tl.program_id(0), channels, BLOCK_C, ALIGN_C)
    begin, end = strip_of(steps, inner, outer, BLOCK_P)
    vector = channel // FOLD
    if WHOLE:
        EXACT: tl.constexpr = mean_ptr.dtype.element_ty
        mean, squares = statistics_of(
            begin, end, channel, x_ptr, inner, outer, channels, EXACT, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P
        )
        total = (tl.full((), 1, tl.int64) * outer * inner).to(EXACT)
        variance = squares.to(EXACT) / total
        spread = inverse_deviation(variance, EPS)
        tl.store(mean_ptr + vector, mean, mask=own)
        tl.store(spread_ptr + vector, spread, mask=own)
    else:
        mean = tl.load(mean_ptr + vector)
        spread = tl.load(spread_ptr + vector)
    if TRACK and tl.program_id(1) == 0:
        momentum = tl.full((1,), momentum_bits, tl.int64).to(tl.float64, bitcast=True)
        first = own & (channel % FOLD == 0)
        unbiased = of_a_sample(variance, total) if WHOLE else tl.load(unbiased_ptr + vector)
        moved(running_mean_ptr + vector, mean, momentum, first)
        moved(running_var_ptr + vector, unbiased, momentum, first)
    mean, scale, bias = coefficients(vector, mean, spread, weight_ptr, bias_ptr, ACC, TRAINING, EPS, WEIGHT, BIAS, LAST)
    for unit in range(begin, end):
        row, lane, _fresh = tile_of(unit, channel, inner, outer, channels, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P)
        offsets = row[:, None] + lane[None, :]
        z = affine(tl.load(x_ptr + offsets).to(ACC) - mean, scale, bias)
        if RESIDUAL:
            z += tl.load(residual_ptr + offsets).to(ACC)
        y = activated(z, ACTIVATION).to(y_ptr.dtype.element_ty)
        if BITS:
            ROWS: tl.constexpr = BLOCK_P if LAST else BLOCK_C
            COLUMNS: tl.constexpr = BLOCK_C if LAST else BLOCK_P
            tl.store(bits_ptr + byte_offsets(row, lane, COLUMNS), packed(~(y <= 0), ROWS, COLUMNS))
        tl.store(y_ptr + offsets, y)


@triton.jit
def gradient_of_tile(
    row,
    lane,
    grad_ptr,
    x,
    aside_ptr,
    scale,
    bias,
    ACTIVATION: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    SLOPE_FROM: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of gz in the dtype to compute in. ``x`` is x - mean.

    SLOPE_FROM: "input" alone, "residual" and input, "output" or "bits"; "" where that is the gradient already. The last
    three lie ``aside``. NEEDS_INPUT: as of `kernels.activation.needs_input`.
    """
    offsets = row[:, None] + lane[None, :]
    grad = tl.load(grad_ptr + offsets).to(x.dtype)
    if SLOPE_FROM == "bits":
        ROWS: tl.constexpr = BLOCK_P if LAST else BLOCK_C
        COLUMNS: tl.constexpr = BLOCK_C if LAST else BLOCK_P
        bits = tl.load(aside_ptr + byte_offsets(row, lane, COLUMNS))
        grad = tl.where(unpacked(bits, ROWS, COLUMNS), grad, 0.0)
    elif SLOPE_FROM == "output":
        grad = gradient_before(grad, tl.load(aside_ptr + offsets).to(x.dtype), ACTIVATION)
    elif SLOPE_FROM != "":
        saved = affine(x, scale, bias)
        if SLOPE_FROM == "residual":
            saved += tl.load(aside_ptr + offsets).to(x.dtype)
        if not NEEDS_INPUT:  # the output, as it was stored
            saved = activated(saved, ACTIVATION).to(grad_ptr.dtype.element_ty).to(x.dtype)
        grad = gradient_before(grad, saved, ACTIVATION)
    return grad


@triton.jit
def grad_sums_of(
    begin,
    end,
    channel,
    grad_ptr,
    x_ptr,
    aside_ptr,
    gz_ptr,
    mean,
    scale,
    bias,
    inner,
    outer,
    channels,
    EXACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    SLOPE_FROM: tl.constexpr,
    WRITE: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a strip of gz, which is stored if WRITE, and of gz (x - mean), for each channel."""
    AXIS: tl.constexpr = 0 if LAST else 1
    first = tl.zeros((BLOCK_P if LAST else BLOCK_C, BLOCK_C if LAST else BLOCK_P), mean.dtype)
    second = tl.zeros_like(first)
    for unit in range(begin, end):
        row, lane, fresh = tile_of(unit, channel, inner, outer, channels, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P)
        offsets = row[:, None] + lane[None, :]
        x = tl.load(x_ptr + offsets).to(mean.dtype) - mean
        gz = gradient_of_tile(row, lane, grad_ptr, x, aside_ptr, scale, bias, ACTIVATION, NEEDS_INPUT, SLOPE_FROM,
                              LAST, BLOCK_P, BLOCK_C)  # fmt: skip
        if WRITE:
            tl.store(gz_ptr + offsets, gz.to(gz_ptr.dtype.element_ty))
        first += tl.where(over_positions(fresh, LAST), gz, 0.0)
        second += tl.where(over_positions(fresh, LAST), gz * x, 0.0)  # x may be infinite
    return tl.sum(first.to(EXACT), AXIS), tl.sum(second.to(EXACT), AXIS)


@triton.jit
def grad_sums_kernel(
    grad_ptr,
    x_ptr,
    aside_ptr,  # the residual, the output, or a byte for each 8 elements, as SLOPE_FROM says
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    gz_ptr,  # written if WRITE
    partial_ptr,  # [2, strips, channels]: sums of gz and of gz (x - mean)
    inner,
    outer,
    channels,
    steps,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    SLOPE_FROM: tl.constexpr,
    WRITE: tl.constexpr,
    FOLD: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C channels and strip of ``steps`` units."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = partial_ptr.dtype.element_ty
    channel, own = covering_tile(tl.program_id(0), channels, BLOCK_C, ALIGN_C)
    vector = channel // FOLD
    mean, scale, bias = coefficients(
        vector, tl.load(mean_ptr + vector), tl.load(spread_ptr + vector), weight_ptr, bias_ptr, ACC, TRAINING, EPS,
        WEIGHT, BIAS, LAST,
    )  # fmt: skip
    begin, end = strip_of(steps, inner, outer, BLOCK_P)
    first, second = grad_sums_of(
        begin, end, channel, grad_ptr, x_ptr, aside_ptr, gz_ptr, mean, scale, bias, inner, outer, channels, EXACT,
        ACTIVATION, NEEDS_INPUT, SLOPE_FROM, WRITE, LAST, False, ALIGN_P, ALIGN_C, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    partial_ptrs = partial_ptr + tl.program_id(1) * channels + channel
    tl.store(partial_ptrs, first, mask=own)
    tl.store(partial_ptrs + tl.num_programs(1) * channels, second, mask=own)


@triton.jit
def factors_of(
    first,
    second,
    inverse,
    size,
    channel,
    inside,
    grad_weight_ptr,
    grad_bias_ptr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """gb / n and s gw / n from sums of gz and gz (x - mean); gb and gw are stored."""
    grad_weight = second * inverse
    if BIAS:
        tl.store(grad_bias_ptr + channel, first.to(grad_bias_ptr.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(grad_weight_ptr + channel, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=inside)
    return first / size, grad_weight * inverse / size


@triton.jit
def merge_grad_sums_kernel(
    partial_ptr,  # [2, strips, channels x FOLD]
    spread_ptr,  # [channels]
    grad_weight_ptr,  # [channels], written if WEIGHT
    grad_bias_ptr,  # [channels], written if BIAS
    factors_ptr,  # [2, channels]: gb / n and s gw / n
    strips,
    size,
    channels,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C channels."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    channel = tl.minimum(channel, channels - 1)
    first = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    second = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    for start in range(0, strips * FOLD, BLOCK_S):
        _strip, real, offsets = part_of(start, channel, strips, channels, FOLD, BLOCK_S)
        first += tl.where(real, tl.load(partial_ptr + offsets), 0.0)
        second += tl.where(real, tl.load(partial_ptr + (offsets + strips * channels * FOLD)), 0.0)
    inverse = tl.load(spread_ptr + channel).to(ACC)
    if not TRAINING:
        inverse = inverse_deviation(inverse, EPS)
    center, slope = factors_of(
        tl.sum(first, 0),
        tl.sum(second, 0),
        inverse,
        size,
        channel,
        inside,
        grad_weight_ptr,
        grad_bias_ptr,
        WEIGHT,
        BIAS,
    )
    if TRAINING:
        tl.store(factors_ptr + channel, center, mask=inside)
        tl.store(factors_ptr + (channels + channel), slope, mask=inside)


@triton.jit
def grad_input_kernel(
    grad_ptr,
    x_ptr,
    aside_ptr,
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    factors_ptr,  # [2, channels / FOLD], read if TRAINING and not WHOLE
    grad_input_ptr,  # written if INPUT
    gz_ptr,  # written if WHOLE and WRITE
    grad_weight_ptr,  # [channels], written if WHOLE and WEIGHT
    grad_bias_ptr,  # [channels], written if WHOLE and BIAS
    inner,
    outer,
    channels,
    steps,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    SLOPE_FROM: tl.constexpr,
    INPUT: tl.constexpr,
    WRITE: tl.constexpr,
    FOLD: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C channels and strip of ``steps`` units."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    channel, own = covering_tile(tl.program_id(0), channels, BLOCK_C, ALIGN_C)
    vector = channel // FOLD
    spread = tl.load(spread_ptr + vector)
    mean, scale, bias = coefficients(
        vector, tl.load(mean_ptr + vector), spread, weight_ptr, bias_ptr, ACC, TRAINING, EPS, WEIGHT, BIAS, LAST
    )
    begin, end = strip_of(steps, inner, outer, BLOCK_P)
    if WHOLE:
        first, second = grad_sums_of(
            begin, end, channel, grad_ptr, x_ptr, aside_ptr, gz_ptr, mean, scale, bias, inner, outer, channels,
            spread.dtype, ACTIVATION, NEEDS_INPUT, SLOPE_FROM, WRITE, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        center, slope = factors_of(
            first, second, spread, outer * inner, channel, own, grad_weight_ptr, grad_bias_ptr, WEIGHT, BIAS
        )
    elif TRAINING:
        center = tl.load(factors_ptr + vector)
        slope = tl.load(factors_ptr + (channels // FOLD + vector))
    if TRAINING:
        center = over_channels(center.to(ACC), LAST)
        slope = over_channels(slope.to(ACC), LAST)
    if INPUT:
        for unit in range(begin, end):
            row, lane, _fresh = tile_of(unit, channel, inner, outer, channels, LAST, WHOLE, ALIGN_P, ALIGN_C, BLOCK_P)
            offsets = row[:, None] + lane[None, :]
            x = tl.load(x_ptr + offsets).to(ACC) - mean
            gx = gradient_of_tile(row, lane, grad_ptr, x, aside_ptr, scale, bias, ACTIVATION, NEEDS_INPUT, SLOPE_FROM,
                                  LAST, BLOCK_P, BLOCK_C)  # fmt: skip
            if TRAINING:
                gx = gx - center - x * slope
            tl.store(grad_input_ptr + offsets, (scale * gx).to(grad_input_ptr.dtype.element_ty))
