"""What a trace would lose or freeze is never traced: the module keeps its own forward, and the report says why."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastops

COUNT = 0
SEEN: list[Any] = []
OPTIONS = {"scale": 2.0}
OUTSIDE = nn.Linear(6, 6)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with fastops.backend("torch"):
        yield


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


LEFT_ALONE: dict[Callable[[], nn.Module], str] = {
    Counts: "its forward assigns the attribute count",
    CountsInHelper: "its forward calls setattr",
    CountsInState: "its forward uses __dict__",
    CountsPastModule: "its forward uses __setattr__",
    CountsGlobal: "its forward assigns the global COUNT",
    AppendsGlobal: "its forward reads the global SEEN, an object of class list",
    Appends: "its forward changes self.cache",
    RegistersBuffer: "its forward reads self.__dict__",
    RegistersHook: "its forward reads self._forward_hooks, an object of class OrderedDict",
    Prints: "its forward calls print",
    ReadsGlobalOptions: "its forward reads the global OPTIONS, an object of class dict",
    ReadsObject: "its forward reads self.settings, an object of class Random",
    TorchRandom: "its forward makes a tensor of its own (rand)",
    TorchRandomNumber: "its forward makes a tensor of its own (rand)",
    PythonRandom: "its forward names the function random",
    NumpyRandom: "its forward reads the global rand, an object of class ",
    Clock: "its forward names the function perf_counter",
    NextNumber: "its forward reads self.numbers, an object of class count",
    Constant: "its forward makes a tensor of its own (full)",
    NoGrad: "its forward has a with block",
    SetGradEnabled: "its forward calls torch.autograd.grad_mode.__init__",
    Decorated: "its forward is decorated",
    AsksGradMode: "its forward calls is_grad_enabled",
    Checkpoints: "its forward calls torch.",
    CheckpointsInReduce: "its forward names the function reduce",
    Tries: "its forward has a try block",
    AsksClass: "its forward asks for the class of a value",
    AsksType: "its forward asks for the class of a value",
    AsksAttribute: "its forward reads .logits of a value",
    AsksNone: "its forward tests a value with `is`",
    AsksNoneInHelper: "its forward tests a value with `is`",
    AsksShape: "its forward branches on a value or loops over one",
    AsksValue: "its forward branches on a value or loops over one",
    LoopsOverValue: "its forward branches on a value or loops over one",
    HandsListToChild: "its forward hands a list to child, which could change it",
    ReturnsOrderedDict: "its forward returns or passes on a OrderedDict",
    ModulesInList: "its forward reads self.layers, an object of class Linear",
    ForeignModule: "its forward reads the global OUTSIDE, an object of class Linear",
    KeywordOnly: "its forward has keyword-only inputs",
    NoInputs: "its forward cannot be traced (IndexError: tuple index out of range)",
    CachedProperty: "its forward",
    OwnGetattribute: "its class has its own __getattribute__",
    PartialFunction: "its forward reads self.act, an object of class partial",
    on_object: "its forward was replaced on the object",
    closure: "its forward assigns",
}


@pytest.mark.parametrize(("make", "reason"), LEFT_ALONE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_left_alone(make: Callable[[], nn.Module], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    own_class, own_state = type(model), dict(vars(model))
    if "cache" in own_state:
        own_state["cache"] = list(own_state["cache"])
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2], COUNT, len(SEEN)
    fastops.swap(model)
    assert type(model) is own_class
    assert vars(model) == own_state, "swapping ran an effect of forward"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2], COUNT, len(SEEN)) == states[1:]
    assert capsys.readouterr().out == ""
    assert type(next(child for child in model.modules() if isinstance(child, nn.Linear))) is fastops.nn.Linear
    row = fastops.report(model).rows[0]
    assert (row.name, row.done) == ("(model)", False)
    assert row.outcome.startswith(f"not traced: {reason}")
