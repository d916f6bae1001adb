"""What is decided anew in each turn of a loop and with what a layer has changed: swapped as eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops
import fastops.nn as fnn
from fastops.compile import compile_graph
from fastops.fusions import activation_of_function


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.relu = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()
        self.wide = True

    def read_in_the_next_turn(self, x: Tensor) -> Tensor:
        results, y = [], x
        for turn in range(3):
            if turn != 1:
                y = self.fc(x + turn)
            results.append(F.relu(y))
        return torch.stack(results)

    def read_in_the_next_turn_of_while(self, x: Tensor) -> Tensor:
        results, y, turn = [], x, 0
        while turn < 2:
            if turn == 0:
                y = self.fc(x)
            turn += 1
            results.append(F.relu(y))
        return torch.stack(results)

    def summed_in_the_next_turn(self, x: Tensor) -> Tensor:
        y, total = x, x
        for turn in range(2):
            if turn == 0:
                y = self.bn(x)
            total = torch.relu(y + total)
        return total

    def test_of_a_counter(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        if self.bn.num_batches_tracked > 0:
            y = self.relu(y)
        return y

    def truth_of_a_counter(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        if self.bn.num_batches_tracked:
            y = self.relu(y)
        return y

    def statistic_behind(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        mean = -self.bn.running_mean  # type: ignore[operator]
        return F.relu(y) + mean

    def bounded_in_place(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.fc(x), inplace=True)

    def bounded(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.fc(x), inplace=False)

    def test_of_an_option(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.wide:
            y = self.relu(y)
        return y


METHODS = [name for name, value in vars(Net).items() if callable(value) and not name.startswith("__")]


@pytest.mark.parametrize("method", METHODS)
def test_swapped_is_eager(method: str) -> None:
    kind = type(method, (Net,), {"forward": lambda self, x: getattr(self, method)(x)})
    eager: Any = kind()
    swapped = fastops.swap(copy.deepcopy(eager))
    x = torch.randn(5, 3)
    with fastops.backend("torch"):
        for _ in range(2):
            assert torch.equal(swapped(x), eager(x))
    assert all(map(torch.equal, swapped.buffers(), eager.buffers()))


@pytest.mark.parametrize("double", [lambda y: y + y, lambda y: torch.add(y, y)], ids=["+", "add"])
def test_a_batch_norm_and_itself(double: Callable[[Tensor], Tensor]) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(double(F.batch_norm(x, None, None, training=True)))

    x = torch.randn(5, 3)
    graph = torch.fx.symbolic_trace(Twice())
    (found,) = [compile_graph(graph, [x])(x)]
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, Twice()(x))


def test_functions_in_place_keep_torchs_refusal() -> None:
    """A leaky ReLU in place with a negative slope has no gradient."""
    assert activation_of_function(F.leaky_relu, (-0.5,)) == ("leaky_relu", -0.5)
    assert activation_of_function(F.leaky_relu_, (-0.5,)) is None
    assert activation_of_function(F.hardtanh, (0, 6)) == activation_of_function(F.relu6) == ("relu6",)
    assert activation_of_function(F.hardtanh, (0,)) is None


def test_layers_with_an_activation_may_skip_their_initialization() -> None:
    layer = nn.utils.skip_init(fnn.LinearAct, 3, 4, activation="gelu")
    assert isinstance(layer, fnn.LinearAct) and layer.weight.device.type == "cpu"
