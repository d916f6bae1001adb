"""Launches of depthwise convolutions, and the patches that their threads have.

The formulas are in `fastops.kernels.depthwise_device`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton

from .activation import Activation
from .configs import Kind, architecture, register_limit
from .depthwise_device import (
    depthwise_grad_input_kernel,
    depthwise_grad_weight_kernel,
    depthwise_kernel,
    depthwise_sum_kernel,
)
from .geometry import is_large
from .launch import Plan, accumulator_dtype

if TYPE_CHECKING:
    from .conv import Sizes

_TARGETS = 8  # of a patch
_PRODUCTS = 128  # of targets and taps of a row, at most: with more the compiler takes seconds, and registers spill
_COLUMNS = 16  # the most taps of a row that are not looped over
_LEAST_LANES = 1 << 13  # patches are made smaller to have as many
_TAPS = 10  # that have their sums in one thread
_PROGRAMS = 512  # at most, that share the sum for the gradient of the weight


def patch_of(kernel: int, stride: int, width: int, lanes: int, back: bool) -> int:
    """Targets of a patch of a row of this ``width``, where single targets would have so many ``lanes``; 0: all taps are
    to be a loop.
    """
    unit = stride if back else 1
    if kernel > _COLUMNS or unit > _TARGETS:
        return 0
    patch = unit
    while patch < width and 2 * patch <= _TARGETS and 2 * patch // unit * kernel <= _PRODUCTS:
        if lanes < 2 * patch * _LEAST_LANES:
            break
        patch *= 2
    return triton.cdiv(triton.cdiv(width, triton.cdiv(width, patch)), unit) * unit  # as many patches, all of one size


def _vector(kind: Kind, sizes: Sizes, channels: int) -> int:
    """How many channels a lane has: 16 bytes of them, or fewer that divide all; 8 where no access is that wide."""
    return math.gcd(channels, (16 if sizes.outputs == 1 else 8) // kind[1].itemsize)


def _lanes(kind: Kind) -> dict[str, int]:
    """Lanes of a program: one for each thread. The interpreter pays for each operation: more."""
    if kind[0].type == "cpu":
        return {"BLOCK": 1024}
    return {"BLOCK": 256 if architecture(kind[0]).startswith("gfx9") else 128, "num_warps": 4}


def _constants(sizes: Sizes, channels: int, *counts: int) -> dict[str, Any]:
    """Those that all kernels take; positions, or other ``counts``, may need 64 bits."""
    large = is_large(sizes.positions(sizes.input), sizes.positions(sizes.output), *counts)
    return {"CHANNELS": channels, "MULTIPLIER": sizes.outputs, **sizes.geometry._asdict(), "LARGE": large}


def _stream(kernel: Any, kind: Kind, sizes: Sizes, back: bool, **epilogue: Any) -> Plan:
    """The launch of a kernel that makes patches of targets."""
    source, target = (sizes.output, sizes.input) if back else (sizes.input, sizes.output)
    channels = sizes.groups if back else sizes.groups * sizes.outputs
    vector = _vector(kind, sizes, channels)
    groups = channels // vector
    width, geometry = target[2], sizes.geometry
    positions = sizes.positions(target)
    patch = patch_of(geometry.KERNEL[2], geometry.STRIDE[2], width, positions * groups, back)
    patches = positions // width * triton.cdiv(width, patch or 1)
    # Lanes side by side read 128 bytes at most: so that few channels share a warp, and their weights its cache lines.
    beside = [n for n in range(1, groups + 1) if groups % n == 0 and n * vector * kind[1].itemsize <= 128]
    group = beside[-1] if beside[-1] * vector * kind[1].itemsize >= 64 else groups
    lanes = _lanes(kind)
    return Plan(
        kernel,
        (triton.cdiv(patches * groups, lanes["BLOCK"]),),
        patches,
        patches * groups,
        *source,
        *target,
        VEC=vector,
        GROUP=group,
        **_constants(sizes, channels, patches * groups),
        **epilogue,
        LOOP_ALL=patch == 0,
        PATCH=patch or 1,
        **lanes,
        **register_limit(kind[0], True),
    )


def parts_of(tiles: int, steps: int, partial: int, operands: int) -> int:
    """Into how many parts to split a sum that so many ``tiles`` take so many ``steps`` for.

    A part has four steps at least, and all partial results, of ``partial`` bytes each, half the bytes of the
    ``operands``, written and read. No GPU is asked how large it is: the same bits on all.
    """
    return max(1, min(_PROGRAMS // tiles, steps // 4, operands // (4 * partial)))


def forward_plan(kind: Kind, sizes: Sizes, epilogue: tuple[bool, Activation, bool]) -> Plan:
    """The output [positions, O], and what it was before the activation, from input, weight [O, taps] and bias."""
    has_bias, activation, save_before = epilogue
    constants = {"HAS_BIAS": has_bias, "ACTIVATION": activation, "SAVE_BEFORE": save_before}
    return _stream(depthwise_kernel, kind, sizes, False, **constants)


def grad_input_plan(kind: Kind, sizes: Sizes) -> Plan:
    """The gradient of the input from that of the output and the weight."""
    return _stream(depthwise_grad_input_kernel, kind, sizes, True)


def grad_weight_plans(kind: Kind, sizes: Sizes) -> tuple[Plan, tuple[int, int], Plan | None]:
    """The parts of the gradient of the weight from that of the output and the input, their shape [parts, O * taps], and
    their sum; without that, there is one part, which is the gradient.
    """
    kernel, stride = sizes.geometry.KERNEL, sizes.geometry.STRIDE
    channels, width = sizes.groups * sizes.outputs, sizes.output[2]
    own_columns = triton.cdiv(kernel[2], triton.cdiv(kernel[2], _TAPS))
    own_rows = triton.cdiv(kernel[1], triton.cdiv(kernel[1], _TAPS // own_columns))
    boxes = kernel[0] * triton.cdiv(kernel[1], own_rows) * triton.cdiv(kernel[2], own_columns)
    least = 4 if stride[2] == 1 else 2
    patch = next((n for n in range(least, 2 * least) if width % n == 0), min(width, least))
    patches = sizes.positions(sizes.output) // width * triton.cdiv(width, patch)

    block_c = min(128 // kind[1].itemsize, triton.next_power_of_2(channels))
    while block_c > 16 and triton.cdiv(channels, block_c) * block_c > 1.125 * channels:
        block_c //= 2
    lanes = _lanes(kind)
    block_p = max(1, lanes["BLOCK"] * _vector(kind, sizes, channels) // block_c)
    tiles = triton.cdiv(channels, block_c) * boxes
    size, itemsize = channels * math.prod(kernel), accumulator_dtype(kind[1]).itemsize
    operands = sizes.positions(sizes.output) * channels + sizes.positions(sizes.input) * sizes.groups
    parts = parts_of(tiles, patches // block_p, size * itemsize, operands * kind[1].itemsize)
    patches_per_part = triton.cdiv(triton.cdiv(patches, parts), block_p) * block_p
    parts = triton.cdiv(patches, patches_per_part)
    product = Plan(
        depthwise_grad_weight_kernel,
        (tiles * parts,),
        patches,
        patches_per_part,
        *sizes.input,
        *sizes.output,
        OWN=(own_rows, own_columns),
        PATCH=patch,
        WHOLE=width % patch == 0,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        **_constants(sizes, channels),
        **{name: value for name, value in lanes.items() if name != "BLOCK"},
        **register_limit(kind[0], True),
    )
    if parts == 1:
        return product, (parts, size), None
    block, block_s = 64, min(32, triton.next_power_of_2(parts))
    addition = Plan(depthwise_sum_kernel, (triton.cdiv(size, block),), parts, size, BLOCK_S=block_s, BLOCK=block)
    return product, (parts, size), addition
