"""Huber loss. The slope of an element is d, from -delta to delta."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .pair import pair_loss


def _slope(d: Tensor, delta: float) -> Tensor:
    return torch.where(d.abs() >= delta, delta * d.sign(), d)


HUBER_LOSS: Final[Op] = pair_loss(F.huber_loss, torch.nn.HuberLoss, _slope, "delta", lambda delta: delta > 0)
