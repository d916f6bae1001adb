"""Smooth L1 loss. The slope of an element is d / beta, from -1 to 1."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .pair import pair_loss


def _slope(d: Tensor, beta: float) -> Tensor:
    return torch.where(d.abs() >= beta, d.sign(), d / beta) if beta else d.sign()


SMOOTH_L1_LOSS: Final[Op] = pair_loss(F.smooth_l1_loss, torch.nn.SmoothL1Loss, _slope, "beta", lambda beta: beta >= 0)
