"""What others do to classes, before a swap and after it, and what users' methods ask of their own class."""

from __future__ import annotations

import abc
import copy
import functools
import gc
import pickle
import shutil
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from swap_models import count_fused
from torch import Tensor, nn

import fastops

T = TypeVar("T")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with fastops.backend("torch"):
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


class Child(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def fused(model: nn.Module, *inputs: Tensor) -> int:
    """How many fused calls run, which must not change the result."""
    with pytest.MonkeyPatch.context() as patch:
        calls = count_fused(patch)
        found = model(*inputs)
    expected = fastops.unswap(copy.deepcopy(model))(*inputs)
    assert torch.equal(found, expected)
    return len(calls)


X = torch.linspace(-1, 1, 12).view(3, 4)


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


# The swap itself ------------------------------------------------------------------------------------------------------


def test_a_swap_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Net(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    before = [type(module) for module in model.modules()]
    monkeypatch.setattr(model, "to", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastops.swap(model, memory_format=torch.channels_last)
    assert [type(module) for module in model.modules()] == before


def test_threads_serve_while_others_swap_and_report() -> None:
    served, other = nn.Sequential(Net(), nn.Linear(4, 4), nn.ReLU()), fastops.swap(Net())
    expected, errors, stop = (served(X), other(X)), [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                with fastops.backend("torch"):  # in each thread anew
                    assert torch.equal(served(X), expected[0]) and torch.equal(other(X), expected[1])
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        fastops.report(fastops.swap(served))
        fastops.unswap(served)
        copy.deepcopy(other)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_classes_go_when_nobody_uses_them() -> None:
    class Local(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(x))

    model = fastops.swap(Local())
    user, ours = weakref.ref(Local), weakref.ref(type(model))
    del model, Local
    gc.collect()
    assert user() is None and ours() is None


# Call sites -----------------------------------------------------------------------------------------------------------


class Statements(Net):
    """Methods with a ReLU behind a layer, under circumstances. Each returns its result."""

    def read_again(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = self.relu(y)
        return z + y

    def deleted(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = self.relu(y)
        del y
        return z

    def aliased(self, x: Tensor) -> Tensor:
        y = kept = self.fc(x)
        y = torch.relu_(y)
        return y + kept

    def call_between(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.fc(x)
        x.zero_()
        y = self.relu(y)
        return y + x

    def closure_reads(self, x: Tensor) -> Tensor:
        def act(value: Tensor) -> Tensor:
            return value + x

        x = self.fc(x)
        x = act(x)
        return x

    def swallowed(self, x: Tensor) -> Tensor:
        import contextlib

        with contextlib.suppress(AttributeError):
            x = self.fc(x)
            x = self.missing(x)
        return x

    def generator(self, x: Tensor) -> Tensor:
        def values() -> Iterator[Tensor]:
            y = self.relu(self.fc(x))
            yield y
            y = self.fc(y)
            yield y

        return sum(values())  # type: ignore[return-value]

    def functions_with_effects(self, x: Tensor) -> Tensor:
        x = x.clone()

        def layers(given: Tensor = x) -> Iterator[nn.Module]:
            yield self.fc
            given.zero_()
            yield self.relu

        out = x
        for layer in layers():
            out = layer(out)
        return out

    def locals_(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        seen = locals()["y"]
        y = self.relu(y)
        return y + seen

    def branches(self, x: Tensor, flag: bool = False, *, scale: float = 2.0) -> Tensor:
        if flag:
            x = self.fc(x)
        elif self.training:
            x = self.fc(x) * scale
        else:
            x = self.fc(-x)
        x = self.relu(x)
        return x

    def unbound_in_a_branch(self, x: Tensor) -> Tensor:
        if x is None:
            y = self.fc(x)
        if x is None:
            return self.relu(y)
        return x

    def walrus_and_match(self, x: Tensor) -> Tensor:
        if (y := self.fc(x)).dim() == 2:
            y = self.relu(y)
        match y.dim():
            case 2:
                z = self.fc(y)
                z = self.relu(z)
            case _:
                z = y
        return z

    def deleted_before(self, x: Tensor) -> Tensor:
        y = x * 2
        del y
        y = self.fc(x)
        y = self.relu(y)
        return y

    def deleted_in_each_turn(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            y = self.fc(x)
            y = self.relu(y)
            x = y
            del y
        return x

    def deleted_by_except(self, x: Tensor) -> Tensor:
        y: Any = x
        try:
            raise ValueError
        except ValueError as y:  # noqa: F811
            x = x + len(y.args)
        y = self.fc(x)
        y = self.relu(y)
        return y

    def bound_in_another_case(self, x: Tensor) -> Tensor:
        match x.dim():
            case 1:
                y = x * 2
            case _:
                y = self.fc(x)
                y = self.relu(y)
        return y

    def nonlocal_(self, x: Tensor) -> Tensor:
        def inner() -> Tensor:
            nonlocal x
            x = self.fc(x)
            x = self.relu(x)
            return x

        return inner() + x

    def sum_written_into_a_view(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        view = y[0]
        y += x
        y = self.relu(y)
        return y + view

    @property
    def changing(self) -> nn.Module:
        with torch.no_grad():
            self.fc.weight.mul_(2)
        return self.relu

    def property_with_effects(self, x: Tensor) -> Tensor:
        weight = self.fc.weight.detach().clone()
        y = self.fc(x)
        y = self.changing(y)
        with torch.no_grad():
            self.fc.weight.copy_(weight)
        return y


METHODS = [name for name, value in vars(Statements).items() if callable(value) and not name.startswith("__")]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_statements(name: str, backend: str) -> None:
    model = Statements()
    expected = getattr(model, name)(X)
    with fastops.backend(backend):
        found = getattr(fastops.swap(model), name)(X)
    torch.testing.assert_close(found, expected)


def test_no_promise_is_left_where_an_exception_is_raised() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = x
            y = self.fc(y)
            y = self.missing(y)
            return y

    model = fastops.swap(Fails())
    for hooked in (False, True):
        if hooked:
            model.fc.register_forward_hook(lambda *_: None)
        with pytest.raises(AttributeError, match="missing") as raised:
            model(X)
        frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
        seen = [frame.f_locals["y"] for frame in frames if "y" in frame.f_locals]
        assert seen and all(type(value) is Tensor for value in seen)
        line = next(
            f for f in traceback.extract_tb(raised.value.__traceback__) if f.name == "forward" and "y = " in f.line
        )
        assert line.line == "y = self.missing(y)"


def test_a_hook_that_removes_itself() -> None:
    model, seen = fastops.swap(Net()), []
    handle = model.fc.register_forward_hook(lambda *_: (seen.append(1), handle.remove())[1])
    assert fused(model, X) == 0 or seen == [1]
    assert fused(model, X) == 1 and len(seen) >= 1


def test_source_that_is_not_the_truth(tmp_path: Path) -> None:
    """A file that changed after it was imported: its methods keep their code."""
    path = tmp_path / "changed_module.py"
    source = "from test_swap_classes import Net\n\nclass Changed(Net):\n  def forward(self, x):\n"
    source += "    return self.relu(self.fc({}))\n"
    path.write_text(source.format("x"))
    namespace: dict[str, Any] = {"__name__": "changed_module"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    path.write_text(source.format("-x"))
    model = namespace["Changed"]()
    expected = model(X)
    assert torch.equal(fastops.swap(model)(X), expected)
    assert "its source is not what it was compiled from" in str(fastops.report(model))


OTHER_PYTHONS = [
    version for version in ("3.10", "3.11", "3.12", "3.13", "3.14") if shutil.which(f"python{version}") is not None
]


@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_source_is_believed_in_every_python(version: str) -> None:
    """Compiled anew, LeNet's methods are what they were, whatever the version does with calls."""
    script = Path(__file__).parent / "callsites_alone.py"
    command = [f"python{version}", str(script), str(Path(fastops.__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no usable" in result.stderr or result.returncode == 127:
        pytest.skip(f"python{version} does not start")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["4", "4"], sys.version


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


def test_swapped_models_with_gradients_are_traced() -> None:
    """torch.jit.trace runs a function twice, with gradients and without, and compares what it saw."""
    model = fastops.swap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(2, 3, 2), nn.ReLU()))
    x = torch.randn(1, 2, 4)
    for backend in ("triton", "onednn", "torch"):
        with fastops.backend(backend):
            assert torch.equal(torch.jit.trace(model, x)(x), fastops.unswap(copy.deepcopy(model))(x))


def test_two_threads_that_copy_leave_the_model_swapped() -> None:
    model = fastops.swap(Net())
    kind = type(model)
    threads = [threading.Thread(target=lambda: [copy.deepcopy(model) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert type(model) is kind
