"""What forward decides, and its effects, are the same in a swapped model: in every call, and never in the swap."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from swap_models import count_fused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastops

COUNT = 0
SEEN: list[Any] = []
OPTIONS = {"scale": 2.0}
OUTSIDE = nn.Linear(6, 6)


pytestmark = pytest.mark.usefixtures("exact")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.child = nn.Linear(6, 6), nn.Sequential(nn.Tanh())
        self.count, self.cache, self.layers = 0, [], [self.fc]
        self.settings = random.Random(0)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.hidden(x) * self.count


class CountsInHelper(Base):
    def step(self) -> int:
        setattr(self, "count", self.count + 1)  # noqa: B010
        return self.count

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * self.step()


class CountsInState(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["count"] += 1
        return self.hidden(x) * self.count


class CountsPastModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "count", self.count + 1)
        return self.hidden(x) * self.count


class CountsGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return self.hidden(x) * COUNT


class AppendsGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        return self.hidden(x) * len(SEEN)


class Appends(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.cache.append(x)
        return self.hidden(x) * len(self.cache)


class RegistersBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("last", x.detach())
        return self.hidden(x)


class RegistersHook(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.fc.register_forward_hook(lambda module, inputs, output: output + 1)
        return self.hidden(x)


class Prints(Base):
    def forward(self, x: Tensor) -> Tensor:
        print("forward runs")
        return self.hidden(x)


class ReadsGlobalOptions(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * OPTIONS["scale"]


class ReadsObject(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * self.settings.random()


class TorchRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * torch.rand(6).to(x.dtype)


class TorchRandomNumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * torch.rand(1).item()


class PythonRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * random.random()


class NumpyRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * float(np.random.rand())


class Clock(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * (time.perf_counter() > 0)


class NextNumber(Base):
    numbers = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * next(self.numbers)


class Constant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * torch.full((6,), 2.0)


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.hidden(x)
        return x + self.fc(x)


class SetGradEnabled(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return self.hidden(x)


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x)


class AsksGradMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * (2 if torch.is_grad_enabled() else 1)


class Checkpoints(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.hidden, x, use_reentrant=False)


class CheckpointsInReduce(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda y, _: checkpoint(self.hidden, y, use_reentrant=False), range(2), x)


class Tries(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.hidden(x) if x.sum() > 0 else x
        except ValueError:
            return x


class AsksClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.child(self.hidden(x))
        return z if isinstance(z, Tensor) else z[0]


class AsksType(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.child(self.hidden(x))
        return z if type(z) == Tensor else z[0]  # noqa: E721


class AsksAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.child(self.hidden(x))
        return z.logits if hasattr(z, "logits") else z


class AsksNone(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = self.child(self.hidden(x))
        return x if z is None else z


class AsksNoneInHelper(Base):
    def choose(self, z: Tensor | None, x: Tensor) -> Tensor:
        return x if z is None else z

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.child(self.hidden(x)), x)


class AsksShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) if x.shape[0] > 2 else self.fc(x)


class AsksValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) if x.sum() > 0 else self.fc(x)


class LoopsOverValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.hidden(row) for row in x])


class HandsListToChild(Base):
    class Appending(nn.Module):
        def forward(self, values: list[Tensor]) -> Tensor:
            values.append(values[0] * 2)
            return values[0]

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Appending()

    def forward(self, x: Tensor) -> Tensor:
        values = [self.hidden(x)]
        self.child(values)
        return values[-1]


class ReturnsOrderedDict(Base):
    def forward(self, x: Tensor) -> Tensor:
        return OrderedDict(out=self.hidden(x))


class ModulesInList(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers[0](x))


class ForeignModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return OUTSIDE(self.hidden(x).float())


class KeywordOnly(Base):
    def forward(self, *, x: Tensor) -> Tensor:
        return self.hidden(x)


class NoInputs(Base):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.hidden(inputs[0])


class CachedProperty(Base):
    @functools.cached_property
    def factor(self) -> float:
        return random.random()

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * self.factor


class OwnGetattribute(Base):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x)


class PartialFunction(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = functools.partial(F.relu, inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


def on_object() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.forward = lambda x: x * 2  # type: ignore[method-assign]
    return model


def closure() -> nn.Module:
    steps = 0

    class Enclosed(Base):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal steps
            steps += 1
            return self.hidden(x) * steps

    return Enclosed()


# What each does that a careless rewrite would lose or freeze, and how many of its ReLUs run in one call with a layer.
MODELS: dict[Callable[[], nn.Module], int] = {
    Counts: 1,
    CountsInHelper: 1,
    CountsInState: 1,
    CountsPastModule: 1,
    CountsGlobal: 1,
    AppendsGlobal: 1,
    Appends: 1,
    RegistersBuffer: 1,
    RegistersHook: 0,
    Prints: 1,
    ReadsGlobalOptions: 1,
    ReadsObject: 1,
    TorchRandom: 1,
    TorchRandomNumber: 1,
    PythonRandom: 1,
    NumpyRandom: 1,
    Clock: 1,
    NextNumber: 1,
    Constant: 1,
    NoGrad: 1,
    SetGradEnabled: 1,
    Decorated: 1,
    AsksGradMode: 1,
    Checkpoints: 1,
    CheckpointsInReduce: 2,
    Tries: 1,
    AsksClass: 1,
    AsksType: 1,
    AsksAttribute: 1,
    AsksNone: 1,
    AsksNoneInHelper: 1,
    AsksShape: 1,
    AsksValue: 1,
    LoopsOverValue: 3,
    HandsListToChild: 1,
    ReturnsOrderedDict: 1,
    ModulesInList: 1,
    ForeignModule: 1,
    KeywordOnly: 1,
    NoInputs: 1,
    CachedProperty: 1,
    OwnGetattribute: 1,
    PartialFunction: 0,
    on_object: 0,
    closure: 1,
}


def state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[2], COUNT, len(SEEN)


def results(model: nn.Module, given: list[Tensor]) -> list[Any]:
    """What every call gives, and the state of the model and of the world after it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    SEEN.clear()
    globals()["COUNT"] = 0
    found = []
    for x in given:
        output = model(x=x) if isinstance(model, KeywordOnly) else model(x)
        found += [*torch.utils._pytree.tree_leaves(output), state(), getattr(model, "count", 0)]
    return found


@pytest.mark.parametrize(("make", "fused"), MODELS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_effects_and_decisions_stay(
    make: Callable[[], nn.Module], fused: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if make in (PythonRandom, CachedProperty, ReadsObject):
        monkeypatch.setattr(random, "Random", lambda seed: random)  # one generator for both models
    given = list(torch.randn(3, 3, 6))
    torch.manual_seed(5)
    eager = make()
    model = make()
    model.load_state_dict(eager.state_dict())
    if make is NextNumber:
        eager.numbers, model.numbers = itertools.count(1), itertools.count(1)  # type: ignore[assignment]
    expected, printed = results(eager, given), capsys.readouterr().out
    before, own_state = state(), dict(vars(model))
    fastops.swap(model)
    assert state() == before and vars(model) == own_state, "swapping ran an effect of forward"
    calls = count_fused(monkeypatch)
    found = results(model, given)
    assert capsys.readouterr().out == printed
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    if make in (AsksShape, AsksValue, Tries):
        assert len(calls) <= 3
    else:
        assert len(calls) == 3 * fused


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Decorated, "forward was not looked into: it is decorated"),
        (on_object, "not looked into: its forward was replaced on the object"),
    ],
)
def test_what_was_not_looked_into_is_reported(make: Callable[[], nn.Module], reason: str) -> None:
    assert reason in [row.outcome for row in fastops.report(fastops.swap(make())).rows]
