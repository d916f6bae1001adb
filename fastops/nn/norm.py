"""Batch norms: with an activation, and those that `fastops.swap` puts into models, which by themselves are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as FF
from .activated import Activated
from .shown import shown

__all__ = [
    *("BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"),
    *("BatchNormReLU1d", "BatchNormReLU2d", "BatchNormReLU3d"),
]


def normalized(function: Callable[..., Tensor], layer: Any, input: Tensor, *others: Tensor) -> Tensor:
    """``function(input, *others, ..)`` with all options of a `torch.nn` batch norm, whose counter it advances."""
    layer._check_input_dim(input)
    training, momentum = layer.training, layer.momentum
    mean, var = layer.running_mean, layer.running_var
    if training and not layer.track_running_stats:
        mean = var = None
    elif training and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:  # the mean of all batches
            momentum = 1.0 / float(layer.num_batches_tracked)
    batch = training or (mean is None and var is None)
    arguments = mean, var, layer.weight, layer.bias, batch, 0.0 if momentum is None else momentum, layer.eps
    return function(input, *others, *arguments)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, which `fastops.swap` runs in one call with its neighbours."""

    extra_repr = shown(torch.nn.BatchNorm1d)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, which `fastops.swap` runs in one call with its neighbours."""

    extra_repr = shown(torch.nn.BatchNorm2d)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, which `fastops.swap` runs in one call with its neighbours."""

    extra_repr = shown(torch.nn.BatchNorm3d)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class BatchNormReLU1d(torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` followed by ReLU, on `fastops.functional.batch_norm_relu`: [N, C] or [N, C, L]."""

    def forward(self, input: Tensor) -> Tensor:
        return normalized(FF.batch_norm_relu, self, input)


class BatchNormReLU2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` followed by ReLU, on `fastops.functional.batch_norm_relu`: [N, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return normalized(FF.batch_norm_relu, self, input)


class BatchNormReLU3d(torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` followed by ReLU, on `fastops.functional.batch_norm_relu`: [N, C, D, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return normalized(FF.batch_norm_relu, self, input)


class BatchNormAct1d(Activated, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` followed by an activation, on `fastops.functional.batch_norm_act`.

    Args:
        arguments, options: as of `torch.nn.BatchNorm1d`, and parameters of the activation, such as ``negative_slope``
            of ``"leaky_relu"``.
        activation: a name that `fastops.functional.linear_act` knows.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """

    def forward(self, input: Tensor) -> Tensor:
        return normalized(self.activated(FF.batch_norm_act), self, input)


class BatchNormAct2d(Activated, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` followed by an activation: see `BatchNormAct1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return normalized(self.activated(FF.batch_norm_act), self, input)


class BatchNormAct3d(Activated, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` followed by an activation: see `BatchNormAct1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return normalized(self.activated(FF.batch_norm_act), self, input)
