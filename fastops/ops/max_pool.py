"""ReLU and maximum pooling in two dimensions: ``max_pool2d(relu(x))``, which is ``relu(max_pool2d(x))``.

Both have the same values and gradients, but where a window lies wholly in the padding. Pooled first, fewer elements are
left for ReLU. ``kernels/max_pool.py`` has the formulas, and says what taps are.

A call is ``(input, options)``. The output is not saved: it may be changed in place afterwards, as behind torch's two
calls. The input is, and may not; torch keeps what its ReLU made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.geometry import CHANNELS_LAST, Window, memory_format_of
from .accepts import Tensors, mismatch
from .examples import Audit, Example, Named, Sizes
from .op import Op, passes

DEAD: Final = 255  # the tap of a window that ReLU lets no gradient through to
MOST_TAPS: Final = 64  # of a window: kernels look at one after the other


class PoolOptions(NamedTuple):
    """What a pooling is called with besides the input, as given, and as numbers: None if they are not valid."""

    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    window: Window | None

    @classmethod
    def of(cls, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> PoolOptions:
        """The options of a call, which has one of these objects from here on."""
        invalid = cls(kernel_size, stride, padding, dilation, ceil_mode, None)
        if type(ceil_mode) is not bool:
            return invalid
        read = []
        without = stride is None or (isinstance(stride, (tuple, list)) and not stride)
        for value, least in ((kernel_size, 1), (kernel_size if without else stride, 1), (padding, 0), (dilation, 1)):
            values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            values = values * 2 if len(values) == 1 else values
            if len(values) != 2:
                return invalid
            for number in values:
                if type(number) is not int or number < least:
                    return invalid
            read.append(values)
        kernel, strides, paddings, dilations = read
        if any(p > k // 2 for k, p in zip(kernel, paddings, strict=True)):
            return invalid
        return invalid._replace(window=Window(kernel, strides, paddings, dilations, ceil_mode))


def _unfit(input: Tensor, options: PoolOptions) -> str | None:
    """Why ReLU must come first, or None."""
    if (unfit := mismatch(input)) is not None:
        return unfit
    if input.dim() not in (3, 4):
        return "input has no two spatial dimensions"
    window = options.window
    if window is None:
        return "kernel size, stride, padding, dilation or ceil_mode is not valid"
    for size, out, dilation in zip(
        input.shape[-2:], window.output_size(input.shape[-2:]), window.dilation, strict=True
    ):
        if out < 1:
            return "the window is larger than the input"
        if size < dilation:
            return "a window may lie wholly in the padding"
    return None


def _accepts(input: Tensor, options: PoolOptions) -> str | None:
    unfit = _unfit(input, options)
    if unfit is None and options.window is not None and options.window.kernel[0] * options.window.kernel[1] > MOST_TAPS:
        return f"a window has more than {MOST_TAPS} elements"
    return unfit


# Computation ----------------------------------------------------------------------------------------------------------


def _expression(input: Tensor, options: PoolOptions) -> Tensor:
    *words, _ = options
    if _unfit(input, options) is not None:
        return F.max_pool2d(F.relu(input), *words)
    # A ReLU would save its result, which nobody could change in place any more; this saves what it is applied to.
    return F.threshold(F.max_pool2d(input, *words), 0, 0)


def _raw_arguments(way: str, input: Tensor, options: PoolOptions) -> tuple[Any, ...]:
    assert options.window is not None
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    return batch, *options.window, torch.is_grad_enabled() and input.requires_grad


def _finish(output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return output if input.dim() == 4 else output.squeeze(0)


def _plain(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *window, save_taps = arguments
    output, indices = torch.ops.aten.max_pool2d_with_indices(input, *window)
    taps = _taps(output, indices, input.shape, *window) if save_taps else input.new_empty(0, dtype=torch.uint8)
    return output.relu_(), taps


def _corners(like: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the windows of an output begin: a row for each line of them, a column for each in a line."""
    line, each = (torch.arange(like.shape[dim], device=like.device) for dim in (2, 3))
    return (line * stride[0] - padding[0])[:, None], each * stride[1] - padding[1]


def _taps(output: Tensor, indices: Tensor, shape: Sequence[int], *window: Any) -> Tensor:
    """A byte for each window of what torch's pooling gives."""
    kernel, stride, padding, dilation, _ = window
    row, column = _corners(indices, stride, padding)
    i, j = (indices // shape[3] - row) // dilation[0], (indices % shape[3] - column) // dilation[1]
    return torch.where(output <= 0, DEAD, i * kernel[1] + j).to(torch.uint8)


def _gradients(grad_output: Tensor, input: Tensor, taps: Tensor, *arguments: Any) -> Tensors:
    """By torch's own backward pass, which wants indices, and the input for its shape and its place in a graph."""
    *window, _, _ = arguments
    kernel, stride, padding, dilation, _ = window
    if not taps.numel():  # captured in a graph where no gradient was wanted
        taps = _plain(input.detach(), *window, True)[1]
    row, column = _corners(taps, stride, padding)
    dead, tap = taps == DEAD, taps.long()
    row, column = row + tap // kernel[1] * dilation[0], column + tap % kernel[1] * dilation[1]
    indices = torch.where(dead, 0, row * input.shape[3] + column)
    gz = grad_output.masked_fill(dead, 0)
    return (torch.ops.aten.max_pool2d_with_indices_backward(gz, input, *window, indices),)


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import max_pool

    forward: Callable[..., tuple[Tensor, Tensor]] = max_pool.relu_max_pool
    launch: Callable[..., Tensor] = max_pool.relu_max_pool_backward

    def backward(grad_output: Tensor, input: Tensor, taps: Tensor, *arguments: Any) -> Tensors:
        *window, channels_last, _ = arguments
        if not taps.numel():
            taps = forward(input, *window, True)[1]
        return (launch(grad_output, taps, input.shape, *window, channels_last),)

    return forward, backward


def _save(
    needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]
) -> tuple[Tensors, tuple[Any, ...]]:
    input, *window, _ = arguments
    return (input, results[1]), (*window, memory_format_of(input) is not torch.contiguous_format)


def _fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *window, save_taps, _ = arguments
    dense = torch.empty_like(input, memory_format=memory_format_of(input))
    output = torch.ops.aten.max_pool2d_with_indices(dense, *window)[0]
    taps = torch.empty_like(output, dtype=torch.uint8) if save_taps else input.new_empty(0, dtype=torch.uint8)
    return output, taps


def _fake_backward(grad_output: Tensor, input: Tensor, taps: Tensor, *rest: Any) -> Tensor:
    *_, channels_last, _, _ = rest
    layout = CHANNELS_LAST[4] if channels_last else torch.contiguous_format
    return torch.empty_like(input, memory_format=layout)


# Examples -------------------------------------------------------------------------------------------------------------


def _examples() -> Iterator[Example]:
    def example(name: str, channels_last: bool = False, **options: Any) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            rows, features, outputs = sizes
            input = torch.randn(rows, outputs, 5, 4 + features % 8, generator=generator)
            return {"input": input.to(memory_format=torch.channels_last) if channels_last else input}, {}

        return Example(name, draw, options)

    yield example("2", kernel_size=2)
    yield example("3, stride 2, padding 1", kernel_size=3, stride=2, padding=1)
    yield example("3, stride 2, padding 1, channels_last", True, kernel_size=3, stride=2, padding=1)
    yield example("2, stride 1, dilation 2, ceil_mode", kernel_size=2, stride=1, dilation=2, ceil_mode=True)


def timed(batch: int, channels: int, size: int, channels_last: bool = False, **options: int) -> Example:
    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        input = torch.randn(batch, channels, size, size, generator=generator)
        return {"input": input.to(memory_format=torch.channels_last) if channels_last else input}, {}

    shown = "".join(f"-{name}{value}" for name, value in options.items()) + ("-channels_last" if channels_last else "")
    return Example(f"{batch}x{channels}x{size}x{size}{shown}", draw, options)


def _audit(audit: Audit) -> Iterator[Any]:
    """Each dtype in both layouts, windows that overlap and others; of one 16-bit dtype odd sizes and large windows."""
    forward, backward = _load()
    half = audit.half_dtypes[0]
    stem = (32, 64, 112, 112), (3, 3), (2, 2), (1, 1), (1, 1)
    halves = (32, 64, 56, 56), (2, 2), (2, 2), (0, 0), (1, 1)
    odd = (5, 67, 13, 13), *stem[1:]
    large = (8, 256, 28, 28), (5, 5), (1, 1), (2, 2), (1, 1)
    kinds = [(dtype, case) for dtype in audit.dtypes for case in (stem, halves)] + [(half, odd), (half, large)]
    for (dtype, (shape, *window)), last in ((kind, last) for kind in kinds for last in (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        x = audit.empty(*shape, dtype=dtype).to(memory_format=layout)
        name = f"{'x'.join(map(str, shape))} {window[0][0]} stride {window[1][0]}{' channels_last' if last else ''}"
        launches = partial(audit.launches, name, None, "ieee")
        (output, taps), found = launches(forward, x, *window, False, True)
        found += launches(backward, output, x, taps, *window, False, last, True)[1]
        for launch in found:
            yield launch._replace(wide=last and shape[1] % 8 == 0)


_WINDOW: Final = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
RELU_MAX_POOL2D: Final = Op(
    name="relu_max_pool2d",
    fuses=("relu", "max_pool2d"),
    accepts=_accepts,
    saved_bytes=passes(3),
    expression=_expression,
    gradients=_gradients,
    load=_load,
    plain=_plain,
    schema=f"Tensor input, {_WINDOW}, bool save_taps -> (Tensor, Tensor)",
    backward_schema=f"Tensor grad_output, Tensor input, Tensor taps, {_WINDOW}, bool channels_last,"
    " bool need_input -> Tensor",
    fake=_fake,
    fake_backward=_fake_backward,
    tensors=1,
    variables=1,
    raw_arguments=_raw_arguments,
    finish=_finish,
    save=_save,
    examples=tuple(_examples()),
    timed=[
        timed(64, 6, 30, kernel_size=2),  # LeNet
        timed(8, 64, 112, kernel_size=3, stride=2, padding=1),  # ResNet-18
        timed(8, 64, 112, True, kernel_size=3, stride=2, padding=1),
    ],
    audit=_audit,
)
