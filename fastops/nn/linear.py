"""Linear layers: same parameters, same constructor and same keys as `torch.nn.Linear`; only ``forward`` differs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import functional as FF
from ..dispatch import call
from ..ops import OPS
from ..ops.activations import activation_of
from .overrides import overrides, replaced

__all__ = ["Linear", "LinearAct", "LinearReLU"]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `fastops.functional.linear`: [..., in_features] -> [..., out_features]."""

    def forward(self, input: Tensor) -> Tensor:
        if replaced(torch.nn.Linear):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if not has_torch_function_variadic(input, weight, bias):
            output: Tensor = call(OPS["linear"], input, weight, bias)
            return output
        return F.linear(input, weight, bias) if overrides(input, weight, bias) else FF.linear(input, weight, bias)


class LinearReLU(torch.nn.Linear):
    """A linear layer followed by ReLU, in one kernel: [..., in_features] -> [..., out_features].

    Constructed as `torch.nn.Linear`; the name is that of `torch.ao.nn.intrinsic.LinearReLU`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return FF.linear_relu(input, self.weight, self.bias)


class LinearAct(torch.nn.Linear):
    """A linear layer followed by an activation, in one kernel: [..., in_features] -> [..., out_features].

    Args:
        in_features, out_features, bias, device, dtype: as of `torch.nn.Linear`.
        activation: a name that `fastops.functional.linear_act` knows.
        parameters: of the activation, such as ``negative_slope`` of ``"leaky_relu"``.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str,
        **parameters: float,
    ) -> None:
        activation_of(activation, parameters)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation, self.activation_parameters = activation, parameters

    def forward(self, input: Tensor) -> Tensor:
        return FF.linear_act(input, self.weight, self.bias, self.activation, **self.activation_parameters)

    def extra_repr(self) -> str:
        options = {"activation": repr(self.activation), **self.activation_parameters}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in options.items())])
