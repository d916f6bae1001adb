"""Which calls become one call: the table that `fastops.swap` reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from . import nn as fnn
from .nn import conv, linear, norm

# Two ops in a row, the second one applied to the result of the first, and the op that is both.
FUSIONS: Final[dict[tuple[str, str], str]] = {
    ("linear", "relu"): "linear_relu",
    ("conv1d", "relu"): "conv_relu1d",
    ("conv2d", "relu"): "conv_relu2d",
    ("conv3d", "relu"): "conv_relu3d",
    ("add", "relu"): "add_relu",
    ("linear", "cross_entropy"): "linear_cross_entropy",
}
# Torch's layers and losses, and ours that take their places.
COUNTERPARTS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Linear: fnn.Linear,
    nn.Conv1d: fnn.Conv1d,
    nn.Conv2d: fnn.Conv2d,
    nn.Conv3d: fnn.Conv3d,
    nn.MSELoss: fnn.MSELoss,
    nn.CrossEntropyLoss: fnn.CrossEntropyLoss,
    nn.BCEWithLogitsLoss: fnn.BCEWithLogitsLoss,
    nn.LinearCrossEntropyLoss: fnn.LinearCrossEntropyLoss,
}
# Batch norms take these places only where they are to be folded into the convolutions before them.
FOLDED_NORMS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
}
ORIGINALS: Final = {ours: torchs for table in (COUNTERPARTS, FOLDED_NORMS) for torchs, ours in table.items()}

# What a ReLU may be besides `torch.nn.ReLU`: these functions, and these methods of a tensor.
RELU_FUNCTIONS: Final = (F.relu, torch.relu, torch.relu_, torch.ops.aten.relu.default)
RELU_METHODS: Final = ("relu", "relu_")


class Layer(NamedTuple):
    """How a layer of ours runs with given weights."""

    op: str
    original: type[nn.Module]
    call: Callable[..., Tensor]

    def run(self, layer: nn.Module, relu: bool, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``layer`` with ``weight`` and ``bias``, and a ReLU behind it in the same call on request."""
        function = getattr(functional, FUSIONS[self.op, "relu"] if relu else self.op)
        return self.call(function, layer, input, weight, bias)


# Layers are known by their forward, which those of a derived class (a parametrized one, a sharded one) share.
LAYERS: Final[dict[Callable[..., Any], Layer]] = {
    fnn.Linear.forward: Layer("linear", nn.Linear, linear.multiplied),
    fnn.Conv1d.forward: Layer("conv1d", nn.Conv1d, conv.convolved),
    fnn.Conv2d.forward: Layer("conv2d", nn.Conv2d, conv.convolved),
    fnn.Conv3d.forward: Layer("conv3d", nn.Conv3d, conv.convolved),
}
