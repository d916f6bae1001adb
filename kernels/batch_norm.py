"""Launches of batch norm with ReLU, or with a sum and ReLU: three forward and three backward in training.

The formulas are in `fastops.kernels.batch_norm_device`.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

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

    def each(self, kernel: Any, **constants: Any) -> Plan:
        """The launch of a kernel that sums nothing."""
        grid = self.column_tiles, triton.cdiv(self.units, UNITS)
        return Plan(kernel, grid, *self.numbers, UNITS, FOLD=self.fold, **constants, **self.constants)

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


def tiling(call: Call) -> Tiling:
    """The tiles of a batch norm."""
    outer, columns, inner, fold, last = Columns.of(call.shape, call.channels_last)
    wide = triton.next_power_of_2(columns if last else inner)
    if last:
        wide = min(wide, 128)
    elif wide > 64:  # of the tiles that overlap least the largest
        wide = min((512, 256, 128, 64), key=lambda block: -(-inner // block) * block)
    other = min(triton.next_power_of_2(inner if last else columns), ELEMENTS // wide)
    if call.device.type == "cpu":  # the interpreter pays per operation, not per element
        wide, other = (triton.next_power_of_2(size) for size in ((columns, inner) if last else (inner, columns)))
        other = min(other, 32)
    block_p, block_c = (other, wide) if last else (wide, other)
    constants: dict[str, Any] = {
        "LAST": last,
        "ALIGN_P": tile_alignment(inner, block_p),
        "ALIGN_C": tile_alignment(columns, block_c),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": _WARPS,
        **register_limit(call.device),
    }
    units, column_tiles = outer * triton.cdiv(inner, block_p), triton.cdiv(columns, block_c)
    return Tiling((inner, outer, columns), fold, units, column_tiles, constants)


class Statistics(NamedTuple):
    """The launches that find the statistics of a batch, and the shape of the partial results between them."""

    sums: Plan
    merge: Plan
    partial: tuple[int, ...]


@planned
def statistics_plan(call: Call, track: bool, momentum: float) -> Statistics:
    tiles = tiling(call)
    (inner, outer, columns), (strips, steps) = tiles.numbers, tiles.strips()
    (bits,) = struct.unpack("q", struct.pack("d", momentum))
    numbers = inner, outer, columns // tiles.fold, steps, bits
    block = tiles.constants["BLOCK_P"]
    merge = tiles.merged(merge_statistics_kernel, *numbers, EPS=call.eps, TRACK=track, BLOCK_P=block)
    return Statistics(tiles.sums(statistics_kernel), merge, (2, strips, columns))


@planned
def apply_plan(call: Call, residual: bool, bits: bool) -> Plan:
    """The launch that makes the output."""
    return tiling(call).each(apply_kernel, **call.flags(), RESIDUAL=residual, BITS=bits)


class Backward(NamedTuple):
    """The launches of a backward pass, those that are needed, and the shape of the partial results."""

    sums: Plan | None
    merge: Plan
    grad_input: Plan
    partial: tuple[int, ...]


@planned
def backward_plan(call: Call, mask: str, sums: bool, write: bool) -> Backward:
    """With ``write`` the masked gradient is written beside the sums."""
    tiles, flags = tiling(call), call.flags()
    columns, size = tiles.numbers[2], call.shape.numel() // call.shape[1]
    return Backward(
        tiles.sums(grad_sums_kernel, **flags, MASK=mask, WRITE=write, FOLD=tiles.fold) if sums else None,
        tiles.merged(merge_grad_sums_kernel, size, columns // tiles.fold, **flags),
        tiles.each(grad_input_kernel, **flags, MASK="none" if sums and write else mask),
        (2, tiles.strips()[0], columns),
    )


def batch_norm_relu(
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
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ReLU of the batch norm of [N, C, ...], in evaluation if there are ``mean`` and ``var``, plus ``other``.

    In training the running statistics, if any, move by ``momentum``. Parameters and statistics are [C] and contiguous,
    of one dtype, the input's or float32; ``other`` has the input's shape, dtype and memory format.

    Returns:
        The output; mean and 1 / standard deviation in the accumulator's dtype, empty in evaluation; and with
        ``save_bits``, for rows that are multiples of 8, a bit for each element that ReLU let through, else empty.
    """
    training = mean is None
    memory_format = memory_format_of(input)
    last = memory_format is not torch.contiguous_format
    call = Call(input.device, input.shape, last, weight is not None, bias is not None, training, eps)
    x = input.contiguous(memory_format=memory_format)
    exact = exact_dtype(input.dtype)
    if mean is None or var is None:
        track = running_mean is not None
        plans = statistics_plan(call, track, momentum if track else 0.0)
        partial = x.new_empty(plans.partial, dtype=exact)
        found, spread = x.new_empty(x.shape[1], dtype=exact), x.new_empty(x.shape[1], dtype=exact)
        launch(plans.sums, x, partial)
        running = (found, found) if running_mean is None or running_var is None else (running_mean, running_var)
        launch(plans.merge, partial, found, spread, *running)
    else:
        found, spread = mean.contiguous(), var.contiguous()
    plan = apply_plan(call, other is not None, save_bits)
    output = torch.empty_like(x, memory_format=memory_format)
    bits = x.new_empty(x.numel() // 8 if save_bits else 0, dtype=torch.uint8)
    parameters = found if weight is None else weight.contiguous(), found if bias is None else bias.contiguous()
    residual = x if other is None else other.contiguous(memory_format=memory_format)
    launch(plan, x, residual, found, spread, *parameters, output, bits if save_bits else output)
    if training:
        return output, found, spread, bits
    return output, x.new_empty(0, dtype=exact), x.new_empty(0, dtype=exact), bits


def batch_norm_relu_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    output: Tensor,
    bits: Tensor,
    training: bool,
    eps: float,
    residual: bool,
    channels_last: bool,
    need_input: bool,
    need_other: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `batch_norm_relu` for input, other, weight and bias, those that are needed.

    ``spread`` is 1 / standard deviation in training, else the running variance; ``output`` and ``bits`` are what
    `batch_norm_relu` returned, ``residual`` and ``channels_last`` whether there was ``other`` and how the input lay.
    Tensors may lie in another way since.
    """
    call = Call(input.device, input.shape, channels_last, weight is not None, bias is not None, training, eps)
    memory_format = CHANNELS_LAST[input.dim()] if channels_last else torch.contiguous_format
    x = input.contiguous(memory_format=memory_format)
    grad = in_layout(grad_output, x.stride())
    kind = "input" if not residual else "bits" if bits.numel() else "output"
    mask = (
        grad if not residual else bits.contiguous() if bits.numel() else output.contiguous(memory_format=memory_format)
    )
    sums = training or need_other or need_weight or need_bias
    plans = backward_plan(call, kind, sums, residual)
    mean, spread = mean.contiguous(), spread.contiguous()
    parameters = mean if weight is None else weight.contiguous(), mean if bias is None else bias.contiguous()
    exact, gz = exact_dtype(x.dtype), grad
    grad_weight = None if weight is None else weight.new_empty(weight.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    factors = x.new_empty((2, x.shape[1]), dtype=exact) if training else mean
    if plans.sums is not None:
        gz = torch.empty_like(x, memory_format=memory_format) if residual else grad
        partial = x.new_empty(plans.partial, dtype=exact)
        launch(plans.sums, grad, x, mask, mean, spread, *parameters, gz, partial)
        if training or need_weight or need_bias:
            results = partial if grad_weight is None else grad_weight, partial if grad_bias is None else grad_bias
            launch(plans.merge, partial, spread, *results, factors)
    grad_input = torch.empty_like(x, memory_format=memory_format) if need_input else None
    if grad_input is not None:
        launch(plans.grad_input, gz, x, mask, mean, spread, *parameters, factors, grad_input)
    return (
        grad_input,
        gz if need_other else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )
