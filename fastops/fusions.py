"""Which calls become one call, and what takes whose place: from the records, for `swap` and `compile` alike."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from . import nn as fnn
from .dispatch import call
from .kernels import private
from .kernels.activation import PARAMETERS, RELU, Activation
from .nn import conv, norm
from .ops import OPS
from .ops.activations import METHODS, MODULES

# Calls in a row, each applied to the result of the one before, and the op that is all of them: "relu" at the end.
FUSIONS: Final = {op.fuses: op.name for op in OPS.values() if op.fuses is not None}


def fused_op(activation: Activation, *calls: str) -> str | None:
    """The op that is ``calls`` in a row and the activation behind them, None if there is none."""
    name = FUSIONS.get((*calls, "relu"))
    if name is None or activation == RELU:
        return name
    name = name.replace("_relu", "_act")
    return name if name in OPS else None


def options_of(activation: Activation) -> dict[str, Any]:
    """How the op is told of the activation. One with ReLU needs no telling."""
    name, *parameters = activation
    if activation == RELU:
        return {}
    return {"activation": name, **dict(zip(PARAMETERS[name], parameters, strict=True))}


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
ORIGINALS: Final = {ours: torchs for torchs, ours in COUNTERPARTS.items()}

# Activations ----------------------------------------------------------------------------------------------------------


def _signatures() -> dict[Callable[..., Any], tuple[str, tuple[str, ...]]]:
    found: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {torch.ops.aten.relu.default: ("relu", ())}
    for name, parameters in PARAMETERS.items():
        for home in (torch, F):
            for function in (getattr(home, name + end, None) for end in ("", "_")):
                if function is not None:
                    code = getattr(function, "__code__", None)  # functions in C have none, and no such option
                    in_place = () if code is None or "inplace" not in code.co_varnames else ("inplace",)
                    found[function] = name, (*parameters, *in_place)
    found[F.hardtanh] = "relu6", ("min_val", "max_val", "inplace")
    return found


# Functions that may be activations, by what they compute, and what they take behind the input, in that order.
SIGNATURES: Final = _signatures()
_IN_PLACE: Final = {function: None for function in SIGNATURES if function.__name__.endswith("_")}
_FUNCTION_TYPES: Final = tuple({type(function) for function in SIGNATURES})


def _activation(name: str, values: dict[str, Any]) -> Activation | None:
    """The activation with these options of torch's, None if it has others too or is not one that kernels have."""
    in_place = values.pop("inplace", False)
    if name == "gelu":
        approximate = values.pop("approximate", "none")
        name = "gelu_tanh" if approximate == "tanh" else name
        if approximate not in ("none", "tanh"):
            return None
    if name == "relu6" and values and (values.pop("min_val", None), values.pop("max_val", None)) != (0, 6):
        return None
    known = PARAMETERS[name]
    for parameter, value in values.items():  # in place, torch refuses to differentiate some with a negative one
        if parameter not in known or type(value) not in (float, int) or (in_place and value < 0):
            return None
    return name, *(values.get(parameter, default) for parameter, default in known.items())


def activation_of_function(
    function: Any, options: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
) -> Activation | None:
    """The activation that ``function(x, *options, **keywords)`` is, None if it is none."""
    if type(function) not in _FUNCTION_TYPES or function not in SIGNATURES:
        return None
    name, accepted = SIGNATURES[function]
    if not options and not keywords:
        return None if function is F.hardtanh else _activation(name, {})
    values = dict(zip(accepted, options, strict=False))
    if len(options) > len(accepted) or (keywords and not values.keys().isdisjoint(keywords)):
        return None
    bounds = {"min_val": -1, "max_val": 1} if function is F.hardtanh else {}
    in_place = {"inplace": True} if function in _IN_PLACE else {}
    return _activation(name, {**bounds, **in_place, **values, **(keywords or {})})


def activation_of_module(module: nn.Module) -> Activation | None:
    """The activation that a module of torch's is by its class and the options that it has now, None if it is none."""
    name = MODULES.get(type(module))
    if name is None:
        return None
    if name == "relu":
        return RELU
    options = {"gelu": ("approximate",), "relu6": ("min_val", "max_val")}.get(name, tuple(PARAMETERS[name]))
    values = {option: getattr(module, option) for option in options}
    return _activation(name, {"inplace": getattr(module, "inplace", False), **values})


# Calls ----------------------------------------------------------------------------------------------------------------

# Functions and methods by what they compute, as Dynamo names them in its graphs: an op of ours, "batch_norm", "add" or
# "activation".
CALLS: Final[dict[Any, str]] = {
    **{function: op.name for op in OPS.values() for function in op.replaces},
    F.batch_norm: "batch_norm",
    **dict.fromkeys((operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_, "add", "add_"), "add"),
    **dict.fromkeys((*SIGNATURES, *METHODS, *(getattr(Tensor, name) for name in METHODS)), "activation"),
}
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_is_mode_active: Final = private.is_function_mode_active
SUMS_IN_PLACE: Final = (operator.iadd, Tensor.add_, "add_")


class Layer(NamedTuple):
    """How a layer of ours runs with given weights: its op, and how that is called where it has options."""

    original: type[nn.Module]
    op: str
    with_options: Callable[..., Tensor] | None

    def run(
        self, layer: nn.Module, activation: Activation | None, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``layer`` with ``weight`` and ``bias``, and an activation that has an op behind it in the same call.

        All of them are plain tensors: a mode is the only one that may want to see the call.
        """
        name = self.op if activation is None else fused_op(activation, self.op)
        assert name is not None
        options = {} if activation is None else options_of(activation)
        if self.with_options is not None:
            function = getattr(functional, name)
            return self.with_options(partial(function, **options) if options else function, layer, input, weight, bias)
        if _is_dynamo_compiling() or _is_mode_active():  # Dynamo of torch 2.9 cannot ask the latter
            return getattr(functional, name)(input, weight, bias, **options)
        return call(OPS[name], input, weight, bias, *((activation,) if options else ()))


def _normalized(function: Callable[..., Tensor], layer: nn.Module, input: Tensor, *parameters: Tensor | None) -> Tensor:
    """A batch norm looks for its parameters by itself."""
    return norm.normalized(function, layer, input)


def _layers() -> dict[Callable[..., Any], Layer]:
    found = {}
    for original, ours in COUNTERPARTS.items():
        if original in NORMS:
            found[ours.forward] = Layer(original, "batch_norm", _normalized)
            continue
        op = next(op.name for op in OPS.values() if op.module is original)
        if (op, "relu") in FUSIONS:
            with_options = None if issubclass(original, nn.Linear) else conv.convolved
            found[ours.forward] = Layer(original, op, with_options)
    return found


# Layers are known by their forward, which those of a derived class (a parametrized one, a sharded one) share.
LAYERS: Final = _layers()
# Functions of torch that compute what these layers do.
LAYER_FUNCTIONS: Final = {function: op for function, op in CALLS.items() if (op, "relu") in FUSIONS and op != "add"}
