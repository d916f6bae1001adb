"""Launches of batch norm with an activation, maybe after a sum: three forward and three backward in training.

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
ELEMENTS: Final = 2048  # of a tile
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
    units: int
    column_tiles: int
    constants: dict[str, Any]

    def strips(self) -> tuple[int, int]:
        """Of a sum: how many there are, and the units of each."""
        wanted = min(triton.cdiv(self.units, LEAST_UNITS), max(1, STRIPS // self.column_tiles))
        steps = triton.cdiv(self.units, wanted)
        return triton.cdiv(self.units, steps), steps

    def each(self, kernel: Any, *numbers: int, **constants: Any) -> Plan:
        """The launch of a kernel that sums nothing."""
        grid = self.column_tiles, triton.cdiv(self.units, UNITS)
        return Plan(kernel, grid, *self.numbers, UNITS, *numbers, FOLD=self.fold, **constants, **self.constants)

    def sums(self, kernel: Any, **constants: Any) -> Plan:
        """The launch of a kernel that writes partial results for each strip."""
        strips, steps = self.strips()
        return Plan(kernel, (self.column_tiles, strips), *self.numbers, steps, **constants, **self.constants)

    def merged(self, kernel: Any, *numbers: int, **constants: Any) -> Plan:
        """The launch of a kernel that merges those."""
        strips, channels = self.strips()[0], self.numbers[2] // self.fold
        block = min(512, triton.next_power_of_2(strips * self.fold))
        blocks = {"BLOCK_S": block, "BLOCK_C": 8, "num_warps": 8}
        return Plan(kernel, (triton.cdiv(channels, 8),), strips, *numbers, FOLD=self.fold, **constants, **blocks)


def tiling(call: Call, activation: Activation = NONE) -> Tiling:
    """The tiles of a batch norm, and of a pass over it that computes an activation or its slope."""
    elements = ELEMENTS
    if call.dtype is torch.float64 and activation not in (NONE, RELU):  # whose exponentials take many registers
        elements //= 4
    outer, columns, inner, fold, last = Columns.of(call.shape, call.channels_last)
    wide = triton.next_power_of_2(columns if last else inner)
    if last:
        wide = min(wide, 128)
    elif wide > 64:  # of the tiles that overlap least the largest
        wide = min((512, 256, 128, 64), key=lambda block: -(-inner // block) * block)
    other = min(triton.next_power_of_2(inner if last else columns), max(1, elements // wide))
    if call.device.type == "cpu":  # the interpreter pays per operation, not per element
        wide, other = (triton.next_power_of_2(size) for size in ((columns, inner) if last else (inner, columns)))
        wide, other = min(wide, 2**15), min(other, 32)  # 2**20 elements are Triton's limit
    block_p, block_c = (other, wide) if last else (wide, other)
    constants: dict[str, Any] = {
        "LAST": last,
        "ALIGN_P": tile_alignment(inner, block_p),
        "ALIGN_C": tile_alignment(columns, block_c),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": _WARPS,
        **register_limit(call.device, everywhere=True),
    }
    units, column_tiles = outer * triton.cdiv(inner, block_p), triton.cdiv(columns, block_c)
    return Tiling((inner, outer, columns), fold, units, column_tiles, constants)


class Statistics(NamedTuple):
    """The launches that find the statistics of a batch, and the shape of the partial results between them."""

    sums: Plan
    merge: Plan
    partial: tuple[int, ...]


@planned
def statistics_plan(call: Call, track: bool) -> Statistics:
    tiles = tiling(call)
    (inner, outer, columns), (strips, steps) = tiles.numbers, tiles.strips()
    numbers = inner, outer, columns // tiles.fold, steps
    block = tiles.constants["BLOCK_P"]
    merge = tiles.merged(merge_statistics_kernel, *numbers, EPS=call.eps, TRACK=track, BLOCK_P=block)
    return Statistics(tiles.sums(statistics_kernel), merge, (2, strips, columns))


@planned
def apply_plan(call: Call, activation: Activation, residual: bool, bits: bool, track: bool, momentum: float) -> Plan:
    """The launch that makes the output, and moves the running statistics if they are to be tracked."""
    (momentum_bits,) = struct.unpack("q", struct.pack("d", momentum))
    constants = {"ACTIVATION": activation, "RESIDUAL": residual, "BITS": bits, "TRACK": track}
    return tiling(call, activation).each(apply_kernel, momentum_bits, **call.flags(), **constants)


class Backward(NamedTuple):
    """The launches of a backward pass, those that are needed, and the shape of the partial results."""

    sums: Plan | None
    merge: Plan
    grad_input: Plan
    partial: tuple[int, ...]


@planned
def backward_plan(call: Call, activation: Activation, slope_from: str, sums: bool, write: bool) -> Backward:
    """With ``write`` the gradient before the activation is written beside the sums."""
    tiles, flags = tiling(call, activation), call.flags()
    columns, size = tiles.numbers[2], call.shape.numel() // call.shape[1]
    each = {**flags, "ACTIVATION": activation, "NEEDS_INPUT": needs_input(activation)}
    return Backward(
        tiles.sums(grad_sums_kernel, **each, SLOPE_FROM=slope_from, WRITE=write, FOLD=tiles.fold) if sums else None,
        tiles.merged(merge_grad_sums_kernel, size, columns // tiles.fold, **flags),
        tiles.each(grad_input_kernel, **each, SLOPE_FROM="" if sums and write else slope_from),
        (2, tiles.strips()[0], columns),
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
    if mean is None or var is None:
        plans = statistics_plan(call, track)
        partial = x.new_empty(plans.partial, dtype=exact)
        found, spread = x.new_empty(x.shape[1], dtype=exact), x.new_empty(x.shape[1], dtype=exact)
        unbiased = x.new_empty(x.shape[1], dtype=exact) if track else found
        launch(plans.sums, x, partial)
        launch(plans.merge, partial, found, spread, unbiased)
    else:
        found, spread = mean.contiguous(), var.contiguous()
        unbiased = found
    running = (found, found) if running_mean is None or running_var is None else (running_mean, running_var)
    plan = apply_plan(call, (name, *parameters), other is not None, save_bits, track, momentum if track else 0.0)
    output = torch.empty_like(x, memory_format=memory_format)
    bits = x.new_empty(x.numel() // 8 if save_bits else 0, dtype=torch.uint8)
    residual = x if other is None else other.contiguous(memory_format=memory_format)
    vectors = found if weight is None else weight.contiguous(), found if bias is None else bias.contiguous()
    launch(plan, x, residual, found, spread, *vectors, output, bits if save_bits else output, unbiased, *running)
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
    sums = training or need_other or need_weight or need_bias
    plans = backward_plan(call, activation, slope_from, sums, residual)
    mean, spread = mean.contiguous(), spread.contiguous()
    vectors = mean if weight is None else weight.contiguous(), mean if bias is None else bias.contiguous()
    exact, gz = exact_dtype(x.dtype), grad
    grad_weight = None if weight is None else weight.new_empty(weight.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    factors = x.new_empty((2, x.shape[1]), dtype=exact) if training else mean
    if plans.sums is not None:
        gz = torch.empty_like(x, memory_format=memory_format) if residual else grad
        partial = x.new_empty(plans.partial, dtype=exact)
        launch(plans.sums, grad, x, aside, mean, spread, *vectors, gz, partial)
        if training or need_weight or need_bias:
            results = partial if grad_weight is None else grad_weight, partial if grad_bias is None else grad_bias
            launch(plans.merge, partial, spread, *results, factors)
    grad_input = torch.empty_like(x, memory_format=memory_format) if need_input else None
    if grad_input is not None:
        launch(plans.grad_input, gz, x, aside, mean, spread, *vectors, factors, grad_input)
    return (
        grad_input,
        gz if need_other else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )
