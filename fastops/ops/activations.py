"""Activations by name, as torch computes them: their values, and a gradient before them from one behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.activation import PARAMETERS, Activation

FUNCTIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
}
# Torch's modules, and the methods of a tensor, that compute them.
_BY_NAME: Final = {name.lower(): kind for name, kind in vars(nn).items() if isinstance(kind, type)}
MODULES: Final[dict[type[nn.Module], str]] = {
    _BY_NAME[plain]: name for name in PARAMETERS if (plain := name.replace("_", "")) in _BY_NAME
}
METHODS: Final = {name + end: name for name in PARAMETERS for end in ("", "_") if hasattr(Tensor, name + end)}
_aten: Final = torch.ops.aten
# Of the gradient, then of the activation's input or its output, as `needs_input` says, and its parameters.
_BACKWARD: Final[dict[str, Callable[..., Tensor]]] = {
    "relu": lambda grad, output: _aten.threshold_backward(grad, output, 0),
    "relu6": lambda grad, output: _aten.hardtanh_backward(grad, output, 0, 6),
    "leaky_relu": lambda grad, saved, negative_slope: _aten.leaky_relu_backward(grad, saved, negative_slope, False),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    "silu": _aten.silu_backward,
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
    "hardswish": _aten.hardswish_backward,
    "hardsigmoid": _aten.hardsigmoid_backward,
    "elu": lambda grad, input, alpha: _aten.elu_backward(grad, alpha, 1, 1, False, input),
    "softplus": _aten.softplus_backward,
    "mish": _aten.mish_backward,
}

# As torch, where its own gradients have no derivatives.
_BACKWARD_WITH_DERIVATIVES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": lambda grad, input: grad * (share := input.sigmoid()) * (1 + input * (1 - share)),
    "mish": lambda grad, input: (
        grad * ((tanh := F.softplus(input).tanh()) + input * input.sigmoid() * (1 - tanh * tanh))
    ),
}


def activation_of(name: str, parameters: Mapping[str, Any]) -> Activation:
    """An activation by name, with torch's defaults for the parameters that are not given.

    Raises:
        ValueError: if there is none of that name.
        TypeError: if it has no such parameter.
    """
    if not isinstance(name, str) or name not in PARAMETERS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(map(repr, PARAMETERS))}")
    known = PARAMETERS[name]
    for parameter in parameters:
        if parameter not in known:
            raise TypeError(f"{name}() got an unexpected keyword argument {parameter!r}")
    return name, *(parameters.get(parameter, default) for parameter, default in known.items())


def applied(activation: Activation, input: Tensor) -> Tensor:
    """The activation of a tensor."""
    name, *parameters = activation
    return FUNCTIONS[name](input, *parameters)


def before(activation: Activation, grad_output: Tensor, saved: Tensor) -> Tensor:
    """The gradient before an activation; ``saved`` is its input or its output, as `needs_input` says."""
    name, *parameters = activation
    recorded = torch.is_grad_enabled() and name in _BACKWARD_WITH_DERIVATIVES
    return (_BACKWARD_WITH_DERIVATIVES if recorded else _BACKWARD)[name](grad_output, saved, *parameters)
