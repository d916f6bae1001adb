"""What layers with an activation by name have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops.activations import activation_of


class Activated:
    """Comes before a layer of torch among the bases: the layer is constructed with an activation and its parameters."""

    def __init__(self, *arguments: Any, activation: str, device: Any = None, **options: Any) -> None:
        following = super().__init__
        if device is not None:  # named here too, since `torch.nn.utils.skip_init` looks for it
            options["device"] = device
        own = inspect.signature(following).parameters
        parameters = {name: options.pop(name) for name in [*options] if name not in own}
        activation_of(activation, parameters)
        following(*arguments, **options)
        self.activation, self.activation_parameters = activation, parameters

    def activated(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``function`` of `fastops.functional` with the activation."""
        return functools.partial(function, activation=self.activation, **self.activation_parameters)

    def extra_repr(self) -> str:
        options = {"activation": repr(self.activation), **self.activation_parameters}
        layer: str = super().extra_repr()  # type: ignore[misc]
        return ", ".join([layer, *(f"{name}={value}" for name, value in options.items())])
