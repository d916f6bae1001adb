"""Linear layers: same parameters, same constructor and same keys as `torch.nn.Linear`; only ``forward`` differs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import functional as FF
from ..dispatch import call
from ..ops import OPS
from .activated import Activated
from .overrides import overrides, replaced
from .shown import shown

__all__ = ["Linear", "LinearAct", "LinearReLU"]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `fastops.functional.linear`: [..., in_features] -> [..., out_features]."""

    extra_repr = shown(torch.nn.Linear)

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


class LinearAct(Activated, torch.nn.Linear):
    """A linear layer followed by an activation, in one kernel: [..., in_features] -> [..., out_features].

    Args:
        arguments, options: as of `torch.nn.Linear`, and parameters of the activation, such as ``negative_slope`` of
            ``"leaky_relu"``.
        activation: a name that `fastops.functional.linear_act` knows.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(FF.linear_act)(input, self.weight, self.bias)
