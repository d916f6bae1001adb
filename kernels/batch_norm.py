"""Launches of batch norm with an activation, maybe after a sum: in training three each way, or one if few positions.

The formulas are in `fastops.kernels.batch_norm_device`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

from .activation import NONE, RELU, Activation, needs_input
from .batch_norm_device import (
    apply_kernel,
    grad_input_kernel,
    grad_sums_kernel,
    merge_grad_sums_kernel,
    merge_statistics_kernel,
    statistics_kernel,
)
from .configs import planned, register_limit
from .elementwise import in_layout
from .geometry import CHANNELS_LAST, Columns, memory_format_of
from .launch import Plan, launch
from .tiles import tile_alignment

STRIPS: Final = 512  # programs of a sum, on every GPU
MERGED: Final = 512  # of their results, how many are merged at a time
ELEMENTS: Final = 2048  # of a tile
WHOLE_ELEMENTS: Final = 4096  # of one where a program has all positions of its channels, and takes few tiles
LEAST_UNITS: Final = 8  # of a program of a sum, if there are more: so partial results are small beside the input
UNITS: Final = 4  # of a program that sums nothing
_WARPS: Final = 4


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and merged sums: float64, or float32 for an input of 16 bits."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


class Call(NamedTuple):
    """What the launches depend on besides the tensors.

    ``weight`` and ``bias``: whether there is one. In evaluation ``eps`` is used with the running variance.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    channels_last: bool
    weight: bool
    bias: bool
    training: bool
    eps: float

    def flags(self) -> dict[str, Any]:
        """These, as the kernels' constants."""
        return {"TRAINING": self.training, "EPS": self.eps, "WEIGHT": self.weight, "BIAS": self.bias}


class Tiling(NamedTuple):
    """How tiles cover a tensor of ``columns`` channels, or of several columns for each.

    ``numbers``: inner, outer, columns, which the kernels take. ``constants`` are theirs too.
    """

    numbers: tuple[int, int, int]
    fold: int
    whole: bool
    units: int
    column_tiles: int
    constants: dict[str, Any]

    def strips(self) -> tuple[int, int]:
        """Of a sum: how many there are, and the units of each."""
        wanted = min(triton.cdiv(self.units, LEAST_UNITS), max(1, STRIPS // self.column_tiles))
        steps = triton.cdiv(self.units, wanted)
        return triton.cdiv(self.units, steps), steps

    def each(self, kernel: Any, *numbers: int, **constants: Any) -> Plan:
        """The launch of a kernel that needs no sums of others."""
        steps = self.units if self.whole else UNITS
        grid = self.column_tiles, triton.cdiv(self.units, steps)
        constants |= {"FOLD": self.fold, "WHOLE": self.whole}
        return Plan(kernel, grid, *self.numbers, steps, *numbers, **constants, **self.constants)

    def sums(self, kernel: Any, **constants: Any) -> Plan:
        """The launch of a kernel that writes partial results for each strip."""
        strips, steps = self.strips()
        return Plan(kernel, (self.column_tiles, strips), *self.numbers, steps, **constants, **self.constants)

    def merged(self, kernel: Any, *numbers: int, **constants: Any) -> Plan:
        """The launch of a kernel that merges those."""
        strips, channels = self.strips()[0], self.numbers[2] // self.fold
        block = min(MERGED, triton.next_power_of_2(strips * self.fold))
        blocks = {"BLOCK_S": block, "BLOCK_C": 8, "num_warps": 8}
        return Plan(kernel, (triton.cdiv(channels, 8),), strips, *numbers, FOLD=self.fold, **constants, **blocks)


def tiling(call: Call, activation: Activation = NONE) -> Tiling:
    """The tiles of a batch norm, and of a pass over it that computes an activation or its slope."""
    columns = Columns.of(call.shape, call.channels_last, call.training, call.dtype)
    elements = WHOLE_ELEMENTS if columns.whole else ELEMENTS
    if call.dtype is torch.float64 and activation not in (NONE, RELU):  # whose exponentials take many registers
        elements //= 4
    interpreted = call.device.type == "cpu"  # which pays per operation, not per element
    if columns.whole:
        block_p, block_c = _whole_blocks(columns, call.dtype, 1 << 16 if interpreted else elements)
    else:
        block_p, block_c = _blocks(columns, elements, interpreted)
    outer, width, inner, fold, last, whole = columns
    size = outer * inner if whole else inner
    constants: dict[str, Any] = {
        "LAST": last,
        "ALIGN_P": tile_alignment(size, block_p, inner),
        "ALIGN_C": tile_alignment(width, block_c),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": 2 * _WARPS if whole else _WARPS,
        **register_limit(call.device, everywhere=True),
    }
    units, column_tiles = outer * inner // size * triton.cdiv(size, block_p), triton.cdiv(width, block_c)
    return Tiling((inner, outer, width), fold, whole, units, column_tiles, constants)


def _blocks(columns: Columns, elements: int, interpreted: bool) -> tuple[int, int]:
    """Positions and channels of a tile."""
    last, inner = columns.last, columns.inner
    wide, other = map(triton.next_power_of_2, (columns.columns, inner) if last else (inner, columns.columns))
    if interpreted:
        wide, other = min(wide, 2**15), min(other, 32)  # 2**20 elements are the most that Triton takes
    else:
        if last:
            wide = min(wide, 128)
        elif wide > 64:  # of the tiles that overlap least the largest
            wide = min((512, 256, 128, 64), key=lambda block: -(-inner // block) * block)
        other = min(other, max(1, elements // wide))
    return (other, wide) if last else (wide, other)


def _whole_blocks(columns: Columns, dtype: torch.dtype, elements: int) -> tuple[int, int]:
    """The same where a program has all positions: of few channels, 32 bytes of them, many positions at a time."""
    block_p = min(triton.next_power_of_2(columns.outer * columns.inner), elements // max(8, 32 // dtype.itemsize))
    return block_p, min(triton.next_power_of_2(columns.columns), elements // block_p)


class Forward(NamedTuple):
    """The launches of a forward pass, and the shape of the partial results between the first two.

    The last one makes the output, and moves the running statistics if they are to be tracked. In evaluation, and where
    it finds the statistics itself, it is alone.
    """

    sums: Plan | None
    merge: Plan | None
    partial: tuple[int, ...]
    last: Plan


@planned
def forward_plan(
    call: Call, activation: Activation, residual: bool, bits: bool, track: bool, momentum: float
) -> Forward:
    (momentum_bits,) = struct.unpack("q", struct.pack("d", momentum))
    constants = {"ACTIVATION": activation, "RESIDUAL": residual, "BITS": bits, "TRACK": track}
    last = tiling(call, activation).each(apply_kernel, momentum_bits, **call.flags(), **constants)
    tiles = tiling(call)
    if tiles.whole or not call.training:
        return Forward(None, None, (), last)
    (inner, outer, columns), (strips, steps) = tiles.numbers, tiles.strips()
    numbers = inner, outer, columns // tiles.fold, steps
    block = tiles.constants["BLOCK_P"]
    merge = tiles.merged(merge_statistics_kernel, *numbers, EPS=call.eps, TRACK=track, BLOCK_P=block)
    return Forward(tiles.sums(statistics_kernel), merge, (2, strips, columns), last)


class Backward(NamedTuple):
    """The launches of a backward pass, those that are needed, and the shape of the partial results.

    ``whole``: the last one sums by itself.
    """

    sums: Plan | None
    merge: Plan | None
    last: Plan | None
    partial: tuple[int, ...]
    whole: bool


@planned
def backward_plan(
    call: Call, activation: Activation, slope_from: str, sums: bool, merge: bool, write: bool, need_input: bool
) -> Backward:
    """With ``write`` the gradient before the activation is written beside the sums."""
    tiles, flags = tiling(call, activation), call.flags()
    columns, size, whole = tiles.numbers[2], call.shape.numel() // call.shape[1], tiles.whole
    each = {**flags, "ACTIVATION": activation, "NEEDS_INPUT": needs_input(activation)}
    reads = slope_from if whole or not (sums and write) else ""
    last = tiles.each(grad_input_kernel, **each, SLOPE_FROM=reads, INPUT=need_input, WRITE=write)
    sums_plan = tiles.sums(grad_sums_kernel, **each, SLOPE_FROM=slope_from, WRITE=write, FOLD=tiles.fold)
    merge_plan = tiles.merged(merge_grad_sums_kernel, size, columns // tiles.fold, **flags)
    return Backward(
        sums_plan if sums and not whole else None,
        merge_plan if merge and not whole else None,
        last if need_input or whole else None,
        (2, tiles.strips()[0], columns),
        whole,
    )


def batch_norm_act(
    input: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    name: str,
    parameters: Sequence[float],
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The activation of the batch norm of [N, C, ...], in evaluation if there are ``mean`` and ``var``, plus ``other``.

    In training the running statistics, if any, move by ``momentum``. Parameters and statistics are [C] and contiguous,
    of one dtype, the input's or float32; ``other`` has the input's shape, dtype and memory format. The activation has a
    ``name`` and ``parameters``.

    Returns:
        The output; mean and 1 / standard deviation in the accumulator's dtype, empty in evaluation; and with
        ``save_bits``, for rows that are multiples of 8, a bit for each element that a ReLU let through, else empty.
    """
    training = mean is None
    memory_format = memory_format_of(input)
    last = memory_format is not torch.contiguous_format
    call = Call(input.device, input.dtype, input.shape, last, weight is not None, bias is not None, training, eps)
    x = input.contiguous(memory_format=memory_format)
    exact, track = exact_dtype(input.dtype), running_mean is not None
    plans = forward_plan(call, (name, *parameters), other is not None, save_bits, track, momentum if track else 0.0)
    if mean is None or var is None:
        found, spread = x.new_empty(x.shape[1], dtype=exact), x.new_empty(x.shape[1], dtype=exact)
    else:
        found, spread = mean.contiguous(), var.contiguous()
    unbiased = found
    if plans.sums is not None and plans.merge is not None:
        partial = x.new_empty(plans.partial, dtype=exact)
        unbiased = x.new_empty(x.shape[1], dtype=exact) if track else found
        launch(plans.sums, x, partial)
        launch(plans.merge, partial, found, spread, unbiased)
    running = (found, found) if running_mean is None or running_var is None else (running_mean, running_var)
    output = torch.empty_like(x, memory_format=memory_format)
    bits = x.new_empty(x.numel() // 8 if save_bits else 0, dtype=torch.uint8)
    residual = x if other is None else other.contiguous(memory_format=memory_format)
    vectors = found if weight is None else weight.contiguous(), found if bias is None else bias.contiguous()
    launch(plans.last, x, residual, found, spread, *vectors, output, bits if save_bits else output, unbiased, *running)
    if training:
        return output, found, spread, bits
    return output, x.new_empty(0, dtype=exact), x.new_empty(0, dtype=exact), bits


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    output: Tensor | None,
    bits: Tensor,
    training: bool,
    eps: float,
    residual: bool,
    channels_last: bool,
    name: str,
    parameters: Sequence[float],
    need_input: bool,
    need_other: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `batch_norm_act` for input, other, weight and bias, those that are needed.

    ``spread`` is 1 / standard deviation in training, else the running variance; ``output`` and ``bits`` are what
    `batch_norm_act` returned, ``residual`` and ``channels_last`` whether there was ``other``, which is here only if the
    slope needs the activation's input, as ``output`` only if not, and how the input lay. Tensors may lie in another way
    since.
    """
    call = Call(
        input.device, input.dtype, input.shape, channels_last, weight is not None, bias is not None, training, eps
    )
    memory_format = CHANNELS_LAST[input.dim()] if channels_last else torch.contiguous_format
    x = input.contiguous(memory_format=memory_format)
    grad = in_layout(grad_output, x.stride())
    activation, slope_from, aside = (name, *parameters), "input", grad
    if residual and activation == RELU and bits.numel():
        slope_from, aside = "bits", bits.contiguous()
    elif residual and needs_input(activation):
        assert other is not None
        slope_from, aside = "residual", other.contiguous(memory_format=memory_format)
    elif residual:
        assert output is not None
        slope_from, aside = "output", output.contiguous(memory_format=memory_format)
    merge = training or need_weight or need_bias
    plans = backward_plan(call, activation, slope_from, merge or need_other, merge, residual, need_input)
    mean, spread = mean.contiguous(), spread.contiguous()
    vectors = mean if weight is None else weight.contiguous(), mean if bias is None else bias.contiguous()
    exact, gz = exact_dtype(x.dtype), grad
    grad_weight = None if weight is None else weight.new_empty(weight.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    results = mean if grad_weight is None else grad_weight, mean if grad_bias is None else grad_bias
    factors = mean
    if residual and (plans.whole or plans.sums is not None):
        gz = torch.empty_like(x, memory_format=memory_format)
    if plans.sums is not None:
        partial = x.new_empty(plans.partial, dtype=exact)
        launch(plans.sums, grad, x, aside, mean, spread, *vectors, gz, partial)
        if plans.merge is not None:
            factors = x.new_empty((2, x.shape[1]), dtype=exact) if training else mean
            launch(plans.merge, partial, spread, *results, factors)
    grad_input = torch.empty_like(x, memory_format=memory_format) if need_input else grad
    if plans.last is not None:
        given = grad if plans.whole else gz
        launch(plans.last, given, x, aside, mean, spread, *vectors, factors, grad_input, gz, *results)
    return (
        grad_input if need_input else None,
        gz if need_other else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )
