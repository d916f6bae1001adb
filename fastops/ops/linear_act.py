"""The linear layer with any activation: ``kernels/linear.py``."""

from __future__ import annotations

from typing import Final

import torch.nn.functional as F

from ..kernels.activation import PARAMETERS
from . import linear
from .product_act import with_activation

LINEAR_ACT: Final = with_activation(
    "linear_act",
    linear.LINEAR,
    linear.LINEAR_RELU,
    load=linear.load,
    differentiable=F.linear,
    shape=lambda input, weight, *_: (*input.shape[:-1], weight.shape[0]),
    channels=-1,
    names=sorted(PARAMETERS.keys() - {"gelu", "hardsigmoid"}),  # torch has no second derivative of hardsigmoid
    timed=[linear.timed(512, 768, 3072)],
)
