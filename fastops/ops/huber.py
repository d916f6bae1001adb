"""Huber loss: ``kernels/huber.py``. The slope of an element is d, from -delta to delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import REDUCTIONS, Op, Tensors
from .pair import pair_loss


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import huber

    return huber.huber_loss, huber.huber_loss_backward


def _plain(input: Tensor, target: Tensor, reduction: str, delta: float) -> Tensor:
    loss: Tensor = torch.ops.aten.huber_loss(input, target, REDUCTIONS[reduction], delta)
    return loss


def _slope(d: Tensor, delta: float) -> Tensor:
    return torch.where(d.abs() >= delta, delta * d.sign(), d)


HUBER_LOSS: Final[Op] = pair_loss(
    F.huber_loss, torch.nn.HuberLoss, _slope, _load, _plain, "delta", lambda delta: delta > 0
)
