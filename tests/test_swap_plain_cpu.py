"""Swapped layers on a CPU without kernels: convolutions and batch norms call torch at once, and give its very bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastops
from fastops.dispatch import by_the_rule, is_left_to_torch

pytestmark = pytest.mark.usefixtures("no_interpreter")


class Block(nn.Module):
    """A stem and a residual block, with ``activation`` behind a convolution, batch norms and the sum."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), activation())
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4, momentum=None)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4, affine=False)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        before = x
        x = self.activation(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        x += before
        return self.activation(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": lambda: nn.GELU("tanh"),
}
ways = pytest.mark.parametrize("way", ["auto", "torch", "onednn"])


def outcome(model: nn.Module, around: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Outputs of two training steps and of evaluation without gradients, gradients and buffers."""
    torch.manual_seed(1)
    outputs = []
    for _ in range(2):
        x = torch.randn(2, 3, 5, 6, requires_grad=True)
        outputs.append(around(model, x))
        outputs[-1].float().square().sum().backward()
        assert x.grad is not None
        outputs.append(x.grad)
    with torch.no_grad():
        outputs.append(model.eval()(torch.randn(2, 3, 5, 6)))  # too small for folding to pay
    gradients = [parameter.grad for parameter in model.parameters()]
    return [each.detach().clone() for each in [*outputs, *gradients, *model.buffers()] if each is not None]


@ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("around", ["call", "autocast", "checkpoint"])
def test_equal_to_the_bit(activation: str, way: str, around: str) -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if around == "autocast" else nullcontext():
            if around == "checkpoint":
                return checkpoint(model, x, use_reentrant=False)
            return model(x)

    torch.manual_seed(0)
    eager = Block(ACTIVATIONS[activation])
    swapped = fastops.swap(copy.deepcopy(eager))
    assert fastops.report(swapped).fused == 3 or activation != "relu"
    with fastops.backend(way):
        found, expected = outcome(swapped, run), outcome(eager, run)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_who_looks_on_sees_the_calls() -> None:
    """A report with an input or around a call, `fastops.tune` and modes learn of every call."""

    names = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 5, 6)
    model = fastops.swap(Block(nn.ReLU))
    assert is_left_to_torch(x)
    with Seen():
        assert not is_left_to_torch(x)
        model(x)
    assert {"conv_relu2d", "batch_norm_relu"} <= set(names)
    assert any("conv_relu2d" in note for note in fastops.report(model, x).notes)
    with fastops.report(model) as report:
        model(x)
    assert report.ran["conv_relu2d", "torch"] == report.ran["batch_norm_relu", "torch"] == 1
    with by_the_rule():
        assert not is_left_to_torch(x)
    with fastops.backend("onednn", strict=True):
        assert not is_left_to_torch(x)
    with fastops.backend("triton"):
        assert not is_left_to_torch(x)
        with pytest.raises(RuntimeError, match="Triton cannot run on 'cpu' tensors"):
            model(x)
