"""Which activations there are. (`fastops.kernels.epilogue` has their values and slopes, and needs Triton.)"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

Activation: TypeAlias = tuple[Any, ...]  # a name of the table, "" for none, and values for its parameters
NONE: Final[Activation] = ("",)
RELU: Final[Activation] = ("relu",)

# By name: what torch's functions take besides the input, with torch's defaults.
PARAMETERS: Final[dict[str, dict[str, float]]] = {
    "relu": {},
    "relu6": {},
    "leaky_relu": {"negative_slope": 0.01},
    "gelu": {},
    "gelu_tanh": {},
    "silu": {},
    "sigmoid": {},
    "tanh": {},
    "hardswish": {},
    "hardsigmoid": {},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "mish": {},
}


def needs_input(activation: Activation) -> bool:
    """Whether the slope is had from the input alone. The output has the sign of leaky ReLU's if the slope keeps it."""
    name, *parameters = activation
    if name == "leaky_relu":
        return not parameters[0] > 0
    return name not in ("", "relu", "relu6", "sigmoid", "tanh")
