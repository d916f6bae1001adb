"""Convolutions: same parameters, same constructor and same keys as in `torch.nn`; only ``forward`` differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..dispatch import is_left_to_torch
from .activated import Activated
from .overrides import overrides, replaced
from .shown import shown

__all__ = [
    *("Conv1d", "Conv2d", "Conv3d", "ConvAct1d", "ConvAct2d", "ConvAct3d"),
    *("ConvReLU1d", "ConvReLU2d", "ConvReLU3d"),
]


def convolved(
    function: Callable[..., Tensor], layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``function`` of `fastops.functional` with all options of a `torch.nn` convolution."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return function(input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def _is_changed(layer: Any, kind: type) -> bool:
    """Whether somebody put another convolution into torch's class, or onto ``layer`` itself."""
    return replaced(kind) or "_conv_forward" in layer.__dict__


def _forward(function: Callable[..., Tensor], layer: Any, input: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if overrides(input, weight, bias) or is_left_to_torch(input):
        return layer._conv_forward(input, weight, bias)
    return convolved(function, layer, input, weight, bias)


class Conv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` on `fastops.functional.conv1d`: [N, C, L] or [C, L] -> [N, O, L'] or [O, L']."""

    extra_repr = shown(torch.nn.Conv1d)

    def forward(self, input: Tensor) -> Tensor:
        if _is_changed(self, torch.nn.Conv1d):
            return super().forward(input)
        return _forward(FF.conv1d, self, input)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on `fastops.functional.conv2d`: [N, C, H, W] or [C, H, W] -> [N, O, H', W'] or [O, H', W']."""

    extra_repr = shown(torch.nn.Conv2d)

    def forward(self, input: Tensor) -> Tensor:
        if _is_changed(self, torch.nn.Conv2d):
            return super().forward(input)
        return _forward(FF.conv2d, self, input)


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on `fastops.functional.conv3d`: [N, C, D, H, W] or [C, D, H, W] -> the same with O channels."""

    extra_repr = shown(torch.nn.Conv3d)

    def forward(self, input: Tensor) -> Tensor:
        if _is_changed(self, torch.nn.Conv3d):
            return super().forward(input)
        return _forward(FF.conv3d, self, input)


class ConvReLU1d(torch.nn.Conv1d):
    """`Conv1d` followed by ReLU, in one kernel. The name is that of `torch.ao.nn.intrinsic.ConvReLU1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return convolved(FF.conv_relu1d, self, input, self.weight, self.bias)


class ConvReLU2d(torch.nn.Conv2d):
    """`Conv2d` followed by ReLU, in one kernel. The name is that of `torch.ao.nn.intrinsic.ConvReLU2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return convolved(FF.conv_relu2d, self, input, self.weight, self.bias)


class ConvReLU3d(torch.nn.Conv3d):
    """`Conv3d` followed by ReLU, in one kernel. The name is that of `torch.ao.nn.intrinsic.ConvReLU3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return convolved(FF.conv_relu3d, self, input, self.weight, self.bias)


class ConvAct1d(Activated, torch.nn.Conv1d):
    """`Conv1d` followed by an activation, in one kernel.

    Args:
        arguments, options: as of `torch.nn.Conv1d`, and parameters of the activation, such as ``negative_slope`` of
            ``"leaky_relu"``.
        activation: a name that `fastops.functional.linear_act` knows.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """

    def forward(self, input: Tensor) -> Tensor:
        return convolved(self.activated(FF.conv_act1d), self, input, self.weight, self.bias)


class ConvAct2d(Activated, torch.nn.Conv2d):
    """`Conv2d` followed by an activation, in one kernel: see `ConvAct1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return convolved(self.activated(FF.conv_act2d), self, input, self.weight, self.bias)


class ConvAct3d(Activated, torch.nn.Conv3d):
    """`Conv3d` followed by an activation, in one kernel: see `ConvAct1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return convolved(self.activated(FF.conv_act3d), self, input, self.weight, self.bias)
