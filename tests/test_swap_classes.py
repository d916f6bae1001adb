"""What others do to classes, before a swap and after it, and what users' methods ask of their own class."""

from __future__ import annotations

import abc
import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from swap_models import Net, X, fused
from torch import Tensor, nn

import fastops

T = TypeVar("T")


pytestmark = pytest.mark.usefixtures("exact")


class Child(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


# Replaced by others ---------------------------------------------------------------------------------------------------

REPLACED: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "Net.forward": (Net, "forward", lambda old: lambda self, x: self.fc(x) - 1),
    "nn.Linear.forward": (nn.Linear, "forward", lambda old: lambda self, x: old(self, x) * 2),
    "nn.ReLU.forward": (nn.ReLU, "forward", lambda old: lambda self, x: x.sigmoid()),
    "nn.Module.__call__": (nn.Module, "__call__", lambda old: lambda self, *a: old(self, *a) + 1),
    "nn.Module._call_impl": (nn.Module, "_call_impl", lambda old: lambda self, *a: old(self, *a) + 1),
    "F.linear": (F, "linear", lambda old: lambda x, w, b=None: old(x, w, b) * 3),
    "F.relu": (F, "relu", lambda old: lambda x, inplace=False: x.tanh()),
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("kind", [Net, Child])
def test_replaced_after_the_swap(name: str, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, make = REPLACED[name]
    model = fastops.swap(kind())
    assert fused(model, X) == 1
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    assert fused(model, X) == 0
    monkeypatch.undo()
    assert fused(model, X) == 1


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_before_the_swap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, make = REPLACED[name]
    model = Net()
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    expected = model(X)
    assert torch.equal(fastops.swap(model)(X), expected)


def test_convolution_replaced_on_the_object() -> None:
    """As tiling is done to diffusion models."""
    eager = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    swapped = fastops.swap(copy.deepcopy(eager))
    x = torch.randn(1, 1, 5, 5)
    for model in (eager, swapped):
        layer = model[0]
        layer._conv_forward = lambda x, w, b, layer=layer: nn.Conv2d._conv_forward(layer, x, w, b) - 1
    assert torch.equal(swapped(x), eager(x))
    assert fastops.report(fastops.swap(eager)).swapped == 0


def test_method_deleted_after_the_swap() -> None:
    class Deleted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(x)) * 3

    model = fastops.swap(Deleted())
    del Deleted.forward
    assert torch.equal(model(X), fastops.unswap(copy.deepcopy(model))(X))


class Twice(Tensor):
    """A weight as quantization libraries make it: it overrides F.linear."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return F.linear(args[0], args[1].as_subclass(Tensor) * 2, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("way", ["torch", "onednn", "triton"])
def test_weights_that_override_functions(way: str) -> None:
    model = Net()
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(Twice), requires_grad=False)
    expected = model(X)
    with fastops.backend(way):
        assert torch.equal(fastops.swap(model)(X), expected)
        assert torch.equal(fastops.swap(nn.Sequential(model.fc, model.relu))(X), expected)


# The class of an object -----------------------------------------------------------------------------------------------


class AsksItsClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.fc(x))
        return out if type(self) is AsksItsClass and self.__class__ is AsksItsClass else out * 0

    def train(self, mode: bool = True) -> AsksItsClass:
        super(self.__class__, self).train(mode)
        super(type(self), self).train(mode)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        super(type(self), self).__setattr__(name, value)

    def another(self) -> AsksItsClass:
        return type(self)()


def test_methods_see_the_class_that_the_user_wrote() -> None:
    model = fastops.swap(AsksItsClass())
    assert model.eval().training is False and model.train().training is True
    assert fused(model, X) == 1 and model(X).any()
    model.number = 3
    assert type(model.another()) is AsksItsClass


class DecoratedSuper(Net):
    @functools.wraps(Net.train)
    def helper(self) -> None:
        """Stands for a decorator."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_a_decorated_method_that_asks_for_its_class_keeps_the_class() -> None:
    class Recursive(Net):
        @_decorated
        def train(self, mode: bool = True) -> Any:
            super(self.__class__, self).train(mode)
            return self

    model = fastops.swap(Recursive())
    assert type(model) is Recursive and model.eval().training is False
    assert "its train calls super() with the class of the object" in str(fastops.report(model))


def test_abstract_classes() -> None:
    class Abstract(Net, abc.ABC):
        @abc.abstractmethod
        def name(self) -> str: ...

    class One(Abstract):
        def name(self) -> str:
            return "one"

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(x))

    class Two(One):
        pass

    model, other = fastops.swap(One()), Two()
    assert not isinstance(other, type(model))
    assert isinstance(other, One) and isinstance(other, Abstract) and isinstance(model, Abstract)
    assert fused(model, X) == 1


class Mixin:
    def run(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class Mixed(Mixin, Net, Generic[T]):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + super().forward(x)


class OtherNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Diamond(Child, OtherNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - self.relu(self.fc(x))


@pytest.mark.parametrize(("kind", "count"), [(Mixed, 2), (Diamond, 2), (Child, 1)])
def test_inheritance(kind: type[nn.Module], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastops.swap(kind())
    assert fused(model, X) == count
    monkeypatch.setattr(Net, "forward", lambda self, x: self.fc(x) + 7)
    assert fused(model, X) == count - 1


def test_scripted_children_are_left_alone() -> None:
    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.prep = torch.jit.script(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(self.prep(x)))

    model = Outer()
    expected = model(X)
    assert torch.equal(fastops.swap(model)(X), expected)
    assert (fastops.report(model).swapped, fastops.report(model).fused) == (1, 1)


# Layers that are subclasses -------------------------------------------------------------------------------------------


class OnlyConstructed(nn.Linear):
    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    @staticmethod
    def helper() -> int:
        return 1


def test_a_subclass_with_nothing_but_a_constructor_is_swapped() -> None:
    model = fastops.swap(nn.Sequential(OnlyConstructed(4), nn.ReLU()))
    layer = model[0]
    assert isinstance(layer, OnlyConstructed) and isinstance(layer, fastops.nn.Linear)
    assert type(layer).__name__ == "OnlyConstructed" and fastops.report(model).fused == 1
    assert fused(model, X) == 1
    assert type(pickle.loads(pickle.dumps(layer))) is OnlyConstructed
    nn.utils.parametrizations.weight_norm(layer)
    assert fused(fastops.swap(model), X) == 1
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(fastops.unswap(model)[0]) is OnlyConstructed


class OwnWeight(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.stored * 2

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.stored = nn.Parameter(value.detach())


class OwnCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


@pytest.mark.parametrize("kind", [OwnWeight, OwnCall])
def test_a_subclass_with_more_is_left_alone(kind: type[nn.Linear]) -> None:
    layer = nn.Linear.__new__(kind)
    nn.Module.__init__(layer)
    if kind is OwnWeight:
        layer.in_features, layer.out_features, layer.bias = 4, 4, None
        layer.weight = torch.randn(4, 4)
    else:
        nn.Linear.__init__(layer, 4, 4)
    model = nn.Sequential(layer, nn.ReLU())
    expected = model(X)
    assert torch.equal(fastops.swap(model)(X), expected)
    assert type(layer) is kind and fastops.report(model).fused == 0


def test_parametrized_class_comes_back() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    before = type(model[0])
    assert fused(fastops.swap(model), X) == 1
    assert type(fastops.unswap(model)[0]) is before
    fastops.swap(model)
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    expected = model(X)
    assert torch.equal(fastops.unswap(model)(X), expected)


# What becomes of them -------------------------------------------------------------------------------------------------


def test_a_swap_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Net(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    before = [type(module) for module in model.modules()]
    monkeypatch.setattr(model, "to", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastops.swap(model, memory_format=torch.channels_last)
    assert [type(module) for module in model.modules()] == before


def test_classes_go_when_nobody_uses_them() -> None:
    class Local(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(x))

    model = fastops.swap(Local())
    user, ours = weakref.ref(Local), weakref.ref(type(model))
    del model, Local
    gc.collect()
    assert user() is None and ours() is None


class Counting(Net):
    """Keeps count in the class, and makes others like it."""

    calls = 0

    @classmethod
    def count(cls) -> type:
        cls.calls += 1
        return cls

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return F.relu(self.fc(x))


def test_class_methods_get_the_users_class() -> None:
    model = fastops.swap(Counting())
    before = Counting.calls
    model(X)
    assert Counting.calls == before + 1
    assert model.count() is Counting and fastops.report(model).fused == 1
