"""Batch norms and the ReLUs behind them in swapped models: fused where that is the same, left alone where it is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from swap_models import inputs_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastops

pytestmark = no_fallback


class Block(nn.Module):
    """Convolution, batch norm and ReLU, then in the order of a DenseNet."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.norm2 = nn.ReLU(inplace), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 1)
        self.rows = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.norm1(x)
        x = self.relu(x)
        x = self.conv2(self.relu(self.norm2(x)))
        return F.relu(self.rows(x.mean((2, 3))))


def steps(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], dtype: torch.dtype) -> list[Any]:
    """Two steps of training and one of evaluation: outputs, gradients and buffers."""
    torch.manual_seed(1)
    found: list[Any] = []
    for training in (True, True, False):
        model.train(training)
        output = run(model, torch.randn(4, 3, 6, 5, dtype=dtype))
        output.square().sum().backward()
        found.append(output.detach())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*found, *gradients, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("inplace", [False, True])
def test_training_and_evaluation(backend: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = Block(inplace).double()
    swapped = fastops.swap(copy.deepcopy(eager))
    assert fastops.report(swapped).fused == 3
    expected = steps(eager, lambda model, x: model(x), torch.float64)
    with inputs_of("batch_norm_relu", monkeypatch) as seen:
        found = steps(swapped, lambda model, x: model(x), torch.float64)
    assert len(seen) == 9
    torch.testing.assert_close(found, expected)


def test_bit_for_bit_on_the_torch_expression() -> None:
    eager = Block()
    swapped = fastops.swap(copy.deepcopy(eager))
    with fastops.backend("torch"):
        found, expected = (steps(model, lambda model, x: model(x), torch.float32) for model in (swapped, eager))
    assert all(map(torch.equal, found, expected))


def _hooked(model: Block) -> None:
    model.norm1.register_forward_hook(lambda module, inputs, output: output * 2)


def _momentum(model: Block) -> None:
    model.norm1.momentum, model.norm2.momentum = None, 0.9


def _frozen(model: Block) -> None:
    model.norm1.requires_grad_(False)
    model.norm1.train = lambda mode=True: model.norm1  # type: ignore[method-assign]
    model.norm1.training = False


def _untracked(model: Block) -> None:
    model.norm1.track_running_stats = False


def _forward(model: Block) -> None:
    model.norm1.forward = lambda x: x + 1  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [_hooked, _momentum, _frozen, _untracked, _forward])
def test_changes_after_the_swap(change: Callable[[Block], None], backend: str) -> None:
    eager = Block().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    for model in (eager, swapped):
        change(model)
    found, expected = (steps(model, lambda model, x: model(x), torch.float64) for model in (swapped, eager))
    torch.testing.assert_close(found, expected)


def _checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(model, x, use_reentrant=False)
    return result


def _functional(model: nn.Module, x: Tensor) -> Tensor:
    state = {name: tensor * 1 for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    result: Tensor = functional_call(model, state, (x,))
    return result


@pytest.mark.parametrize("run", [_checkpointed, _functional])
def test_calls_of_other_kinds(run: Callable[[nn.Module, Tensor], Tensor], backend: str) -> None:
    eager = Block().double()
    found, expected = (steps(m, run, torch.float64) for m in (fastops.swap(copy.deepcopy(eager)), eager))
    torch.testing.assert_close(found, expected)


def test_a_replaced_batch_norm_is_called(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    swapped = fastops.swap(Block())
    monkeypatch.setattr(F, "batch_norm", lambda input, *_, **__: input * 0 - 1)
    assert not swapped(torch.randn(2, 3, 6, 5)).any()


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return input - 1


def test_others_are_left_alone_with_a_reason() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU(), Own(3), nn.ReLU(), nn.InstanceNorm2d(3), nn.ReLU())
    classes = [type(module) for module in model]
    fastops.swap(model)
    assert [type(module) for module in model] == classes
    outcomes = [row.outcome for row in fastops.report(model).rows if row.layer == "ReLU"]
    assert [outcome.startswith("not fused: ") for outcome in outcomes] == [True] * 3
    assert "SyncBatchNorm, which has no fused form" in outcomes[0] and "its own forward" in outcomes[1]
