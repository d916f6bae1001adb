"""Launches of convolutions: as linear layers where kernel and stride are 1, by kernels of their own if depthwise.

The formulas are in `fastops.kernels.conv_device`, and in `fastops.kernels.depthwise_device`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from . import depthwise
from .activation import NONE, RELU, Activation
from .activation_backward import MaskPlan, activation_backward, mask_and_sum, mask_plan
from .add_relu import add_relu_backward
from .channels_last import channels_last, channels_last_mask_plan, rows_of_channels
from .configs import (
    Kind,
    architecture,
    conv_config,
    conv_grad_weight_config,
    inner_splits,
    narrowed,
    planned,
    register_limit,
)
from .conv_device import (
    conv_grad_input_kernel,
    conv_grad_weight_kernel,
    conv_kernel,
    conv_sum_of_splits_kernel,
)
from .depthwise_device import depthwise_grad_input_kernel, depthwise_kernel
from .geometry import POINTWISE, Geometry, is_large, three
from .launch import Plan, accumulator_dtype, input_precision, launch
from .matmul import NO_EPILOGUE, Epilogue, ProductPlan, constants_of, matmul, multiply, split, with_addition
from .onednn import convolution_backward

_FEW_POSITIONS = 256  # of a convolution, in all samples, for which its weight is not brought to channels last


def magic(divisor: int) -> tuple[int, int]:
    """The magic number and the shift of `quotient`, for numbers below 2**31; the former's 32 bits as int32."""
    shift = (divisor - 1).bit_length()
    number = (((1 << shift) - divisor) << 32) // divisor + 1
    return number - (number >> 31 << 32), shift


Options: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


class ConvPlan(NamedTuple):
    """The product of `conv`, None if it is a linear layer; how many channels its operands get; the result's shape.

    The ``weight_channels`` are those of a weight that is to be channels last; None: it is read as it lies.
    """

    product: ProductPlan | None
    channels: int
    weight_channels: int | None
    shape: tuple[int, ...]
    channels_last_shape: tuple[int, ...]


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: Activation,
    memory_format: torch.memory_format,
    before: Tensor | None = None,
) -> Tensor:
    """``activation(conv(input, weight) + bias)``: [N, C, ...], [O, C / groups, ...], [O] -> [N, O, ...], nothing empty.

    One to three spatial dimensions and as many strides, paddings and dilations. The result has ``memory_format``. What
    it was before the activation is written to ``before`` if given, in the result's shape with the channels last.
    """
    kind = input.device, input.dtype, input_precision(input, "conv", math.gcd(*weight.shape[:2]))
    options = tuple(stride), tuple(padding), tuple(dilation), groups
    contiguous = memory_format is torch.contiguous_format
    layouts, epilogue = (weight.is_contiguous(), not contiguous), (bias is not None, activation, before is not None)
    plan = conv_plan(kind, (input.shape, weight.shape), options, layouts, epilogue)
    # Not a view of `rows`: autograd lets nobody change a view from a Function in place.
    result = torch.empty(plan.shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    rows = input.new_empty(plan.channels_last_shape) if contiguous and writes_rows(plan.product) else result
    if plan.product is None:
        matrices = rows_of_channels(input), weight.reshape(plan.shape[1], -1).t()
        matmul(*matrices, bias, activation, out=rows, before=before)
    else:
        x = channels_last(input, plan.channels * groups)
        w = weight if plan.weight_channels is None else channels_last(weight, plan.weight_channels)
        if plan.product.single:  # `multiply`, without the cost of a function call
            others = rows if bias is None else bias.contiguous(), rows, rows if before is None else before
            launch(plan.product.product, x, w, *others)
        else:
            multiply(plan.product, x, w, bias, rows, before)
    return result if rows is result else result.copy_(rows.movedim(-1, 1))


def writes_rows(plan: ProductPlan | None) -> bool:
    """Whether a product writes channels last alone: a linear layer's, or that of a depthwise convolution."""
    return plan is None or plan.product.kernel in (depthwise_kernel, depthwise_grad_input_kernel)


@planned
def conv_plan(
    kind: Kind,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    options: Options,
    layouts: tuple[bool, bool],
    epilogue: Epilogue,
) -> ConvPlan:
    """`conv` of input and weight with these ``shapes``; whether the weight is contiguous, and the result channels
    last."""
    sizes = Sizes.of(kind, shapes, options)
    input_shape, weight_shape = shapes
    size = sizes.output[5 - len(input_shape) :]
    shape, last = (input_shape[0], weight_shape[0], *size), (input_shape[0], *size, weight_shape[0])
    if sizes.is_linear:
        return ConvPlan(None, weight_shape[1], None, shape, last)
    if sizes.is_depthwise:
        return ConvPlan(ProductPlan(depthwise.forward_plan(kind, sizes, epilogue), True), 1, 1, shape, last)
    groups, channels, outputs = sizes.groups, sizes.padded_channels, sizes.outputs
    positions = sizes.positions(sizes.output)
    weight_channels, weight_strides = sizes.weight(kind, layouts[0], channels)
    aligned = channels * kind[1].itemsize % 16 == 0 and weight_strides[1] == 1
    config = conv_config(kind, positions, outputs, groups, channels, aligned)
    if epilogue[1] not in (NONE, RELU):
        config = narrowed(config, kind[0])
    if not layouts[1]:  # each element is stored by itself: their addresses would spill
        widest = 64 if epilogue[2] and architecture(kind[0]) == "sm80" else 128  # beside results before the activation
        config = config._replace(BLOCK_N=min(config.BLOCK_N, widest))
    tiles = triton.cdiv(positions, config.BLOCK_M) * triton.cdiv(outputs, config.BLOCK_N) * groups
    steps = triton.cdiv(math.prod(sizes.geometry.KERNEL) * channels, config.BLOCK_K)
    operands = sizes.positions(sizes.input) * groups * channels + math.prod(weight_shape)
    splits, steps_of_part = split(kind, tiles, steps, positions * weight_shape[0], operands)
    product = Plan(
        conv_kernel,
        (tiles, splits),
        steps_of_part,
        positions,
        *sizes.input,
        *sizes.output,
        CHANNELS=channels,
        REAL_CHANNELS=weight_channels or sizes.channels,
        WEIGHT_STRIDES=weight_strides,
        OUTPUT_LAST=layouts[1] or splits > 1,
        SPLIT=splits > 1,
        **constants_of(epilogue if splits == 1 else NO_EPILOGUE),
        **(sizes.constants(kind) | register_limit(kind[0], kind[1] is torch.float32 and kind[2] == "ieee")),
        **config._asdict(),
    )
    in_sample = 0 if layouts[1] else math.prod(size)
    whole = with_addition(kind, product, (positions, weight_shape[0]), epilogue, in_sample)
    return ConvPlan(whole, channels, weight_channels, shape, last)


class Sizes(NamedTuple):
    """All sizes of a convolution, in three spatial dimensions."""

    batch: int
    input: tuple[int, ...]
    output: tuple[int, ...]
    geometry: Geometry
    groups: int
    channels: int  # of a group
    padded_channels: int  # what they are padded to: several of one group, to a multiple of 16 bytes
    outputs: int  # output channels of a group

    @classmethod
    def of(cls, kind: Kind, shapes: tuple[tuple[int, ...], tuple[int, ...]], options: Options) -> Sizes:
        """From the shapes of input and weight."""
        (batch, _, *size), (out_channels, channels, *kernel) = shapes
        *each, groups = options
        geometry = Geometry.of(kernel, *each)
        padding = -channels % (16 // kind[1].itemsize) if groups == 1 < channels else 0
        in_three = three(size)
        output = geometry.output_size(in_three)
        return cls(batch, in_three, output, geometry, groups, channels, channels + padding, out_channels // groups)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer over positions."""
        return self.geometry == POINTWISE and self.groups == 1

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel is made from one channel of the input."""
        return self.channels == 1 and self.groups > 1

    def positions(self, size: tuple[int, ...]) -> int:
        """Of the whole batch."""
        return self.batch * math.prod(size)

    def weight(self, kind: Kind, contiguous: bool, channels: int) -> tuple[int | None, tuple[int, int, int]]:
        """How many ``channels`` the weight gets that is brought to channels last, None if it is not; its strides in
        elements, from output channel to output channel, channel to channel, and tap to tap.

        A contiguous one is read as it lies if there are few positions: then it is most of what is moved, and so few
        programs read it that to load single elements costs less than a pass over it.
        """
        taps = math.prod(self.geometry.KERNEL)
        few = self.positions(self.output) <= _FEW_POSITIONS
        if contiguous and few and not architecture(kind[0]).startswith("gfx"):  # where the input is loaded narrowly too
            return None, (self.channels * taps, taps, 1)
        return channels, (channels * taps, 1, channels)

    def constants(self, kind: Kind) -> dict[str, Any]:
        """Those that all three kernels take."""
        return {
            "GROUPS": self.groups,
            "OUT_CHANNELS": self.outputs,
            **self.geometry._asdict(),
            "INPUT_PRECISION": kind[2],
            "LARGE": is_large(self.positions(self.output), self.positions(self.input)),
            **register_limit(kind[0]),
        }


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_bias: bool,
    memory_format: torch.memory_format,
    activation: Activation = RELU,
    *,
    vendor: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``saved``: what the slope of the activation is had from, None without one. The first two results have
    ``memory_format``.
    ``vendor``: the gradients of input and weight are torch's, from cuDNN or MIOpen.
    """
    shapes = tuple(input_shape), tuple(weight_shape)
    options = tuple(stride), tuple(padding), tuple(dilation), groups
    contiguous = memory_format is torch.contiguous_format
    if vendor:
        grad, sums = grad_output, None
        if contiguous and activation == RELU:  # masked as it lies in memory; the bias gradient is torch's too
            grad = grad if saved is None else add_relu_backward(grad, saved.contiguous())
        elif saved is not None or need_bias:
            rows = None if saved is None else rows_of_channels(saved)
            masked, sums = activation_backward(rows_of_channels(grad), rows, need_bias, activation)
            grad = masked.view(grad.movedim(1, -1).shape).movedim(-1, 1)
        grad_input, grad_weight, grad_bias = convolution_backward(
            grad, input, weight, shapes, options, need_bias and sums is None, memory_format
        )
        return grad_input, grad_weight, grad_bias if sums is None else sums

    kind = grad_output.device, grad_output.dtype, input_precision(grad_output, "conv", math.gcd(*shapes[1][:2]))
    needs = weight is not None, input is not None, need_bias
    layouts = weight is not None and weight.is_contiguous(), not contiguous
    plan = conv_backward_plan(kind, shapes, options, NONE if saved is None else activation, needs, layouts)
    if plan.transposes:  # as it masks and sums
        grad = grad_output.contiguous()
    else:
        grad = rows_of_channels(grad_output)
        saved = None if saved is None else rows_of_channels(saved)
    masked = grad.new_empty(plan.rows) if plan.transposes or saved is not None else grad
    grad_bias = mask_and_sum(plan.mask, grad, saved, masked)
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = torch.empty(shapes[0], dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        rows = grad.new_empty(plan.channels_last_shape) if contiguous and writes_rows(plan.for_input) else grad_input
        if plan.for_input is None:
            matmul(masked, weight.reshape(shapes[1][0], -1), out=rows)
        else:
            w = weight if plan.weight_channels is None else channels_last(weight, plan.weight_channels)
            parts = rows
            if plan.for_input.addition is not None:
                parts = grad.new_empty(plan.for_input.parts, dtype=plan.for_input.parts_dtype)
            launch(plan.for_input.product, masked, w, parts)
            if plan.for_input.addition is not None:
                launch(plan.for_input.addition, parts, rows, rows, rows)
        if rows is not grad_input:
            grad_input.copy_(rows.movedim(-1, 1))
    if input is not None:
        grad_weight = torch.empty(shapes[1], dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        if plan.for_weight is None:
            matmul(masked.t(), rows_of_channels(input), out=grad_weight)  # [O, C] in either memory format
        else:
            parts = grad_weight
            if plan.for_weight.addition is not None:
                parts = grad.new_empty(plan.for_weight.parts, dtype=plan.for_weight.parts_dtype)
            launch(plan.for_weight.product, masked, channels_last(input, plan.for_weight.channels), parts)
            if plan.for_weight.addition is not None:
                launch(plan.for_weight.addition, parts, grad_weight)
    return grad_input, grad_weight, grad_bias


class GradWeightPlan(NamedTuple):
    """The launches for the weight's gradient: its ``parts`` [splits, O * taps * channels], and their ``addition``.

    Without that, there is one part, which is the gradient.
    """

    product: Plan
    channels: int  # of the input, with those that pad
    parts: tuple[int, int]
    parts_dtype: torch.dtype
    addition: Plan | None


class ConvBackwardPlan(NamedTuple):
    """The launches of `conv_backward`. Those of a product are None if nobody needs it or a linear layer computes it."""

    mask: MaskPlan
    transposes: bool  # the mask: from contiguous tensors to channels last
    rows: tuple[int, int]  # positions and output channels
    channels_last_shape: tuple[int, ...]  # of the input
    weight_channels: int | None  # as in `ConvPlan`
    for_input: ProductPlan | None
    for_weight: GradWeightPlan | None


@planned
def conv_backward_plan(
    kind: Kind,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    options: Options,
    activation: Activation,
    needs: tuple[bool, bool, bool],
    layouts: tuple[bool, bool],
) -> ConvBackwardPlan:
    """`conv_backward` for an input and a weight with these ``shapes``; what ``needs`` a gradient: they and the bias.

    ``layouts``: whether the weight is contiguous, and the results channels last.
    """
    sizes, out_channels = Sizes.of(kind, shapes, options), shapes[1][0]
    rows = sizes.positions(sizes.output), out_channels
    planes = sizes.batch, out_channels, math.prod(sizes.output)
    transposes = not layouts[1] and min(planes[1:]) > 1
    if transposes:
        mask = channels_last_mask_plan(kind[:2], planes, activation, needs[2])
    else:
        mask = mask_plan(kind[:2], rows, (out_channels, 1), activation, needs[2])
    batch, channels, *size = shapes[0]
    for_input = for_weight = None
    if needs[0] and sizes.is_depthwise:
        for_input = ProductPlan(depthwise.grad_input_plan(kind, sizes), True)
    elif needs[0] and not sizes.is_linear:
        for_input = grad_input_plan(kind, sizes, layouts)
    if needs[1] and not sizes.is_linear:
        taps = math.prod(sizes.geometry.KERNEL)
        strides = (1, sizes.channels) if layouts[1] else (taps, 1)
        for_weight = grad_weight_plan(kind, sizes, (sizes.channels * taps, *strides))
    weight_channels, _ = sizes.weight(kind, layouts[0], sizes.channels)
    return ConvBackwardPlan(mask, transposes, rows, (batch, *size, channels), weight_channels, for_input, for_weight)


def grad_input_plan(kind: Kind, sizes: Sizes, layouts: tuple[bool, bool]) -> ProductPlan:
    """The gradient of the input from that of the output [positions, O] and the weight."""
    geometry, groups, channels, outputs = sizes.geometry, sizes.groups, sizes.channels, sizes.outputs
    classes = math.prod(geometry.STRIDE)
    largest = sizes.positions(tuple(-(-n // s) for n, s in zip(sizes.input, geometry.STRIDE, strict=True)))
    _, weight_strides = sizes.weight(kind, layouts[0], channels)
    aligned = all(count * kind[1].itemsize % 16 == 0 for count in (channels, outputs)) and weight_strides[1] == 1
    config = conv_config(kind, largest, channels, groups * classes, outputs, aligned)
    if not layouts[1] and config.BLOCK_N > 128 and architecture(kind[0]) == "sm80":  # as above; sm90 spills nothing
        config = config._replace(BLOCK_N=128)
    tiles_m = triton.cdiv(largest, config.BLOCK_M)
    tiles = tiles_m * triton.cdiv(channels, config.BLOCK_N) * groups * classes
    step = tuple(s // math.gcd(s, d) for s, d in zip(geometry.STRIDE, geometry.DILATION, strict=True))
    most_taps = math.prod(triton.cdiv(k, s) for k, s in zip(geometry.KERNEL, step, strict=True))
    rows, all_channels = sizes.positions(sizes.input), groups * channels
    operands = groups * outputs * (sizes.positions(sizes.output) + channels * math.prod(geometry.KERNEL))
    steps = triton.cdiv(most_taps * outputs, config.BLOCK_K)
    splits, steps_of_part = split(kind, tiles, steps, rows * all_channels, operands)
    product = Plan(
        conv_grad_input_kernel,
        (tiles, splits),
        steps_of_part,
        sizes.batch,
        tiles_m,
        *sizes.input,
        *sizes.output,
        CHANNELS=channels,
        WEIGHT_STRIDES=weight_strides,
        OUTPUT_LAST=layouts[1] or splits > 1,
        SPLIT=splits > 1,
        STEP=step,
        **sizes.constants(kind),
        **config._asdict(),
    )
    in_sample = 0 if layouts[1] else math.prod(sizes.input)
    return with_addition(kind, product, (rows, all_channels), NO_EPILOGUE, in_sample)


def grad_weight_plan(kind: Kind, sizes: Sizes, result_strides: tuple[int, ...]) -> GradWeightPlan:
    """The gradient of the weight, [O, channels, taps] with these strides, from that of the output [positions, O] and
    the input, channels last.
    """
    device, dtype, _ = kind
    channels, outputs, taps = sizes.padded_channels, sizes.outputs, math.prod(sizes.geometry.KERNEL)
    if sizes.is_depthwise:
        product, parts, addition = depthwise.grad_weight_plans(kind, sizes)
        return GradWeightPlan(product, sizes.groups, parts, accumulator_dtype(dtype), addition)
    positions, out_channels = sizes.positions(sizes.output), outputs * sizes.groups
    aligned = all(count * dtype.itemsize % 16 == 0 for count in (channels, outputs))
    config = conv_grad_weight_config(kind, positions, outputs, channels, taps, aligned)
    tiles = triton.cdiv(outputs, config.BLOCK_M) * triton.cdiv(taps * channels, config.BLOCK_N) * sizes.groups
    size, exact = out_channels * taps * channels, accumulator_dtype(dtype)
    input_elements = sizes.positions(sizes.input) * sizes.groups * channels
    operands = (positions * out_channels + input_elements) * dtype.itemsize
    splits = inner_splits(device, tiles, positions // config.BLOCK_K, size * exact.itemsize, operands)
    positions_per_split = triton.cdiv(triton.cdiv(positions, splits), config.BLOCK_K) * config.BLOCK_K
    splits = triton.cdiv(positions, positions_per_split)
    product = Plan(
        conv_grad_weight_kernel,
        (tiles * splits,),
        positions,
        positions_per_split,
        *sizes.input,
        *sizes.output,
        *magic(sizes.output[1]),
        *magic(sizes.output[2]),
        CHANNELS=channels,
        REAL_CHANNELS=sizes.channels,
        OUTPUT_STRIDES=(0, 0, 0) if splits > 1 else result_strides,
        SPLIT=splits > 1,
        **sizes.constants(kind),
        **config._asdict(),
    )
    if splits == 1:
        return GradWeightPlan(product, channels * sizes.groups, (1, size), exact, None)
    block = 1024
    addition = Plan(
        conv_sum_of_splits_kernel,
        (triton.cdiv(size, block),),
        splits,
        size,
        sizes.channels,
        *result_strides,
        TAPS=taps,
        CHANNELS=channels,
        BLOCK=block,
        **register_limit(device),
    )
    return GradWeightPlan(product, channels * sizes.groups, (splits, size), exact, addition)
