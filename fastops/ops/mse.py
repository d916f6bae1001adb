"""Mean squared error: ``kernels/mse.py``. The loss of an element is d^2 and its slope 2 d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import REDUCTIONS, Op, Tensors
from .pair import pair_loss


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import mse

    return mse.mse_loss, mse.mse_loss_backward


def _plain(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss: Tensor = torch.ops.aten.mse_loss(input, target, REDUCTIONS[reduction])
    return loss


MSE_LOSS: Final[Op] = pair_loss(F.mse_loss, torch.nn.MSELoss, lambda d: 2 * d, _load, _plain)
