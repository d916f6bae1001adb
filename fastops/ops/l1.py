"""Mean absolute error. The loss of an element is |d| and its slope sign(d)."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from .op import Op
from .pair import pair_loss

L1_LOSS: Final[Op] = pair_loss(F.l1_loss, torch.nn.L1Loss, lambda d: d.sign())
