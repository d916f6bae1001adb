"""Losses: same constructors as in `torch.nn`; only ``forward`` differs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backport
from .. import functional as FF
from .overrides import replaced

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "MSELoss",
    "SmoothL1Loss",
]


class MSELoss(torch.nn.MSELoss):
    """`torch.nn.MSELoss` on `fastops.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(torch.nn.MSELoss):
            return super().forward(input, target)
        return FF.mse_loss(input, target, None, None, self.reduction)


class L1Loss(torch.nn.L1Loss):
    """`torch.nn.L1Loss` on `fastops.functional.l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(torch.nn.L1Loss):
            return super().forward(input, target)
        return FF.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss` on `fastops.functional.smooth_l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(torch.nn.SmoothL1Loss):
            return super().forward(input, target)
        return FF.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """`torch.nn.HuberLoss` on `fastops.functional.huber_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(torch.nn.HuberLoss):
            return super().forward(input, target)
        return FF.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `fastops.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(torch.nn.CrossEntropyLoss):
            return super().forward(input, target)
        return FF.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss` on `fastops.functional.binary_cross_entropy_with_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(torch.nn.BCEWithLogitsLoss):
            return super().forward(input, target)
        return FF.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


@dataclass(slots=True, frozen=True)
class LinearCrossEntropyOptions(backport.LinearCrossEntropyOptions):
    """`torch.nn.LinearCrossEntropyOptions` with a budget instead of a chunk size.

    ``memory_budget`` is how many bytes of logits may exist at a time; the rest of the working memory is a few times
    smaller, except for the gradients themselves.
    """

    memory_budget: int = 32 << 20

    def __post_init__(self) -> None:
        if self.memory_budget < 1:
            raise ValueError(f"memory_budget must be positive, got {self.memory_budget!r}")


class LinearCrossEntropyLoss(backport.LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` on `fastops.functional.linear_cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if replaced(backport.LinearCrossEntropyLoss):
            return super().forward(input, target)
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return FF.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )
