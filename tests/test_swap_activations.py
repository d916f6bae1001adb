"""Activations in swapped models and compiled graphs: fused with linear layers, as what they are in that very call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from torch import Tensor, nn

import fastops
from fastops.compile import compile_graph
from fastops.fusions import Layer
from fastops.kernels.activation import PARAMETERS

pytestmark = no_fallback

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "relu": (nn.ReLU, ("relu",)),
    "relu6": (nn.ReLU6, ("relu6",)),
    "leaky_relu": (lambda: nn.LeakyReLU(0.3), ("leaky_relu", 0.3)),
    "gelu": (nn.GELU, ("gelu",)),
    "gelu_tanh": (lambda: nn.GELU("tanh"), ("gelu_tanh",)),
    "silu": (nn.SiLU, ("silu",)),
    "sigmoid": (nn.Sigmoid, ("sigmoid",)),
    "tanh": (nn.Tanh, ("tanh",)),
    "hardswish": (nn.Hardswish, ("hardswish",)),
    "hardsigmoid": (nn.Hardsigmoid, ("hardsigmoid",)),
    "elu": (lambda: nn.ELU(0.5), ("elu", 0.5)),
    "softplus": (lambda: nn.Softplus(2.0, 1.0), ("softplus", 2.0, 1.0)),
    "mish": (nn.Mish, ("mish",)),
    "in place": (lambda: nn.SiLU(inplace=True), ("silu",)),
    "leaky in place": (lambda: nn.LeakyReLU(0.3, inplace=True), ("leaky_relu", 0.3)),
}


class Calls(nn.Module):
    """Applies a function in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.slope = nn.Linear(6, 5), 0.3


class Relu6(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.fc(x), inplace=True)


class LeakyPositional(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return F.leaky_relu(x, self.slope, True)


class LeakyKeyword(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.fc(x), negative_slope=self.slope)


class LeakyInPlace(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(self.fc(x), 0.3)


class Gelu(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x))


class GeluTanh(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x), approximate="tanh")


class Silu(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.fc(x), inplace=True)


class TorchSigmoid(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x))


class FunctionalSigmoid(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(self.fc(x))


class MethodSigmoid(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).sigmoid()


class MethodTanh(Calls):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y.tanh_()


class Hardswish(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.fc(x))


class Hardsigmoid(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.fc(x))


class Elu(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.fc(x), alpha=0.5)


class Softplus(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.fc(x), 2.0, threshold=1.0)


class Mish(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.fc(x))


class Hardtanh(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.fc(x), 0.0, 6.0)


class OfFunction(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.fc.weight, bias=self.fc.bias))


class OtherHardtanh(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.fc(x))


class IntoOut(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x), out=torch.empty(0, dtype=x.dtype)) if not x.requires_grad else self.fc(x)


class NegativeInPlace(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.fc(x), -0.5, True) if not torch.is_grad_enabled() else self.fc(x)


class SlopeOfTensor(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.fc(x), torch.tensor(0.2).item())


class Computed(Calls):
    """The option is a call, which comes after that of the layer."""

    def option(self) -> float:
        return self.slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.fc(x), self.option())


CALLS: dict[type[Calls], tuple[Any, ...] | None] = {
    Relu6: ("relu6",),
    LeakyPositional: ("leaky_relu", 0.3),
    LeakyKeyword: ("leaky_relu", 0.3),
    LeakyInPlace: ("leaky_relu", 0.3),
    Gelu: ("gelu",),
    GeluTanh: ("gelu_tanh",),
    Silu: ("silu",),
    TorchSigmoid: ("sigmoid",),
    FunctionalSigmoid: ("sigmoid",),
    MethodSigmoid: ("sigmoid",),
    MethodTanh: ("tanh",),
    Hardswish: ("hardswish",),
    Hardsigmoid: ("hardsigmoid",),
    Elu: ("elu", 0.5),
    Softplus: ("softplus", 2.0, 1.0),
    Mish: ("mish",),
    Hardtanh: ("relu6",),
    OtherHardtanh: None,
    IntoOut: None,
    NegativeInPlace: None,
    SlopeOfTensor: None,
    Computed: None,
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The activations of all fused calls so far."""
    seen: list[Any] = []
    run = Layer.run

    def counted(self: Layer, layer: Any, activation: Any, *tensors: Any) -> Tensor:
        if activation is not None:
            seen.append(activation)
        return run(self, layer, activation, *tensors)

    monkeypatch.setattr(Layer, "run", counted)
    return seen


def run(model: nn.Module) -> list[Tensor]:
    """Output without gradients, then with, and the gradients."""
    torch.manual_seed(1)
    x = torch.randn(4, 6, dtype=torch.float64) * 3
    with torch.no_grad():
        plain = model(x)
    x.requires_grad_()
    output = model(x * 1)
    output.square().sum().backward()
    assert x.grad is not None
    gradients = [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [plain, output.detach(), *gradients]


def assert_same(swapped: nn.Module, eager: nn.Module, backend: str) -> None:
    found, expected = run(swapped), run(eager)
    torch.testing.assert_close(found, expected)
    assert backend != "torch" or all(map(torch.equal, found, expected))


def test_every_activation_is_here() -> None:
    assert {activation[0] for _, activation in MODULES.values()} == set(PARAMETERS)
    assert {activation[0] for activation in CALLS.values() if activation} == set(PARAMETERS) - {"relu"}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, backend: str, fused: list[Any]) -> None:
    make, activation = MODULES[name]
    eager = nn.Sequential(nn.Linear(6, 5), nn.Identity(), make(), nn.Linear(5, 3)).double()
    swapped = fastops.swap(copy.deepcopy(eager))
    assert_same(swapped, eager, backend)
    assert fused == [activation] * 2
    assert fastops.report(swapped).fused == 1
    assert "1 of 1" in str(fastops.report(swapped))
    assert type(swapped[2]) is type(eager[2])


@pytest.mark.parametrize("kind", CALLS)
def test_functions(kind: type[Calls], backend: str, fused: list[Any]) -> None:
    eager = kind().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    assert_same(swapped, eager, backend)
    assert fused == ([] if CALLS[kind] is None else [CALLS[kind]] * 2)


def test_functions_of_layers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = OfFunction().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    seen = []
    original = fastops.functional.linear_act

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return original(*arguments, **keywords)

    monkeypatch.setattr(fastops.functional, "linear_act", counted)
    assert_same(swapped, eager, backend)
    assert [keywords["activation"] for keywords in seen] == ["gelu"] * 2
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: x @ weight.t())
    assert_same(swapped, eager, backend)
    assert len(seen) == 2


def model_of(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), activation).double()


class Own(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 1


def _hooked(model: Any) -> None:
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)


def _hooked_layer(model: Any) -> None:
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)


def _own_forward(model: Any) -> None:
    model[1].forward = lambda x: x * 2


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model[1], name, value)


# An activation, what happens to it after the swap, and what is fused then.
CHANGES: list[tuple[Callable[[], nn.Module], Callable[[Any], None], Any]] = [
    (nn.LeakyReLU, setting("negative_slope", 0.2), ("leaky_relu", 0.2)),
    (nn.LeakyReLU, setting("inplace", True), ("leaky_relu", 0.01)),
    (nn.GELU, setting("approximate", "tanh"), ("gelu_tanh",)),
    (nn.ELU, setting("alpha", 2), ("elu", 2)),
    (nn.Softplus, setting("threshold", 0.5), ("softplus", 1.0, 0.5)),
    (nn.ReLU6, setting("max_val", 4.0), None),
    (nn.SiLU, _hooked, None),
    (nn.SiLU, _hooked_layer, None),
    (nn.SiLU, _own_forward, None),
    (Own, lambda model: None, None),
    (nn.Softsign, lambda model: None, None),
]


@pytest.mark.parametrize(("make", "change", "activation"), CHANGES)
def test_changes_after_the_swap(
    make: Callable[[], nn.Module], change: Callable[[Any], None], activation: Any, backend: str, fused: list[Any]
) -> None:
    eager = model_of(make())
    swapped = fastops.swap(copy.deepcopy(eager))
    for model in (eager, swapped):
        change(model)
    assert_same(swapped, eager, backend)
    assert fused == ([] if activation is None else [activation] * 2)
    assert fastops.report(swapped).fused == (activation is not None)


@pytest.mark.parametrize(
    ("kind", "owner", "name", "value"),
    [
        (Silu, F, "silu", lambda x, inplace=False: x - 1),
        (Gelu, F, "gelu", lambda x, approximate="none": x - 1),
        (MethodSigmoid, Tensor, "sigmoid", lambda x: x - 1),
        (FunctionalSigmoid, Tensor, "sigmoid", lambda x: x - 1),
    ],
)
def test_replaced_functions_are_called(
    kind: type[Calls], owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch, fused: list[Any]
) -> None:
    swapped = fastops.swap(kind())
    monkeypatch.setattr(owner, name, value)
    x = torch.randn(4, 6)
    with fastops.backend("torch"):
        assert torch.equal(swapped(x), F.linear(x, swapped.fc.weight, swapped.fc.bias) - 1)
    assert not fused


def test_replaced_modules_are_called(monkeypatch: pytest.MonkeyPatch, fused: list[Any]) -> None:
    swapped = fastops.swap(nn.Sequential(nn.Linear(6, 5), nn.SiLU()))
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, input: input * 0 - 1)
    assert (swapped(torch.randn(4, 6)) == -1).all()
    assert not fused


def test_what_has_no_kernel_with_the_layer_before_runs_as_it_is() -> None:
    """And is fused as soon as there is one."""
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.BatchNorm2d(4), nn.SiLU(inplace=True)).double()
    swapped = fastops.swap(copy.deepcopy(eager))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with fastops.backend("torch"):
        assert torch.equal(swapped(x), eager(x))
    for row in fastops.report(swapped).rows:
        if row.group == "other activations":
            assert row.done or "no kernel with" in row.outcome


class Softer(nn.Module):
    """An activation in a file that is named after what it has."""

    __module__ = "library.activations"

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_the_report_names_what_it_does_not_know() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Softsign(), nn.Linear(5, 5), Softer(), nn.SiLU(), nn.Softsign())
    report = fastops.report(fastops.swap(model))
    assert [(row.name, row.layer) for row in report.rows if row.group == "not covered"] == [
        ("1", "Softsign"),
        ("3", "Softer"),
        ("5", "Softsign"),
    ]
    assert report.summary().endswith("\nnot covered: 2 Softsign, 1 Softer")
    outcomes = [row.outcome for row in report.rows if row.group == "other activations"]
    assert outcomes == ["not fused: its input is 3, a Softer, which has no fused form"]


# In compiled graphs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_dynamo(fresh_dynamo: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def graph_of(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Any]]:
    """Output, and name and keywords of every fastops call of the one graph."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    output = torch.compile(model, backend=compile_graph, options={"compiler": keep}, fullgraph=True)(x)
    calls = [node for node in graphs[0].graph.nodes if "fastops" in (getattr(node.target, "__module__", "") or "")]
    return output, [(node.target.__name__, dict(node.kwargs)) for node in calls]


def call_of(activation: tuple[Any, ...] | None) -> tuple[str, dict[str, Any]]:
    if activation in (None, ("relu",)):
        return "linear" if activation is None else "linear_relu", {}
    assert activation is not None
    name, *values = activation
    return "linear_act", {"activation": name, **dict(zip(PARAMETERS[name], values, strict=True))}


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_graphs(name: str, quiet_dynamo: None) -> None:
    make, activation = MODULES[name]
    model, x = model_of(make()), torch.randn(4, 6, dtype=torch.float64)
    with fastops.backend("triton"):
        output, calls = graph_of(model, x)
    torch.testing.assert_close(output, model(x))
    assert calls == [call_of(activation)]
    report = fastops.compile.report()
    assert report.fused == 1 and report.rows[-1].layer == activation[0]


@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind not in (IntoOut, SlopeOfTensor, NegativeInPlace)])
def test_functions_in_graphs(kind: type[Calls], quiet_dynamo: None) -> None:
    model, x = kind().double(), torch.randn(4, 6, dtype=torch.float64)
    with fastops.backend("triton"):
        output, calls = graph_of(model, x)
    torch.testing.assert_close(output, model(x))
    assert calls == [call_of(("leaky_relu", 0.3) if kind is Computed else CALLS[kind])]
    assert fastops.compile.report().fused == (kind is not OtherHardtanh)


@pytest.mark.parametrize("kind", [Gelu, LeakyPositional, MethodTanh])
def test_swapped_models_compile(kind: type[Calls], quiet_dynamo: None) -> None:
    model, x = kind().double(), torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    with fastops.backend("triton"):
        found = torch.compile(fastops.swap(model), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
