"""Mean squared error. The loss of an element is d^2 and its slope 2 d."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from .op import Op
from .pair import pair_loss

MSE_LOSS: Final[Op] = pair_loss(F.mse_loss, torch.nn.MSELoss, lambda d: 2 * d)
