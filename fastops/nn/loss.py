"""Losses: same constructors as in `torch.nn`; only ``forward`` differs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as FF


class MSELoss(torch.nn.MSELoss):
    """`torch.nn.MSELoss` on `fastops.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return FF.mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `fastops.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
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
        return FF.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
