"""What changes after a swap counts: what a call runs is decided by what its callables are then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_models import Functional, Loop, Residual, SharedReLU, TiedWeights, count_fused, nested, sequential
from torch import Tensor, nn
from torch.nn.utils import prune

import fastops

SCALE = 2.0


def activation(x: Tensor) -> Tensor:
    return F.relu(x)


pytestmark = pytest.mark.usefixtures("exact")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 6)


class Attributes(Base):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.negate, self.kind, self.sizes = 2.0, False, "relu", [2, 3]
        self.options = {"bias": None}
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x)) * self.scale * self.factor * sum(self.sizes)
        if self.negate:
            x = -x
        if self.kind == "tanh":
            x = x.tanh()
        if self.options["bias"]:
            x = x + 1
        if hasattr(self, "extra"):
            x = x + self.extra
        return self.out(x) * self.drop.p


class Slots(Base):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "scale", 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) * self.scale


class Globals(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(activation(self.fc(x))) * SCALE


class Methods(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = F.relu

    @property
    def doubled(self) -> float:
        return self.factor * 2

    factor = 1.0

    def helper(self, x: Tensor) -> Tensor:
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.fc(x)) * self.doubled


class Tensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("mask", None)
        self.plain = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x)) * self.plain
        if self.scale is not None:
            x = x * self.scale
        if self.mask is not None:
            x = x * self.mask
        return x


class ByClass(Base):
    """Decides by the classes of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = F.relu(x)
        return x


class TwoNames(Base):
    """One child under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.again(F.relu(self.fc(x))))


class Custom(Base):
    """Has a `__getattr__` and a `__call__` of its own."""

    def __getattr__(self, name: str) -> Any:
        return self._modules["fc"] if name == "layer" else super().__getattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


def setting(name: str, value: Any) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    """Set an attribute, on a child if ``name`` has dots."""

    def change(model: nn.Module, _: pytest.MonkeyPatch) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value() if callable(value) else value)

    return change


def doing(action: Callable[[Any], object]) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda model, _: action(model) and None


def patching(owner: Any, name: str, value: Any) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setattr(owner, name, value)


def linear() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(6, 6).double()


def prepend(model: nn.Sequential) -> None:
    model.insert(0, nn.Tanh())


def square() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


def reverse(model: nn.Sequential) -> None:
    model._modules = dict(reversed(model._modules.items()))


def untie(model: TiedWeights) -> None:
    model.outer.weight = nn.Parameter(torch.eye(6, dtype=torch.float64))


def rename(model: TwoNames) -> None:
    model.fc = model.again = linear()


def negative(self: Any, x: Tensor) -> Tensor:
    return -self.fc1(x) if hasattr(self, "fc1") else -self.fc(x)


def minus(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output - 0.25


# The model, what happens to it after the swap, and how many fused calls are left.
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, pytest.MonkeyPatch], None], int]] = {
    "float attribute": (Attributes, setting("scale", 3.0), 1),
    "bool attribute": (Attributes, setting("negate", True), 1),
    "str attribute": (Attributes, setting("kind", "tanh"), 1),
    "list attribute grows": (Attributes, doing(lambda model: model.sizes.append(4)), 1),
    "dict attribute": (Attributes, doing(lambda model: model.options.update(bias=1.0)), 1),
    "missing attribute appears": (Attributes, setting("extra", 1.0), 1),
    "attribute of a child": (Attributes, setting("drop.p", 0.25), 1),
    "class attribute": (Attributes, patching(Attributes, "factor", 3.0), 1),
    "float attribute set to an equal int": (Attributes, setting("scale", 2), 1),
    "attribute that forward does not read": (Attributes, setting("unread", 3.0), 1),
    "slot": (Slots, doing(lambda model: object.__setattr__(model, "scale", 3.0)), 1),
    "global constant": (Globals, doing(lambda model: None), 0),
    "global constant changes": (Globals, lambda _, patch: patch.setitem(globals(), "SCALE", 3.0), 0),
    "global function changes": (Globals, lambda _, patch: patch.setitem(globals(), "activation", torch.tanh), 1),
    "method of the class": (Methods, patching(Methods, "helper", lambda self, x: -x), 0),
    "method on the object": (Methods, doing(lambda model: setattr(model, "helper", torch.tanh)), 1),
    "function attribute": (Methods, doing(lambda model: setattr(model, "act", torch.tanh)), 0),
    "behind a property": (Methods, setting("factor", 5.0), 0),
    "the property itself": (Methods, patching(Methods, "doubled", property(lambda self: 7.0)), 0),
    "forward of the class": (Functional, patching(Functional, "forward", negative), 0),
    "forward on the object": (Functional, doing(lambda m: setattr(m, "forward", negative.__get__(m))), 0),
    "parameter becomes None": (Tensors, setting("scale", None), 1),
    "parameter replaced": (Tensors, setting("scale", lambda: nn.Parameter(torch.full((6,), 3.0).double())), 1),
    "buffer appears": (Tensors, setting("mask", lambda: torch.zeros(6).double()), 1),
    "plain tensor replaced": (Tensors, setting("plain", lambda: torch.tensor(5.0).double()), 1),
    "child replaced by a torch layer": (Functional, setting("fc2", lambda: nn.Linear(8, 7).double()), 1),
    "child replaced by Identity": (Residual, setting("fc1", nn.Identity), 0),
    "child replaced by a new layer": (Residual, setting("fc1", linear), 0),
    "child appears": (Residual, setting("downsample", linear), 1),
    "unrelated child appears": (Residual, doing(lambda model: model.add_module("new", nn.Identity())), 1),
    "ReLU replaced": (SharedReLU, setting("relu", nn.GELU), 2),
    "ModuleList grows": (Loop, doing(lambda model: model.layers.append(linear())), 3),
    "ModuleDict changes": (Loop, doing(lambda model: model.acts.update({"relu": nn.Tanh()})), 2),
    "class of a child decides": (ByClass, doing(lambda model: model.layers.__setitem__(1, linear())), 0),
    "one of two names": (TwoNames, setting("again", linear), 1),
    "both names": (TwoNames, doing(rename), 0),
    "weights untied": (TiedWeights, doing(untie), 1),
    "own __getattr__ and __call__": (Custom, setting("unread", 1.0), 1),
    "Sequential.append": (sequential, doing(lambda model: model.append(nn.Tanh())), 3),
    "Sequential.insert": (sequential, doing(prepend), 2),
    "Sequential[1] =": (sequential, doing(lambda model: model.__setitem__(1, nn.Tanh())), 2),
    "del Sequential[3]": (sequential, doing(lambda model: model.__delitem__(3)), 1),
    "Sequential.add_module": (sequential, doing(lambda model: model.add_module("9", nn.Tanh())), 3),
    "Sequential.pop": (sequential, doing(lambda model: model.pop(-1)), 2),
    "order of children": (square, doing(reverse), 2),
    "inner Sequential changes": (nested, doing(lambda model: model[0].append(nn.Tanh())), 2),
    "part unswapped": (nested, doing(lambda model: fastops.unswap(model[1])), 1),
    "only one child in evaluation mode": (Attributes, doing(lambda model: model.fc.eval()), 1),
    "hook on the layer": (Residual, doing(lambda model: model.fc1.register_forward_hook(minus)), 0),
    "pre-hook on the layer": (Residual, doing(lambda m: m.fc1.register_forward_pre_hook(lambda _, a: (a[0] * 2,))), 0),
    "hook on the ReLU": (Residual, doing(lambda model: model.relu.register_forward_hook(minus)), 0),
    "forward of the ReLU replaced": (Residual, doing(lambda model: setattr(model.relu, "forward", torch.tanh)), 0),
    "forward of the layer replaced": (Residual, doing(lambda model: setattr(model.fc1, "forward", torch.tanh)), 0),
    "backward hook": (
        Residual,
        doing(lambda m: m.fc1.register_full_backward_hook(lambda _, gi, go: tuple(2 * g for g in gi))),
        0,
    ),
    "backward pre-hook on the ReLU": (
        Residual,
        doing(lambda m: m.relu.register_full_backward_pre_hook(lambda _, go: tuple(2 * g for g in go))),
        0,
    ),
    "hook on the model": (Functional, doing(lambda model: model.register_forward_hook(minus)), 2),
    "layer pruned": (Functional, doing(lambda m: prune.l1_unstructured(m.fc1, "weight", 0.5)), 1),
    "layer parametrized": (Functional, doing(lambda m: nn.utils.parametrizations.weight_norm(m.fc1)), 2),
    "layer compiled": (Functional, doing(lambda model: model.fc1.compile(backend="eager")), 1),
}


@pytest.mark.parametrize(("make", "change", "fused"), CHANGES.values(), ids=CHANGES)
def test_change_after_swap(
    make: Callable[[], nn.Module],
    change: Callable[[nn.Module, pytest.MonkeyPatch], None],
    fused: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_fused(monkeypatch)
    model, reference = make().double(), make().double()
    reference.load_state_dict(model.state_dict())
    fastops.swap(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(model(x), reference(x))
    assert calls or make in (Globals, Methods, ByClass), "nothing was fused before the change either"
    for changed in (model, reference):
        torch.manual_seed(3)
        change(changed, monkeypatch)
    for mode in (True, False):
        if change is not CHANGES["only one child in evaluation mode"][1]:
            model.train(mode)
            reference.train(mode)
        calls.clear()
        gradients = []
        for candidate in (model, reference):
            torch.manual_seed(4)
            candidate.zero_grad()
            inputs = x.clone().requires_grad_()
            output = candidate(inputs)
            output.square().sum().backward()
            gradients.append([output, inputs.grad, *(parameter.grad for parameter in candidate.parameters())])
        for one, other in zip(*gradients, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        assert len(calls) == fused
