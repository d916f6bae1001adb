"""State outside the module and its arguments counts in every call, fused or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastops

pytestmark = pytest.mark.usefixtures("no_interpreter")


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)


class Default(OneLayer):
    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(1)
        return F.relu(self.fc(x)) * len(seen)


def enclosed(make: Callable[[], Any], step: Callable[[Any], int]) -> type[OneLayer]:
    state = make()

    class Enclosed(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x)) * step(state)

    return Enclosed


def count_up(seen: list[int]) -> int:
    seen.append(1)
    return len(seen)


class OfClass(OneLayer):
    calls: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        OfClass.calls.append(1)
        return F.relu(self.fc(x)) * sum(OfClass.calls)


def helper(x: Tensor) -> Tensor:
    helper.seen.append(1)  # type: ignore[attr-defined]
    return x * len(helper.seen)  # type: ignore[attr-defined]


helper.seen = []  # type: ignore[attr-defined]


class OfFunction(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        return helper(F.relu(self.fc(x)))


class Config:
    scale = 2.0


class OfOtherClass(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        Config.scale += 1
        return F.relu(self.fc(x)) * Config.scale


def with_default(x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    return x * count_up(seen)


class DefaultOfFunction(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        return with_default(F.relu(self.fc(x)))


@pytest.mark.parametrize(
    "model_class",
    [
        Default,
        enclosed(list, count_up),
        enclosed(lambda: itertools.count(1), next),
        enclosed(lambda: SimpleNamespace(seen=[]), lambda state: count_up(state.seen)),
        OfClass,
        OfFunction,
        OfOtherClass,
        DefaultOfFunction,
    ],
)
def test_every_call_counts(model_class: type[OneLayer]) -> None:
    model = fastops.swap(model_class())
    assert fastops.report(model).fused == 1
    x = torch.ones(2, 6)
    results = [model(x).sum().item() for _ in range(3)]
    assert results[0] < results[1] < results[2]


def test_lists_of_forward_itself_are_no_state() -> None:
    class Lists(OneLayer):
        def forward(self, x: Tensor) -> Tensor:
            outputs = [F.relu(self.fc(x))]
            doubled = [output * 2 for output in outputs for _ in outputs]
            return sum(doubled)  # type: ignore[return-value]

    model = Lists()
    x = torch.randn(2, 6)
    expected = model(x)
    assert fastops.report(fastops.swap(model)).fused == 1
    assert torch.equal(model(x), expected)


class CalledSelf(OneLayer):
    def forward(this, self: Tensor) -> Tensor:
        return F.relu(this.fc(self))


class PositionalOnly(OneLayer):
    def forward(self, x: Tensor, /) -> Tensor:
        return F.relu(self.fc(x))


@pytest.mark.parametrize("model_class", [CalledSelf, PositionalOnly])
def test_unusual_signatures_keep_their_forward(model_class: type[OneLayer]) -> None:
    model, x = model_class(), torch.randn(2, 6)
    expected = model(x)
    assert fastops.report(fastops.swap(model)).fused == 1
    assert torch.equal(model(x), expected)
    with pytest.raises(TypeError):
        model(x=x)


def test_report_sees_that_a_layer_is_plain_again() -> None:
    model = fastops.swap(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    fastops.unswap(model[0])
    report = fastops.report(model)
    assert (report.swapped, report.fused) == (0, 0)
    assert "swap again" in str(report)
