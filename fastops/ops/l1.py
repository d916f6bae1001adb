"""Mean absolute error: ``kernels/l1.py``. The loss of an element is |d| and its slope sign(d)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import REDUCTIONS, Op, Tensors
from .pair import pair_loss


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import l1

    return l1.l1_loss, l1.l1_loss_backward


def _plain(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss: Tensor = torch.ops.aten.l1_loss(input, target, REDUCTIONS[reduction])
    return loss


L1_LOSS: Final[Op] = pair_loss(F.l1_loss, torch.nn.L1Loss, lambda d: d.sign(), _load, _plain)
