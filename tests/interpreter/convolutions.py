"""Convolutions that several files test, and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.kernels import conv
from fastops.kernels.activation import NONE, RELU
from fastops.kernels.configs import ConvConfig
from fastops.kernels.geometry import conv_output_size

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TORCHS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def small_config(channels: int) -> ConvConfig:
    """Tiles so small that there are several in each direction."""
    return ConvConfig(16, 16, 16, 1, 1, channels % 16 != 0)


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "conv_config", lambda *arguments: small_config(channels=arguments[4]))
    monkeypatch.setattr(conv, "conv_grad_weight_config", lambda *arguments: small_config(channels=arguments[3]))


def every_second(shape: Sequence[int]) -> Tensor:
    """A slice of a larger tensor: no two of its elements lie side by side."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


def channels_last(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "NCHW": torch.randn,
    "channels_last": channels_last,
    "slice": every_second,
}
# Shapes of input and weight, then what differs from stride 1, no padding, dilation 1 and one group.
GUARDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one": ((1, 1, 1), (1, 1, 1), {"stride": 2}),
    "tile-1": ((1, 15, 15), (15, 15, 3), {"padding": 1}),
    "tile": ((1, 16, 16), (16, 16, 3), {"padding": 1}),
    "tile+1": ((1, 17, 17), (17, 17, 3), {"padding": 1}),
    "whole channels": ((1, 32, 5, 4), (48, 32, 2, 2), {}),
    "64 to 33 channels": ((1, 64, 4, 3), (33, 64, 2, 1), {"padding": 1}),
    "24 to 13 channels": ((2, 24, 4, 3), (13, 24, 3, 2), {"stride": 2, "padding": 1}),
    "3 to 8 channels": ((2, 3, 7, 6), (8, 3, 3, 3), {"stride": 2, "padding": 1}),
    "pointwise": ((2, 5, 3, 3), (7, 5, 1, 1), {}),
    "pointwise groups": ((2, 6, 3, 3), (4, 3, 1, 1), {"groups": 2}),
    "groups": ((1, 32, 4, 4), (48, 16, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 5, 5, 4), (10, 1, 3, 2), {"groups": 5, "stride": 2, "padding": 1}),
    "stride beyond kernel": ((2, 3, 8, 7), (2, 3, 2, 1), {"stride": 3}),
    "padding beyond kernel": ((1, 3, 3, 2), (4, 3, 2, 2), {"stride": 2, "padding": 4}),
    "dilation": ((1, 2, 7, 8), (3, 2, 3, 3), {"dilation": 2, "padding": 1}),
    "dilation and stride": ((1, 2, 9, 8), (3, 2, 3, 3), {"dilation": 2, "stride": 4, "padding": 2}),
    "1d": ((2, 3, 20), (4, 3, 5), {"stride": 2, "padding": 2}),
    "3d": ((1, 2, 3, 4, 5), (3, 2, 2, 1, 3), {"stride": 2, "padding": 1}),
}


def numbers(weight_shape: Sequence[int], options: dict[str, Any]) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups as the kernels take them."""
    n = len(weight_shape) - 2
    each = ((options.get(name, default),) * n for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return (*each, options.get("groups", 1))


def memory_format(dimensions: int, last: bool) -> torch.memory_format:
    return CHANNELS_LAST[dimensions] if last and dimensions > 1 else torch.contiguous_format


Call = Callable[..., Any]


def forward_and_backward(
    call: Call, tensors: Sequence[Tensor | None], options: dict[str, Any], relu: bool, last: bool = False
) -> tuple[Tensor, ...]:
    """``(y, gx, gw, gb)`` of the kernels for ``(x, w, b, gy)``."""
    input, weight, bias, grad_output = tensors
    assert input is not None and weight is not None
    of_all = numbers(weight.shape, options)
    layout = memory_format(weight.dim() - 2, last)
    output = call(conv.conv, input, weight, bias, *of_all, RELU if relu else NONE, layout)
    shapes = tuple(input.shape), tuple(weight.shape)
    mask = output if relu else None
    gradients = call(conv.conv_backward, grad_output, input, weight, mask, *shapes, *of_all, True, layout)
    return output, *gradients


def torchs(options: dict[str, Any], relu: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """torch's `forward_and_backward`."""
    *leaves, grad_output = (tensor.detach().requires_grad_() for tensor in tensors)
    output = TORCHS[leaves[0].dim() - 2](*leaves, **options)
    output = torch.relu(output) if relu else output
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def whole_numbers(shape: Sequence[int]) -> Tensor:
    """Values whose products and sums are exact in float32 in any order."""
    return torch.randint(-4, 5, tuple(shape)).float()


def whole_tensors(name: str, make: Callable[[Sequence[int]], Tensor] = whole_numbers) -> tuple[Tensor, ...]:
    """``(x, w, b, gy)`` for an entry of `GUARDED`."""
    input_shape, weight_shape, options = GUARDED[name]
    size = conv_output_size(input_shape[2:], weight_shape[2:], *numbers(weight_shape, options)[:3])
    shapes = input_shape, weight_shape, weight_shape[:1], (input_shape[0], weight_shape[0], *size)
    return tuple(make(shape) for shape in shapes)


def strides_that_count(tensor: Tensor) -> list[int]:
    """Without those of dimensions of size 1, which say nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
