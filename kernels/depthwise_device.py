"""Depthwise convolution, where each output channel is made from one channel of the input, without matrix products.

`kernels.conv` takes these kernels by itself. Tensors are channels last, in three spatial dimensions, with MULTIPLIER
output channels for each channel of the input.

Forward and the gradient of the input are one sum, of the *sources* that a *target* meets: along each axis, tap t of
target r meets source ::

    forward             e = r S - P + t D
    gradient of input   e = (r + P - t D) / S, where that leaves no rest

A thread has a patch of targets of one row, as many channels as 16 bytes hold. Taps of depth and rows are a loop. Which
sources of a row a patch meets, and by which taps, is known when the kernel is compiled, residues of the stride
included: each of these is loaded once and added to every target that it meets. Where kernel or stride are too large for
that (``LOOP_ALL``), a patch is one target and all taps are a loop.

For the gradient of the weight a thread keeps sums for some of the taps, over patches of positions of one part of the
batch. How many parts depends on the sizes alone, and they are added in order: no atomics, the same bits on every GPU.
"""

from __future__ import annotations

import math
from typing import Any  # noqa: F401  in comments, which Triton does not read

import triton
import triton.language as tl

from .epilogue import activated

_SIZES = [f"{tensor}_{side}" for tensor in ("source", "target") for side in ("depth", "height", "width")]


@triton.constexpr_function
def sources_met(PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK):
    """Along a row, the sources that a patch meets, counted from where `along` says."""
    pairs = [(r, t) for r in range(PATCH) for t in range(KERNEL)]
    if BACK:
        found = {r + PADDING - t * DILATION for r, t in pairs}
        return sorted(e // STRIDE for e in found if e % STRIDE == 0)
    return sorted({r * STRIDE - PADDING + t * DILATION for r, t in pairs})


@triton.constexpr_function
def how_many(PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK):
    """Of `sources_met`."""
    return len(sources_met(PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK))


@triton.constexpr_function
def source_number(n, PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK):
    """One of `sources_met`."""
    return sources_met(PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK)[n]


@triton.constexpr_function
def tap_between(target, n, PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK):
    """The tap by which a target of a patch meets its source number ``n``; -1: none."""
    source = sources_met(PATCH, KERNEL, STRIDE, PADDING, DILATION, BACK)[n]
    rest = target + PADDING - source * STRIDE if BACK else source + PADDING - target * STRIDE
    return rest // DILATION if rest % DILATION == 0 and 0 <= rest // DILATION < KERNEL else -1


@triton.constexpr_function
def step_between_taps(STRIDE, DILATION, BACK):
    """From one tap that meets a target to the next."""
    return STRIDE // math.gcd(STRIDE, DILATION) if BACK else 1


@triton.constexpr_function
def turns(KERNEL, STRIDE, DILATION, BACK):
    """How many taps may meet a target along an axis."""
    return -(-KERNEL // step_between_taps(STRIDE, DILATION, BACK))


@triton.jit
def along(
    place,
    turn,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BACK: tl.constexpr,
):
    """Along an axis that is looped over: the source that a target meets in this turn, the tap, and if there is one."""
    if BACK:
        STEP: tl.constexpr = step_between_taps(STRIDE, DILATION, BACK)
        first = tl.full(place.shape, KERNEL, tl.int32)
        for candidate in range(0, STEP):  # one of them at most
            first = tl.where((place + (PADDING - candidate * DILATION)) % STRIDE == 0, candidate, first)
        tap = first + turn * STEP
        return (place + (PADDING - tap * DILATION)) // STRIDE, tap, tap < KERNEL
    else:
        return place * STRIDE + (turn * DILATION - PADDING), turn, place >= 0


@triton.jit
def summed(
    source_ptr,
    weight_ptr,
    sample,
    places,
    channel,
    source_size,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BACK: tl.constexpr,
    LOOP_ALL: tl.constexpr,
    PATCH: tl.constexpr,
):
    """The sums of all targets of a patch. Going back, outputs of a channel are a loop too."""
    ACC: tl.constexpr = tl.float64 if source_ptr.dtype.element_ty == tl.float64 else tl.float32
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    OUTPUTS: tl.constexpr = MULTIPLIER if BACK else 1
    SOURCES: tl.constexpr = CHANNELS * MULTIPLIER if BACK else CHANNELS // MULTIPLIER
    DEPTHS: tl.constexpr = turns(KERNEL[0], STRIDE[0], DILATION[0], BACK)
    ROWS: tl.constexpr = turns(KERNEL[1], STRIDE[1], DILATION[1], BACK)
    COLUMNS: tl.constexpr = turns(KERNEL[2], STRIDE[2], DILATION[2], BACK) if LOOP_ALL else 1
    # What is static along a row: with LOOP_ALL a kernel of one tap.
    K: tl.constexpr = 1 if LOOP_ALL else KERNEL[2]
    S: tl.constexpr = 1 if LOOP_ALL else STRIDE[2]
    P: tl.constexpr = 0 if LOOP_ALL else PADDING[2]
    D: tl.constexpr = 1 if LOOP_ALL else DILATION[2]

    sums = ()  # type: Any
    for _i in tl.static_range(PATCH):
        sums = sums + (tl.zeros(channel.shape, ACC),)
    for turn in range(0, DEPTHS * ROWS * COLUMNS * OUTPUTS):
        if BACK:
            output_channel = channel * MULTIPLIER + turn % OUTPUTS
            source_channel = output_channel
        else:
            output_channel = channel
            source_channel = channel // MULTIPLIER
        turn_d = turn // (OUTPUTS * COLUMNS * ROWS)
        depth, tap_d, real = along(places[0], turn_d, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], BACK)
        turn_r = turn // (OUTPUTS * COLUMNS) % ROWS
        row, tap_r, real_r = along(places[1], turn_r, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], BACK)
        real &= real_r & (depth >= 0) & (depth < source_size[0]) & (row >= 0) & (row < source_size[1])
        tap = (tap_d * KERNEL[1] + tap_r) * KERNEL[2]
        if LOOP_ALL:
            turn_c = turn // OUTPUTS % COLUMNS
            column, tap_c, real_c = along(places[2], turn_c, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2], BACK)
            real &= real_c
            tap += tap_c
        elif BACK:
            column = places[2] * (PATCH // S)
        else:
            column = places[2] * (PATCH * S)
        position = ((sample * source_size[0] + depth) * source_size[1] + row) * source_size[2] + column
        source_ptrs = source_ptr + (position.to(tl.int64) * SOURCES + source_channel)
        weight_ptrs = weight_ptr + (output_channel * TAPS + tap)
        for n in tl.static_range(how_many(PATCH, K, S, P, D, BACK)):
            e = source_number(n, PATCH, K, S, P, D, BACK)
            met = real & (column + e >= 0) & (column + e < source_size[2])
            x = tl.load(source_ptrs + e * SOURCES, mask=met, other=0.0).to(ACC)
            new = ()  # type: Any
            for i in tl.static_range(PATCH):
                if tap_between(i, n, PATCH, K, S, P, D, BACK) >= 0:
                    w_ptrs = weight_ptrs + tap_between(i, n, PATCH, K, S, P, D, BACK)
                    w = tl.load(w_ptrs, mask=real, other=0.0) if BACK else tl.load(w_ptrs)
                    new = new + (sums[i] + x * w.to(ACC),)
                else:
                    new = new + (sums[i],)
            sums = new
    return sums


@triton.jit
def unravel_patch(patch, size, PATCH: tl.constexpr):
    """Sample, depth, row, and patch of the row, of flat patches."""
    columns = (size[2] + PATCH - 1) // PATCH
    row = patch // columns
    depth = row // size[1]
    return depth // size[0], (depth % size[0], row % size[1], patch % columns)


@triton.jit
def patches_of_program(
    patches,
    lanes,
    target_size,
    CHANNELS: tl.constexpr,
    LARGE: tl.constexpr,
    PATCH: tl.constexpr,
    VEC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of BLOCK lanes of VEC channels: which exist; their samples, places and channels. GROUP lanes side by side share a
    patch; then come all patches, then other channels.
    """
    own = tl.program_id(0).to(tl.int64 if LARGE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.minimum(own, lanes - 1)[:, None]
    group = lane % GROUP
    patch = lane // GROUP
    if GROUP * VEC < CHANNELS:
        group += patch // patches * GROUP
        patch = patch % patches
    sample, places = unravel_patch(patch, target_size, PATCH)
    return (own < lanes)[:, None], sample, places, group.to(tl.int32) * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def first_target(sample, places, size, PATCH: tl.constexpr):
    """Flat position of a patch's first target."""
    row = (sample * size[0] + places[0]) * size[1] + places[1]
    return (row * size[2] + places[2] * PATCH).to(tl.int64)


@triton.jit(do_not_specialize=["patches", "lanes"], do_not_specialize_on_alignment=_SIZES)
def depthwise_kernel(
    input_ptr,  # [batch, *source_size, channels], contiguous
    weight_ptr,  # [out_channels, taps], contiguous
    bias_ptr,  # [out_channels]
    output_ptr,  # [batch, *target_size, out_channels], contiguous
    before_ptr,  # the same: the results before the activation, written if SAVE_BEFORE
    patches,
    lanes,
    source_depth,
    source_height,
    source_width,
    target_depth,
    target_height,
    target_width,
    CHANNELS: tl.constexpr,  # of the output
    MULTIPLIER: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_BEFORE: tl.constexpr,
    LARGE: tl.constexpr,
    LOOP_ALL: tl.constexpr,
    PATCH: tl.constexpr,
    VEC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK patches of VEC output channels."""
    target_size = target_depth, target_height, target_width
    own, sample, places, channel = patches_of_program(
        patches, lanes, target_size, CHANNELS, LARGE, PATCH, VEC, GROUP, BLOCK
    )
    sums = summed(
        input_ptr, weight_ptr, sample, places, channel, (source_depth, source_height, source_width),
        CHANNELS, MULTIPLIER, KERNEL, STRIDE, PADDING, DILATION, False, LOOP_ALL, PATCH,
    )  # fmt: skip
    start = first_target(sample, places, target_size, PATCH) * CHANNELS + channel
    for i in tl.static_range(PATCH):
        z = sums[i]
        if HAS_BIAS:
            z += tl.load(bias_ptr + channel).to(z.dtype)
        inside = own & (places[2] * PATCH + i < target_width)
        if SAVE_BEFORE:
            tl.store(before_ptr + (start + i * CHANNELS), z.to(output_ptr.dtype.element_ty), mask=inside)
        y = activated(z, ACTIVATION).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + (start + i * CHANNELS), y, mask=inside)


@triton.jit(do_not_specialize=["patches", "lanes"], do_not_specialize_on_alignment=_SIZES)
def depthwise_grad_input_kernel(
    grad_ptr,  # [batch, *source_size, out_channels], contiguous
    weight_ptr,  # [out_channels, taps], contiguous
    output_ptr,  # [batch, *target_size, channels], contiguous
    patches,
    lanes,
    source_depth,
    source_height,
    source_width,
    target_depth,
    target_height,
    target_width,
    CHANNELS: tl.constexpr,  # of the input
    MULTIPLIER: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    LARGE: tl.constexpr,
    LOOP_ALL: tl.constexpr,
    PATCH: tl.constexpr,  # a multiple of the stride, unless LOOP_ALL
    VEC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK patches of VEC input channels."""
    target_size = target_depth, target_height, target_width
    own, sample, places, channel = patches_of_program(
        patches, lanes, target_size, CHANNELS, LARGE, PATCH, VEC, GROUP, BLOCK
    )
    sums = summed(
        grad_ptr, weight_ptr, sample, places, channel, (source_depth, source_height, source_width),
        CHANNELS, MULTIPLIER, KERNEL, STRIDE, PADDING, DILATION, True, LOOP_ALL, PATCH,
    )  # fmt: skip
    start = first_target(sample, places, target_size, PATCH) * CHANNELS + channel
    for i in tl.static_range(PATCH):
        inside = own & (places[2] * PATCH + i < target_width)
        tl.store(output_ptr + (start + i * CHANNELS), sums[i].to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["patches", "patches_per_part"], do_not_specialize_on_alignment=_SIZES)
def depthwise_grad_weight_kernel(
    grad_ptr,  # [batch, *target_size, CHANNELS], contiguous
    input_ptr,  # [batch, *source_size, CHANNELS / MULTIPLIER], contiguous
    partial_ptr,  # [parts, CHANNELS, taps]
    patches,
    patches_per_part,
    source_depth,
    source_height,
    source_width,
    target_depth,
    target_height,
    target_width,
    CHANNELS: tl.constexpr,  # of the output
    MULTIPLIER: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    LARGE: tl.constexpr,
    OWN: tl.constexpr,  # rows and columns of taps of one program
    PATCH: tl.constexpr,
    WHOLE: tl.constexpr,  # every target of every patch exists
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_C output channels, OWN taps and part of the patches."""
    ACC: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    BOXES_R: tl.constexpr = (KERNEL[1] + OWN[0] - 1) // OWN[0]
    BOXES_C: tl.constexpr = (KERNEL[2] + OWN[1] - 1) // OWN[1]
    TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    SOURCES: tl.constexpr = CHANNELS // MULTIPLIER
    ROWS: tl.constexpr = OWN[0]  # by name: in a loop Triton 3.6 takes an element of a tuple for no constant
    OWN_TAPS: tl.constexpr = OWN[0] * OWN[1]
    S: tl.constexpr = STRIDE[2]
    P: tl.constexpr = PADDING[2]
    D: tl.constexpr = DILATION[2]
    target_size = target_depth, target_height, target_width

    program = tl.program_id(0)
    box = program // TILES % (KERNEL[0] * BOXES_R * BOXES_C)
    part = program // (TILES * KERNEL[0] * BOXES_R * BOXES_C)
    tap_d = box // (BOXES_R * BOXES_C)
    tap_r = box // BOXES_C % BOXES_R * OWN[0]
    tap_c = box % BOXES_C * OWN[1]
    own = program % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = own[None, :]

    sums = ()  # type: Any
    for _i in tl.static_range(OWN_TAPS):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), ACC),)
    begin = part.to(tl.int64 if LARGE else tl.int32) * patches_per_part
    end = tl.minimum(begin + patches_per_part, patches)
    for start in range(begin, end, BLOCK_P):
        patch = (start + tl.arange(0, BLOCK_P))[:, None]
        real = (patch < end) & (channel < CHANNELS)
        sample, places = unravel_patch(tl.minimum(patch, end - 1), target_size, PATCH)
        grad_ptrs = grad_ptr + (first_target(sample, places, target_size, PATCH) * CHANNELS + channel)
        grads = ()  # type: Any
        exist = ()  # type: Any
        for i in tl.static_range(PATCH):
            exist = exist + (real if WHOLE else real & (places[2] * PATCH + i < target_width),)
            grads = grads + (tl.load(grad_ptrs + i * CHANNELS, mask=exist[i], other=0.0).to(ACC),)
        depth = places[0] * STRIDE[0] + (tap_d * DILATION[0] - PADDING[0])
        column = places[2] * (PATCH * S) + tap_c * D
        real &= (depth >= 0) & (depth < source_depth)
        for r in tl.static_range(ROWS):
            row = places[1] * STRIDE[1] + ((tap_r + r) * DILATION[1] - PADDING[1])
            met_r = real & (row >= 0) & (row < source_height)
            position = ((sample * source_depth + depth) * source_height + row) * source_width + column
            input_ptrs = input_ptr + (position.to(tl.int64) * SOURCES + channel // MULTIPLIER)
            for n in tl.static_range(how_many(PATCH, OWN[1], S, P, D, False)):
                e = source_number(n, PATCH, OWN[1], S, P, D, False)
                met = met_r & (column + e >= 0) & (column + e < source_width)
                x = tl.load(input_ptrs + e * SOURCES, mask=met, other=0.0).to(ACC)
                new = ()  # type: Any
                for t in tl.static_range(OWN_TAPS):
                    total = sums[t]  # type: Any
                    for i in tl.static_range(PATCH):
                        if t // OWN[1] == r and tap_between(i, n, PATCH, OWN[1], S, P, D, False) == t % OWN[1]:
                            # What does not exist is not 0 times x, which may be NaN.
                            total += grads[i] * x if WHOLE else tl.where(exist[i], grads[i] * x, 0.0)
                    new = new + (total,)
                sums = new

    partial_ptrs = partial_ptr + (part.to(tl.int64) * CHANNELS + own) * (KERNEL[0] * KERNEL[1] * KERNEL[2])
    for t in tl.static_range(OWN_TAPS):
        r = tap_r + t // OWN[1]
        c = tap_c + t % OWN[1]
        total = tl.sum(sums[t], 0).to(partial_ptr.dtype.element_ty)
        inside = (own < CHANNELS) & (r < KERNEL[1]) & (c < KERNEL[2])
        tl.store(partial_ptrs + ((tap_d * KERNEL[1] + r) * KERNEL[2] + c), total, mask=inside)


@triton.jit(do_not_specialize=["parts", "size"])
def depthwise_sum_kernel(partial_ptr, output_ptr, parts, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """One program per BLOCK elements of the gradient of the weight, [size]: the sum of its ``parts`` [parts, size]."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partial_ptrs = partial_ptr + tl.minimum(own, size - 1)[None, :]
    total = tl.zeros((BLOCK_S, BLOCK), partial_ptr.dtype.element_ty)
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)[:, None]
        total += tl.load(partial_ptrs + tl.minimum(part, parts - 1).to(tl.int64) * size, mask=part < parts, other=0.0)
    tl.store(output_ptr + own, tl.sum(total, 0).to(output_ptr.dtype.element_ty), mask=own < size)


# Launches -------------------------------------------------------------------------------------------------------------
