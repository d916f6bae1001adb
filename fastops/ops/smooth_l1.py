"""Smooth L1 loss: ``kernels/smooth_l1.py``. The slope of an element is d / beta, from -1 to 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import REDUCTIONS, Op, Tensors
from .pair import pair_loss


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import smooth_l1

    return smooth_l1.smooth_l1_loss, smooth_l1.smooth_l1_loss_backward


def _plain(input: Tensor, target: Tensor, reduction: str, beta: float) -> Tensor:
    loss: Tensor = torch.ops.aten.smooth_l1_loss(input, target, REDUCTIONS[reduction], beta)
    return loss


def _slope(d: Tensor, beta: float) -> Tensor:
    return torch.where(d.abs() >= beta, d.sign(), d / beta) if beta else d.sign()


SMOOTH_L1_LOSS: Final[Op] = pair_loss(
    F.smooth_l1_loss, torch.nn.SmoothL1Loss, _slope, _load, _plain, "beta", lambda beta: beta >= 0
)
