"""Maximum pooling of ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF

__all__ = ["ReLUMaxPool2d"]


class ReLUMaxPool2d(torch.nn.MaxPool2d):
    """ReLU followed by `torch.nn.MaxPool2d`, on `fastops.functional.relu_max_pool2d`: [N, C, H, W] or [C, H, W].

    With ``return_indices`` torch computes both.
    """

    def forward(self, input: Tensor) -> Any:
        if self.return_indices:
            return super().forward(F.relu(input))
        return FF.relu_max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
