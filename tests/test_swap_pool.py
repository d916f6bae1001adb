"""Swapped models on a CPU: where a ReLU is a pass over memory of its own, a maximum pooling behind it comes first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_models import inputs_of
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fastops

pytestmark = pytest.mark.usefixtures("no_interpreter")


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def row(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *layers)


class OwnPool(nn.MaxPool2d):
    pass


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


# Models, and how many pairs of ReLU and pooling are one call.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convolution": (lambda: row(nn.ReLU(), nn.MaxPool2d(2)), 1),
    "in place": (lambda: row(nn.ReLU(inplace=True), nn.MaxPool2d(2)), 1),
    "windows overlap": (lambda: row(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), 1),
    "ceil_mode, dilation": (lambda: row(nn.ReLU(), nn.MaxPool2d(2, 3, dilation=2, ceil_mode=True)), 1),
    "changed in place behind": (lambda: row(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5, inplace=True)), 1),
    "circular": (lambda: row(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.MaxPool2d(2)), 1),
    "batch norm": (lambda: row(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), 1),
    "identity between": (lambda: row(nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)), 1),
    "two of them": (lambda: row(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2)), 2),
    "nested": (lambda: nn.Sequential(row(nn.ReLU()), nn.MaxPool2d(2)), 1),
    "loop": (Loop, 1),
    "parametrized": (lambda: row(spectral_norm(nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.MaxPool2d(2)), 1),
    "no layer before": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 0),
    "two ReLUs": (lambda: row(nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)), 0),
    "another activation": (lambda: row(nn.GELU(), nn.MaxPool2d(2)), 0),
    "something between": (lambda: row(nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)), 0),
    "average": (lambda: row(nn.ReLU(), nn.AvgPool2d(2)), 0),
    "a class of one's own": (lambda: row(nn.ReLU(), OwnPool(2)), 0),
    "hook of the pooling": (lambda: row(nn.ReLU(), hooked(nn.MaxPool2d(2))), 0),
    "hook of the ReLU": (lambda: row(hooked(nn.ReLU()), nn.MaxPool2d(2)), 0),
    "hook of the layer": (lambda: row(hooked(nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.MaxPool2d(2)), 0),
}


def steps(model: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    """A step of training and one of evaluation: outputs, gradients and buffers."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 17, 16).to(memory_format=memory_format).requires_grad_()
    found = []
    for training in (True, False):
        output = model.train(training)(x)
        output.square().sum().backward()
        found.append(output)
    return [*found, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, torchs in zip(found, expected, strict=True):
        assert torch.equal(ours, torchs) and ours.stride() == torchs.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_same_to_the_last_bit(name: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    make, pairs = MODELS[name]
    eager = make()
    swapped = fastops.swap(copy.deepcopy(eager))
    with fastops.backend("torch"), inputs_of("relu_max_pool2d", monkeypatch) as seen:
        assert_identical(steps(swapped, memory_format), steps(eager, memory_format))
    assert len(seen) == 2 * pairs


@pytest.mark.parametrize("backend", ["auto", "onednn"])
def test_on_other_backends_of_a_cpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = fastops.swap(row(nn.ReLU(), nn.MaxPool2d(2)))
    with fastops.backend(backend), inputs_of("relu_max_pool2d", monkeypatch) as seen:
        swapped(torch.randn(2, 3, 17, 16))
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_kernel_keeps_its_relu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastops.dispatch, "_INTERPRETER", True)
    swapped, x = fastops.swap(row(nn.ReLU(), nn.MaxPool2d(2))), torch.randn(2, 3, 17, 16)
    with fastops.backend(backend), inputs_of("relu_max_pool2d", monkeypatch) as seen:
        torch.testing.assert_close(swapped(x), fastops.unswap(swapped)(x))
    assert not seen


def test_a_strict_backend_has_no_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = fastops.swap(row(nn.ReLU(), nn.MaxPool2d(2)))
    with fastops.backend("onednn", strict=True), inputs_of("relu_max_pool2d", monkeypatch) as seen:
        swapped(torch.randn(2, 3, 17, 16))
    assert not seen


def test_indices_are_torchs() -> None:
    eager = row(nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    x = torch.randn(2, 3, 17, 16)
    with fastops.backend("torch"):
        assert_identical(list(fastops.swap(copy.deepcopy(eager))(x)), list(eager(x)))


@pytest.mark.parametrize("owner, name", [(nn.MaxPool2d, "forward"), (torch.nn.functional, "max_pool2d")])
def test_somebody_replaced_the_pooling(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = fastops.swap(row(nn.ReLU(), nn.MaxPool2d(2)))
    monkeypatch.setattr(owner, name, lambda *arguments, **options: torch.tensor(7))
    with fastops.backend("torch"):
        assert swapped(torch.randn(2, 3, 17, 16)) == 7


def test_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm in the convolution, then the pooling, then ReLU."""
    eager = row(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    swapped, x = fastops.swap(copy.deepcopy(eager)), torch.randn(2, 3, 17, 16)
    with fastops.backend("onednn"), torch.no_grad(), inputs_of("relu_max_pool2d", monkeypatch) as seen:
        torch.testing.assert_close(swapped(x), eager(x))
    assert len(seen) == 1
