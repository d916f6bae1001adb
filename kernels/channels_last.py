"""Bring [N, C, ...] to channels last in one pass, with channels that pad, or a gradient before its activation.

Convolutions read channels last: so they load 16 bytes at a time. What lies otherwise goes through this kernel once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import NONE, Activation
from .activation_backward import MaskPlan, column_sum_stages
from .configs import planned, register_limit
from .epilogue import gradient_before
from .launch import Plan, accumulator_dtype, launch, units_of
from .tiles import tile_positions


@triton.jit(
    do_not_specialize=["positions", "steps"],
    do_not_specialize_on_alignment=["sample_stride", "channel_stride", "position_stride"],
)
def channels_last_kernel(
    source_ptr,  # [samples, CHANNELS, positions]
    saved_ptr,  # [samples, CHANNELS, positions], strides as the source: output or input of the activation
    result_ptr,  # [samples, positions, PADDED], contiguous
    sum_ptr,  # [samples * strips, CHANNELS], contiguous
    positions,
    sample_stride,
    channel_stride,
    position_stride,
    steps,
    UNITS: tl.constexpr,  # of the positions and the strides
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per BLOCK_C channels and strip of ``steps`` tiles of BLOCK_P positions of a sample."""
    ACCUMULATOR: tl.constexpr = tl.float64 if source_ptr.dtype.element_ty == tl.float64 else tl.float32
    NAME: tl.constexpr = ACTIVATION[0]
    TILES_C: tl.constexpr = (PADDED + BLOCK_C - 1) // BLOCK_C

    positions, sample_stride = positions * UNITS[0], sample_stride * UNITS[1]
    channel_stride, position_stride = channel_stride * UNITS[2], position_stride * UNITS[3]
    strip = tl.program_id(0) // TILES_C
    strips = tl.cdiv(tl.cdiv(positions, BLOCK_P), steps)
    sample = (strip // strips).to(tl.int64)
    channels, own_channels = tile_positions(tl.program_id(0) % TILES_C, PADDED, BLOCK_C, PADDED)
    real = channels < CHANNELS
    rows = tl.where(real, channels, 0)[:, None] * channel_stride + sample * sample_stride
    total = tl.zeros((BLOCK_C, BLOCK_P), ACCUMULATOR)
    for step in range(0, steps):
        own_positions, own = tile_positions(strip % strips * steps + step, positions, BLOCK_P, UNITS[0])
        offsets = rows + own_positions[None, :] * position_stride
        value = tl.load(source_ptr + offsets, mask=real[:, None], other=0.0)
        if NAME != "":
            saved = tl.load(saved_ptr + offsets, mask=real[:, None], other=0.0).to(ACCUMULATOR)
            value = gradient_before(value.to(ACCUMULATOR), saved, ACTIVATION).to(source_ptr.dtype.element_ty)
        if SUM:
            total += tl.where(own[None, :], value.to(ACCUMULATOR), 0.0)
        result_ptrs = result_ptr + (sample * positions + own_positions)[:, None] * PADDED + channels[None, :]
        tl.store(result_ptrs, tl.trans(value), mask=own[:, None] & own_channels[None, :])
    if SUM:
        sums = tl.sum(total, 1).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + strip.to(tl.int64) * CHANNELS + channels, sums, mask=own_channels & real)


def channels_last(tensor: Tensor, channels: int) -> Tensor:
    """[N, C, ...] -> contiguous [N, ..., channels]: a view of a dense channels-last tensor, else a copy.

    ``channels`` beyond C are zeros: they pad each position to a multiple of 16 bytes, for 128-bit loads.
    """
    last = tensor.movedim(1, -1)
    if channels == last.shape[-1] and last.is_contiguous():
        return last
    flat, result = tensor.flatten(2), tensor.new_empty((*last.shape[:-1], channels))
    plan, _ = channels_last_plan((tensor.device, tensor.dtype), flat.shape, flat.stride(), channels)
    launch(plan, flat, flat, result, result)
    return result


def rows_of_channels(tensor: Tensor) -> Tensor:
    """[N, C, ...] -> contiguous [positions, C]: a view of a dense channels-last tensor, else a copy."""
    return channels_last(tensor, tensor.shape[1]).view(-1, tensor.shape[1])


@planned
def channels_last_plan(
    kind: tuple[torch.device, torch.dtype],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    padded: int,
    activation: Activation = NONE,
    need_sum: bool = False,
) -> tuple[Plan, int]:
    """The launch for a tensor [N, C, positions] with these ``strides``, and how many strips it sums up."""
    device, dtype = kind
    samples, channels, positions = shape
    block_p = min(max(16, triton.next_power_of_2(positions)), 64)
    block_c = min(max(16, triton.next_power_of_2(padded)), 2048 // block_p)
    if device.type == "cpu":  # the interpreter: few large tiles
        block_p = min(max(16, triton.next_power_of_2(positions)), 1024)
        block_c = min(max(16, triton.next_power_of_2(padded)), 2**20 // block_p)  # Triton's limit
    tiles = triton.cdiv(positions, block_p)
    steps = min(tiles, 8)
    strips = samples * triton.cdiv(tiles, steps)
    numbers = positions, *strides
    units = units_of(dtype, *numbers)
    plan = Plan(
        channels_last_kernel,
        (triton.cdiv(padded, block_c) * strips,),
        *(number // unit for number, unit in zip(numbers, units, strict=True)),
        steps,
        UNITS=units,
        CHANNELS=channels,
        PADDED=padded,
        ACTIVATION=activation,
        SUM=need_sum,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        **register_limit(device),
    )
    return plan, strips


def channels_last_mask_plan(
    kind: tuple[torch.device, torch.dtype], shape: tuple[int, ...], activation: Activation, need_sum: bool
) -> MaskPlan:
    """`activation_backward.mask_plan` for a contiguous gradient [N, C, positions], which becomes [N * positions, C]."""
    _, channels, positions = shape
    first, strips = channels_last_plan(
        kind, shape, (channels * positions, positions, 1), channels, activation, need_sum
    )
    if not need_sum:
        return MaskPlan((first,), (strips,), False, kind[1])
    exact = accumulator_dtype(kind[1])
    stages, all_strips = column_sum_stages((kind[0], exact), strips, channels)
    return MaskPlan((first, *stages), (strips, *all_strips), True, exact if stages else kind[1])
