"""Convolutions in one, two and three dimensions, and with ReLU: ``kernels/conv.py``.

With input x, weight w, bias b, output y, its gradient gy, and * for the convolution with all its options::

    y  = relu(x * w + b)
    gz = gy where not y <= 0, else 0        (gz = gy without ReLU)
    gx = the transposed convolution of gz with w
    gw = the correlation of x with gz
    gb = sum of gz over samples and positions
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import onednn
from ..kernels.activation import NONE, RELU, Activation
from ..kernels.geometry import conv_output_size
from ..kernels.launch import is_exact
from ..kernels.private import memory_format
from . import flops
from .accepts import Tensors, mismatch
from .examples import Audit, Example, Named, Sizes
from .op import EXACT, Explanation, Op, passes

Numbers = tuple[int, ...]

# Options --------------------------------------------------------------------------------------------------------------


class ConvOptions(NamedTuple):
    """What a convolution is called with besides tensors, as given and as one number for each spatial dimension.

    ``numbers`` are stride, padding and dilation, None if they are not valid; ``extra`` is padding at the end alone,
    which ``padding="same"`` needs for kernels of an even size.
    """

    stride: Any
    padding: Any
    dilation: Any
    groups: int
    numbers: tuple[Numbers, Numbers, Numbers] | None
    extra: Numbers | None = None

    @classmethod
    def of(cls, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> ConvOptions:
        """The options of a call, which has one of these objects from here on."""
        invalid = cls(stride, padding, dilation, groups, None)
        kernel = weight.shape[2:] if isinstance(weight, Tensor) else ()
        same = padding == "same"
        read = []
        for value, least in ((stride, 1), (0 if same or padding == "valid" else padding, 0), (dilation, 1)):
            values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            values = values * len(kernel) if len(values) == 1 else values
            if len(values) != len(kernel):
                return invalid
            for number in values:
                if type(number) is not int or number < least:
                    return invalid
            read.append(values)
        strides, paddings, dilations = read
        extra = None
        if same:
            if any(number != 1 for number in strides):
                return invalid
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            paddings = tuple(total // 2 for total in totals)
            if any(total % 2 for total in totals):
                extra = tuple(total % 2 for total in totals)
        return cls(stride, padding, dilation, groups, (strides, paddings, dilations), extra)


def _accepts(dimensions: int, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> str | None:
    unfit = mismatch(input, weight) if bias is None else mismatch(input, weight, bias)
    if unfit is not None:
        return unfit
    if input.dim() not in (dimensions + 1, dimensions + 2) or weight.dim() != dimensions + 2:
        return f"input and weight shapes do not make a convolution in {dimensions} dimensions"
    size, groups = weight.shape, options.groups
    if type(groups) is not int or groups < 1 or size[0] % groups != 0:
        return "groups do not divide the channels"
    if input.shape[-1 - dimensions] != size[1] * groups:
        return "input and weight do not have the same channels"
    if bias is not None and bias.shape != size[:1]:
        return "bias does not have one element per output channel"
    if options.numbers is None:
        return "stride, padding or dilation is not valid"
    extra = options.extra or (0,) * dimensions
    for n, end, k, _, p, d in zip(input.shape[-dimensions:], extra, size[2:], *options.numbers, strict=True):
        if n + end + 2 * p - d * (k - 1) - 1 < 0:
            return "the kernel is larger than the input"
    return None


# The way --------------------------------------------------------------------------------------------------------------

_ATEN_IS_ONEDNN: Final = Explanation("torch", "ATen's convolution on a CPU is oneDNN's already")
_BARE: Final = Explanation("torch", "a convolution alone fuses nothing: cuDNN or MIOpen computes it")
_EPILOGUE: Final = Explanation(
    "triton",
    "bias and ReLU run in the epilogue of the convolution",
    "vendor",
    "one kernel masks and sums the gradient; the rest fuses nothing, and cuDNN or MIOpen computes it",
)
_DEPTHWISE: Final = Explanation(
    "triton",
    "bias and ReLU run in the epilogue of a depthwise convolution, which takes no longer than memory",
    _EPILOGUE.backward,
    _EPILOGUE.backward_reason,
)
_MANY_TAPS: Final = Explanation(
    "torch", "a depthwise one of so many taps computes for longer than it moves memory: cuDNN or MIOpen computes it"
)
_CONVERTED: Final = Explanation(
    "torch", "to convert it to channels-last would move more than its ReLU: cuDNN or MIOpen computes it"
)
PASSES: Final = 4  # over the output that kernels save, forward alone: cuDNN adds the bias in a pass of its own
_MOST_TAPS: Final = 25  # 5 x 5


def _gpu(relu: bool, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> Explanation:
    if not relu:
        return _BARE
    depthwise = weight.shape[1] == 1 and options.groups > 1
    if depthwise and math.prod(weight.shape[2:]) > _MOST_TAPS:
        return _MANY_TAPS
    batch = input if input.dim() == weight.dim() else input.unsqueeze(0)
    if not is_channels_last(batch, weight):
        return _CONVERTED
    if depthwise:
        return _DEPTHWISE
    rounded = weight.shape[0] % 4 == weight.shape[1] % 4 == 0 or input.dtype.itemsize == 2  # `input_precision`
    return EXACT if is_exact(input.dtype, "conv") or not rounded else _EPILOGUE


def _saved_bytes(input: Any, weight: Any, bias: Any, options: ConvOptions) -> float:
    if options.numbers is None or not isinstance(weight, Tensor) or weight.dim() < 3 or not weight.shape[1]:
        return 0
    if type(options.groups) is not int or options.groups < 1:
        return 0
    outputs = input.numel() / math.prod(options.numbers[0]) * weight.shape[0] / (weight.shape[1] * options.groups)
    return PASSES * outputs * input.element_size()


# Computation ----------------------------------------------------------------------------------------------------------


def is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """torch's rule: the output and both gradients are channels-last if input or weight is, else contiguous."""
    contiguous = torch.contiguous_format
    return memory_format(input) is not contiguous or memory_format(weight) is not contiguous


def _expression(
    function: Callable[..., Tensor],
    relu: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
) -> Tensor:
    output = function(input, weight, bias, *options[:4])
    return output.relu_() if relu else output


def _raw_arguments(
    way: str, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions
) -> tuple[Any, ...]:
    assert options.numbers is not None
    if options.extra is not None:  # torch too pads the end first
        input = F.pad(input, [number for end in reversed(options.extra) for number in (0, end)])
    batch = input if input.dim() == weight.dim() else input.unsqueeze(0)
    contiguous = torch.contiguous_format  # `is_channels_last`, without the cost of a function call
    last = memory_format(batch) is not contiguous or memory_format(weight) is not contiguous
    return batch, weight, bias, *options.numbers, options.groups, last


def _finish(output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return output if input.dim() == output.dim() else output.squeeze(0)


# By the number of dimensions and whether channels are last.
_MEMORY_FORMATS: Final = {
    **{(dimensions, False): torch.contiguous_format for dimensions in (1, 2, 3)},
    (2, True): torch.channels_last,
    (3, True): torch.channels_last_3d,
}


def _forward(conv: Callable[..., Tensor], activation: Any, **before: Tensor | None) -> Callable[..., Tensor]:
    """`kernels.conv.conv`, or its twin that has a bool for ReLU, as a function of the raw op's arguments."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        memory_format = _MEMORY_FORMATS[len(options[0]), options[-1]]
        return conv(input, weight, bias, *options[:-1], activation, memory_format, **before)

    return call


def _backward(conv_backward: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """A twin of `kernels.conv.conv_backward` as a function of the arguments of the raw op's backward."""

    def call(*arguments: Any, **keywords: Any) -> Tensors:
        *common, channels_last, _, _, need_bias = arguments
        memory_format = _MEMORY_FORMATS[len(common[6]), channels_last]
        return conv_backward(*common, need_bias, memory_format, **keywords)

    return call


def load(activation: Activation, before: Tensor | None = None) -> tuple[Callable[..., Tensor], Callable[..., Tensors]]:
    """The launchers of a convolution with this activation; the backward pass takes it as a keyword."""
    from ..kernels import conv

    return _forward(conv.conv, activation, before=before), _backward(conv.conv_backward)


def _save(
    needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], output: Tensor
) -> tuple[Tensors, tuple[Any, ...]]:
    input, weight, _, *options = arguments
    saved = (input if needs[1] else None, weight if needs[0] else None, output if op.fuses else None)
    return saved, (input.shape, weight.shape, *options)


def _empty(like: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, dilation, _, channels_last, _ = rest
    size = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty(input, (input.shape[0], weight.shape[0], *size), _MEMORY_FORMATS[len(stride), channels_last])


def _fake_backward(grad_output: Tensor, input: Tensor | None, weight: Tensor | None, *rest: Any) -> list[Tensor]:
    _, input_shape, weight_shape, stride, _, _, _, channels_last, _, _, need_bias, _ = rest
    memory_format = _MEMORY_FORMATS[len(stride), channels_last]
    return [
        grad_output.new_empty(0) if weight is None else _empty(grad_output, input_shape, memory_format),
        grad_output.new_empty(0) if input is None else _empty(grad_output, weight_shape, memory_format),
        grad_output.new_empty(weight_shape[0] if need_bias else 0),
    ]


# Examples -------------------------------------------------------------------------------------------------------------


def _examples(dimensions: int) -> Iterator[Example]:
    def example(
        name: str, kernel: int, groups: int = 1, bias: bool = True, channels_last: bool = False, **options: Any
    ) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            channels, outputs = groups * (1 + sizes.outputs // 4), groups * (1 + sizes.features // 8)
            size = 6 - dimensions if sizes.rows == 2 else 11 - 2 * dimensions
            variables = {
                "input": torch.randn(2, channels, *(size,) * dimensions, generator=generator),
                "weight": torch.randn(outputs, channels // groups, *(kernel,) * dimensions, generator=generator),
            }
            if channels_last:
                variables = {n: t.to(memory_format=torch.channels_last) for n, t in variables.items()}
            if bias:
                variables["bias"] = torch.randn(outputs, generator=generator)
            return variables, {}

        return Example(name, draw, {"groups": groups, **options})

    yield example("3, padding 1", 3, padding=1)
    if dimensions == 2:
        yield example("1", 1)
        yield example("3, stride 2, dilation 2, no bias", 3, stride=2, dilation=2, padding=2, bias=False)
        yield example("3, groups 2, channels_last", 3, groups=2, channels_last=True)


def timed(
    batch: int, size: int, channels: int, outputs: int, kernel: int, channels_last: bool = False, **options: int
) -> Example:
    """A layer as torch initializes it, on images of this size."""

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        layer = torch.nn.Conv2d(channels, outputs, kernel)
        tensors = {
            "input": torch.randn(batch, channels, size, size, generator=generator),
            "weight": layer.weight.detach(),
        }
        if channels_last:
            tensors = {name: tensor.to(memory_format=torch.channels_last) for name, tensor in tensors.items()}
        assert layer.bias is not None
        return {**tensors, "bias": layer.bias.detach()}, {}

    shown = "".join(f"-{name}{value}" for name, value in options.items()) + ("-channels_last" if channels_last else "")
    return Example(f"{batch}x{channels}x{size}x{size}-{outputs}k{kernel}{shown}", draw, options)


_TIMED: Final = {
    "conv2d": [
        timed(8, 56, 64, 64, 3, padding=1),  # ResNet-18
        timed(8, 56, 64, 128, 3, padding=1, stride=2),
        timed(8, 56, 64, 128, 1, stride=2),
    ],
    "conv_relu2d": [
        timed(64, 32, 1, 6, 3),  # LeNet
        timed(64, 15, 6, 16, 3),
        timed(8, 56, 64, 64, 3, padding=1),
        timed(8, 56, 64, 64, 3, padding=1, channels_last=True),
        timed(8, 56, 64, 256, 1),
    ],
}


def _audit(audit: Audit) -> Iterator[Any]:
    """Every tile of the tables, and the one of sums in parts; backward with all of one 16-bit dtype; few channels, odd
    ones, groups and volumes; few positions, where weights are read as they lie; the first tile in channels-last too."""
    conv, conv_backward = load(RELU)
    body, stride_2 = (8, 256, (28, 28), 256, (3, 3), 1, 1), (8, 128, (28, 28), 64, (3, 3), 2, 1)
    deep = (8, 512, (7, 7), 512, (3, 3), 1, 1)
    others = (
        (8, 3, (64, 64), 64, (7, 7), 2, 1),  # a stem
        (8, 1, (32, 32), 6, (5, 5), 1, 1),  # one channel
        (8, 256, (4, 4), 256, (3, 3), 1, 1),  # few positions, sums in parts
        (8, 24, (4, 4), 40, (3, 3), 1, 1),  # short sums
        (8, 24, (28, 28), 40, (3, 3), 1, 1),  # channels that are multiples of 8 alone
        (8, 6, (28, 28), 13, (5, 5), 1, 1),  # odd ones
        (8, 64, (28, 28), 128, (3, 3), 1, 2),
        (8, 64, (100,), 64, (5,), 2, 1),
        (2, 32, (8, 14, 14), 64, (3, 3, 3), 2, 1),
    )
    half = audit.half_dtypes[0]
    for dtype, precision, tiles, _ in audit.tables():
        if precision != "ieee" and audit.target.startswith("gfx"):
            continue  # `input_precision`: AMD's convolutions are float32
        table: list[tuple[Any, tuple[Any, ...], bool]] = [*((tile, body, False) for tile in tiles), (None, deep, True)]
        if dtype is half:
            table += [(tiles[0], body, True), (tiles[0], stride_2, False), *((None, shape, False) for shape in others)]
        for tile, shape, last in table:
            N, C, size, out, kernel, stride, groups = shape
            n = len(size)
            x, w, b = (audit.empty(*s, dtype=dtype) for s in ((N, C, *size), (out, C // groups, *kernel), (out,)))
            if last:
                x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
            options = (stride,) * n, tuple(k // 2 for k in kernel), (1,) * n, groups, last
            name = f"{'x'.join(map(str, x.shape))} * {'x'.join(map(str, w.shape))} stride {stride}"
            name += " channels_last" if last else ""
            launches = partial(audit.launches, name + (f" groups {groups}" if groups > 1 else ""), tile, precision)
            y, found = launches(conv, x, w, b, *options)
            if tile == tiles[0] and shape == body:  # an activation with long code, and a second result
                forward = load(("tanh",), y.movedim(1, -1).contiguous().movedim(-1, 1))[0]
                found += launches(forward, x, w, b, *options)[1]
            if dtype is half or tile in (None, tiles[0]):
                found += launches(conv_backward, y, x, w, y, x.shape, w.shape, *options, True, True, True)[1]
            large = tile == tiles[0] and shape == body
            even = C // groups % 8 == 0 and out // groups % 8 == 0
            for launch in found:
                half_product = launch.product and dtype.itemsize == 2
                yield launch._replace(wide=half_product and even, leading=large and dtype.itemsize == 2)
    yield from _audit_depthwise(audit)


def _audit_depthwise(audit: Audit) -> Iterator[Any]:
    """Kernels of all sizes in one 16-bit dtype, the usual ones in the others; several outputs; odd channels."""
    conv, conv_backward = load(RELU)
    usual = ((8, 64, (56, 56), 64, (3, 3), 1), (8, 64, (56, 56), 64, (3, 3), 2), (8, 64, (56, 56), 64, (5, 5), 1))
    others = (
        (8, 96, (56, 56), 96, (7, 7), 1),
        (8, 960, (7, 7), 960, (5, 5), 1),
        (8, 64, (28, 28), 64, (19, 19), 1),  # all taps a loop
        (8, 64, (56, 56), 128, (3, 3), 1),
        (8, 13, (55, 53), 13, (3, 3), 1),
        (8, 64, (1000,), 64, (9,), 1),
        (2, 64, (16, 28, 28), 64, (3, 3, 3), 2),
    )
    for dtype in audit.dtypes:
        for N, C, size, out, kernel, stride in (*usual, *others) if dtype is audit.half_dtypes[0] else usual:
            n = len(size)
            x, w, b = (audit.empty(*s, dtype=dtype) for s in ((N, C, *size), (out, 1, *kernel), (out,)))
            options = (stride,) * n, tuple(k // 2 for k in kernel), (1,) * n, C, n > 1
            name = f"{'x'.join(map(str, x.shape))} * {'x'.join(map(str, w.shape))} stride {stride} groups {C}"
            y, found = audit.launches(name, None, "ieee", conv, x, w, b, *options)
            words = y, x, w, y, x.shape, w.shape, *options, True, True, True
            found += audit.launches(name, None, "ieee", conv_backward, *words)[1]
            for launch in found:
                constants = launch.request["constants"]
                if out == C and C % 8 == 0 and launch.kernel.startswith("depthwise") and "PATCH" in constants:
                    # Each thread reads or writes 16 bytes for each position of its patch.
                    launch = launch._replace(stream=16 * constants["PATCH"], narrow=True)
                yield launch


def _make(dimensions: int, relu: bool) -> Op:
    plain = f"conv{dimensions}d"
    name = f"conv_relu{dimensions}d" if relu else plain
    function = getattr(F, plain)
    return Op(
        name=name,
        replaces=() if relu else (function,),
        module=None if relu else getattr(torch.nn, f"Conv{dimensions}d"),
        fuses=(plain, "relu") if relu else None,
        accepts=partial(_accepts, dimensions),
        cpu=lambda *_: _ATEN_IS_ONEDNN,
        gpu=partial(_gpu, relu),
        saved_bytes=_saved_bytes if relu else passes(0),
        onednn=True,
        autocast="lower",
        expression=partial(_expression, function, relu),
        gradients=_backward(onednn.conv_backward),
        load=partial(load, RELU if relu else NONE),
        plain=_forward(onednn.conv, relu),
        schema="Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
        " bool channels_last -> Tensor",
        backward_schema="Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, SymInt[] input_shape,"
        " SymInt[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, bool channels_last,"
        " bool need_input, bool need_weight, bool need_bias -> (Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        tensors=3,
        flops=(flops.convolution, flops.convolution_backward),
        variables=3,
        raw_arguments=_raw_arguments,
        finish=_finish,
        save=_save,
        examples=tuple(_examples(dimensions)),
        timed=_TIMED.get(name, ()),
        audit=_audit if name == "conv2d" else None,
    )


# By the number of dimensions and whether there is a ReLU.
CONV: Final = {(dimensions, relu): _make(dimensions, relu) for dimensions in (1, 2, 3) for relu in (False, True)}
