"""Which calls become one call, and what takes whose place: from the records, for `swap` and `compile` alike."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import nn as fnn
from .ops import OPS

# Two ops in a row, the second one applied to the result of the first, and the op that is both.
FUSIONS: Final = {op.fuses: op.name for op in OPS.values() if op.fuses is not None}
# Torch's layers and losses, and ours that take their places.
COUNTERPARTS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    op.module: getattr(fnn, op.module.__name__) for op in OPS.values() if op.module is not None
}

RELU_FUNCTIONS: Final = (F.relu, torch.relu, torch.relu_, torch.ops.aten.relu.default)
RELU_METHODS: Final = ("relu", "relu_")
# Functions and methods by what they compute, as Dynamo names them in its graphs: an op of ours, "add" or "relu".
CALLS: Final[dict[Any, str]] = {
    **{function: op.name for op in OPS.values() for function in op.replaces},
    **dict.fromkeys((operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_, "add", "add_"), "add"),
    **dict.fromkeys((*RELU_FUNCTIONS, Tensor.relu, Tensor.relu_, *RELU_METHODS), "relu"),
}
SUMS_IN_PLACE: Final = (operator.iadd, Tensor.add_, "add_")
