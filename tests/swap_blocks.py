"""Residual blocks as libraries write them: batch norms, a sum and ReLUs, with something else called between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops.functional as FF


class Block(nn.Module):
    """As in torchvision's ResNet: the shortcut may be a call, between the batch norm and the sum."""

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample: nn.Module | None = None
        if shortcut:
            self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Nested(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)) + x)


class OtherOrder(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.bn2(self.conv2(x))
        return torch.relu_(y)


class BothCalled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


class ByAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(x))
        out = torch.add(x, out)
        return out.relu()


class ByMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.bn2(self.conv2(x))).relu_()


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out += self.bn2(self.conv2(x))
        return self.relu(out)


class ConvNorm(nn.Module):
    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class OfTransformers(nn.Module):
    """As in Hugging Face's ResNet: both summands come out of other modules."""

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.shortcut = ConvNorm() if shortcut else nn.Identity()
        self.layer, self.activation = nn.Sequential(ConvNorm(relu=True), ConvNorm()), nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


class NormAct(nn.BatchNorm2d):
    """As timm's ``BatchNormAct2d``, which calls the function."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            momentum,
            eps=self.eps,
        )
        x = self.drop(x)
        x = self.act(x)
        return x


class OfTimm(nn.Module):
    """As timm's RegNet: batch norms that have their activations, and calls that may do nothing around the sum."""

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), NormAct(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, bias=False), NormAct(4, relu=False)
        self.drop_path, self.act = nn.Identity(), nn.ReLU(inplace=True)
        self.downsample = NormAct(4, relu=False) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = self.conv2(x)
        x = self.bn2(x)
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = aa(x)
        x = self.drop_path(x) + self.downsample(shortcut)
        return self.act(x)


def with_shortcut(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: kind(True)  # type: ignore[call-arg]


# Each with how often one call fuses a batch norm and ReLU, and how often these and the sum between them.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchvision": (Block, 1, 1),
    "torchvision, shortcut": (with_shortcut(Block), 1, 1),
    "nested": (Nested, 0, 1),
    "other order": (OtherOrder, 0, 1),
    "both called": (BothCalled, 0, 1),
    "torch.add": (ByAdd, 0, 1),
    "method": (ByMethod, 0, 1),
    "in place": (InPlace, 0, 1),
    "transformers": (OfTransformers, 1, 1),
    "transformers, shortcut": (with_shortcut(OfTransformers), 1, 1),
    "timm": (OfTimm, 1, 1),
    "timm, shortcut": (with_shortcut(OfTimm), 1, 1),
}


@contextmanager
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each of the two functions is called inside."""
    seen = {"batch_norm_relu": 0, "batch_norm_add_relu": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        original = getattr(FF, name)

        def function(*arguments: Any, **keywords: Any) -> Tensor:
            seen[name] += 1
            return original(*arguments, **keywords)

        return function

    with monkeypatch.context() as patch:
        for name in seen:
            patch.setattr(FF, name, counted(name))
        yield seen


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def steps(model: nn.Module, dtype: torch.dtype, run: Callable[[nn.Module, Tensor], Tensor] = plainly) -> list[Any]:
    """Two steps of training and one of evaluation: outputs, gradients and buffers."""
    torch.manual_seed(1)
    found: list[Any] = []
    for training in (True, True, False):
        model.train(training)
        x = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
        output = run(model, x * 1)
        output.square().sum().backward()
        found += [output.detach(), x.grad]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*found, *gradients, *(buffer.clone() for buffer in model.buffers())]


def identical(found: list[Any], expected: list[Any]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
