"""Which calls become one call, and what takes whose place: from the records, for `swap` and `compile` alike."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from . import nn as fnn
from .dispatch import call
from .kernels import private
from .nn import conv, norm
from .ops import OPS

# Two ops in a row, the second one applied to the result of the first, and the op that is both.
FUSIONS: Final = {op.fuses: op.name for op in OPS.values() if op.fuses is not None}
# Torch's layers and losses, and ours that take their places.
COUNTERPARTS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    op.module: getattr(fnn, op.module.__name__) for op in OPS.values() if op.module is not None
}
NORMS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
}
COUNTERPARTS.update(NORMS)
# Batch norms take these places where they are to be folded into the convolutions before them.
FOLDED_NORMS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: norm.FoldedBatchNorm1d,
    nn.BatchNorm2d: norm.FoldedBatchNorm2d,
    nn.BatchNorm3d: norm.FoldedBatchNorm3d,
}
ORIGINALS: Final = {ours: torchs for table in (COUNTERPARTS, FOLDED_NORMS) for torchs, ours in table.items()}

# What a ReLU may be besides `torch.nn.ReLU`: these functions, and these methods of a tensor.
RELU_FUNCTIONS: Final = (F.relu, torch.relu, torch.relu_, torch.ops.aten.relu.default)
RELU_METHODS: Final = ("relu", "relu_")
# Functions and methods by what they compute, as Dynamo names them in its graphs: an op of ours, "add" or "relu".
CALLS: Final[dict[Any, str]] = {
    **{function: op.name for op in OPS.values() for function in op.replaces},
    F.batch_norm: "batch_norm",
    **dict.fromkeys((operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_, "add", "add_"), "add"),
    **dict.fromkeys((*RELU_FUNCTIONS, Tensor.relu, Tensor.relu_, *RELU_METHODS), "relu"),
}
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_is_mode_active: Final = private.is_function_mode_active
SUMS_IN_PLACE: Final = (operator.iadd, Tensor.add_, "add_")


class Layer(NamedTuple):
    """How a layer of ours runs with given weights: its ops without and with a ReLU, and how they are called."""

    original: type[nn.Module]
    ops: tuple[str, str]
    with_options: Callable[..., Tensor] | None

    def run(self, layer: nn.Module, relu: bool, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``layer`` with ``weight`` and ``bias``, and a ReLU behind it in the same call on request.

        All of them are plain tensors: a mode is the only one that may want to see the call.
        """
        name = self.ops[1 if relu else 0]  # Dynamo up to torch 2.11 knows no bool there
        if self.with_options is not None:
            return self.with_options(getattr(functional, name), layer, input, weight, bias)
        if _is_dynamo_compiling() or _is_mode_active():  # Dynamo of torch 2.9 cannot ask the latter
            return getattr(functional, name)(input, weight, bias)
        return call(OPS[name], input, weight, bias)


def _normalized(function: Callable[..., Tensor], layer: nn.Module, input: Tensor, *parameters: Tensor | None) -> Tensor:
    """A batch norm looks for its parameters by itself."""
    return norm.normalized(function, layer, input)


def _layers() -> dict[Callable[..., Any], Layer]:
    found = {}
    for original, ours in COUNTERPARTS.items():
        if original in NORMS:
            found[ours.forward] = Layer(original, ("batch_norm", FUSIONS["batch_norm", "relu"]), _normalized)
            continue
        op = next(op.name for op in OPS.values() if op.module is original)
        if (op, "relu") in FUSIONS:
            with_options = None if issubclass(original, nn.Linear) else conv.convolved
            found[ours.forward] = Layer(original, (op, FUSIONS[op, "relu"]), with_options)
    return found


# Layers are known by their forward, which those of a derived class (a parametrized one, a sharded one) share.
LAYERS: Final = _layers()
