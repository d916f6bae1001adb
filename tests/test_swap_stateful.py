"""A swapped model and its eager twin, to which the same things happen in any order: after each they are compared."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import onednn_in_float64
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from swap_models import words
from torch import Tensor, nn

import fastops
from fastops import dispatch

pytestmark = pytest.mark.usefixtures("no_interpreter")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.shortcut: nn.Module = nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.bn1(y)
        y = self.relu(y)
        y = self.conv(y)
        y = self.bn2(y)
        y += self.shortcut(x)
        return self.relu(y)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
        self.blocks = nn.Sequential(Block(), Block())
        self.head: nn.Module = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU()])
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.entry: nn.Module = nn.Identity()
        self.act: nn.Module = nn.ReLU()
        self.drop = nn.Dropout(0.5)

    def hidden(self, x: Tensor) -> Tensor:
        y = self.entry(x)  # as long as that is an identity, the sum is written into x
        y += self.norm(self.first(x * 1))
        y = self.act(y)
        x = self.first(x)
        if self.training:
            x = self.norm(x)
        return self.act(x + y)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.hidden(x.mean((2, 3))))
        for layer in self.layers:
            x = layer(x)
        x = F.relu(self.last(x), inplace=True)
        return torch.add(self.last(x), x).sigmoid()


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
                nn.SiLU(),
                nn.Identity(),
                nn.Conv2d(4, 4, 1),
            ),
            nn.ReLU(),
        )


MODELS: dict[str, type[nn.Module]] = {"images": Images, "rows": Rows, "sequential": Plain}
NEW: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "own": lambda: nn.Sequential(nn.ReLU(), nn.Hardswish()),
    "dropout": lambda: nn.Dropout(0.3),
}


def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def shift(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + 1,)


def halve(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> Any:
    return tuple(None if gradient is None else gradient / 2 for gradient in grad_inputs)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(double),
    "before": lambda m: m.register_forward_pre_hook(shift),
    "backward": lambda m: m.register_full_backward_hook(halve),
}


def results(model: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """Output and gradients, of ``function`` if that is given. Or the error, if an edit has led to one."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    try:
        output = (model if function is None else function)(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)]
    except RuntimeError as error:
        return [words(error)]


class Twins(RuleBasedStateMachine):
    """``swapped`` and ``eager`` have the same parameters. Where results may differ by rounding, these are made equal
    again after each comparison, so that it does not add up."""

    @initialize(kind=st.sampled_from(sorted(MODELS)), way=st.sampled_from(["torch", "auto", "onednn"]))
    def make(self, kind: str, way: str) -> None:
        self.ways = contextlib.ExitStack()
        self.dtype, self.handles, self.works, self.is_compiled = torch.float64, list[tuple[Any, Any]](), True, False
        torch.manual_seed(0)
        self.eager = MODELS[kind]().double()
        self.swapped = fastops.swap(copy.deepcopy(self.eager))
        self.select(way)

    def teardown(self) -> None:
        self.ways.close()

    def both(self, action: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
        found = []
        for model in (self.eager, self.swapped):
            torch.manual_seed(2)
            found.append(action(model))
        return found[0], found[1]

    def path(self, number: int) -> str:
        """One of the modules inside."""
        paths = [path for path, m in self.eager.named_modules() if path and not isinstance(m, nn.ModuleList)]
        return paths[number % len(paths)]

    def x(self, rows: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, 4, 3, 4, generator=generator, dtype=torch.float64).to(self.dtype)

    def close(self, found: Any, expected: Any) -> None:
        """To the last bit where backend "torch" is selected; elsewhere to what rounding makes of it."""
        if isinstance(expected, (str, type(None))):
            assert found == expected
        elif isinstance(expected, list):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                self.close(one, other)
        elif self.exact:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        elif self.dtype is torch.float64:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    # What happens -----------------------------------------------------------------------------------------------------

    @rule(way=st.sampled_from(["torch", "auto", "onednn"]))
    def select(self, way: str) -> None:
        self.ways.close()
        self.ways.enter_context(fastops.backend(way))
        self.exact = way == "torch"

    @rule(fuse=st.booleans())
    def swap(self, fuse: bool) -> None:
        assert fastops.swap(self.swapped, fuse=fuse) is self.swapped

    @rule()
    def unswap(self) -> None:
        assert fastops.unswap(self.swapped) is self.swapped
        assert [type(m) for m in self.swapped.modules()] == [type(m) for m in self.eager.modules()]

    @rule(number=st.integers(0, 30), new=st.sampled_from(sorted(NEW)))
    def replace(self, number: int, new: str) -> None:
        path = self.path(number)
        self.both(lambda model: model.set_submodule(path, NEW[new]().to(self.dtype)))

    @rule(number=st.integers(0, 30), new=st.sampled_from(sorted(NEW)), delete=st.booleans())
    def edit(self, number: int, new: str, delete: bool) -> None:
        rows = [path for path, m in self.eager.named_modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
        if not rows:
            return
        path = rows[number % len(rows)]

        def change(model: nn.Module) -> None:
            row: Any = model.get_submodule(path)
            if delete and len(row) > 1:
                del row[number % len(row)]
            else:
                row.insert(number % (len(row) + 1), NEW[new]().to(self.dtype))

        self.both(change)

    @rule(training=st.booleans(), number=st.none() | st.integers(0, 30))
    def train(self, training: bool, number: int | None) -> None:
        path = "" if number is None else self.path(number)
        self.both(lambda model: model.get_submodule(path).train(training))

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def load(self, factor: float) -> None:
        state = {
            key: value * factor if value.is_floating_point() else value
            for key, value in self.eager.state_dict().items()
        }
        self.both(lambda model: model.load_state_dict(state))

    @rule(way=st.sampled_from([copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copied(self, way: Callable[[Any], Any]) -> None:
        self.eager, self.swapped = self.both(way)
        self.handles.clear()

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def convert(self, dtype: torch.dtype) -> None:
        self.both(lambda model: model.to(dtype))
        self.dtype = dtype

    @rule(number=st.integers(0, 30), wanted=st.booleans())
    def freeze(self, number: int, wanted: bool) -> None:
        path = self.path(number)
        self.both(lambda model: model.get_submodule(path).requires_grad_(wanted))

    @rule(number=st.integers(0, 2), kind=st.sampled_from(sorted(HOOKS)))
    def hook(self, number: int, kind: str) -> None:
        """A third of the modules."""
        eager, swapped = self.both(lambda model: [HOOKS[kind](m) for m in list(model.modules())[1 + number :: 3]])
        self.handles += zip(eager, swapped, strict=True)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, 30))
    def unhook(self, number: int) -> None:
        for handle in self.handles.pop(number % len(self.handles)):
            handle.remove()

    @precondition(lambda self: self.works)
    @rule(lr=st.sampled_from([0.01, 0.1]))
    def step(self, lr: float) -> None:
        def update(model: nn.Module) -> None:
            parameters = [p for p in model.parameters() if p.requires_grad]
            if parameters:
                optimizer = torch.optim.SGD(parameters, lr=lr)
                loss = model(self.x()).square().mean()
                if loss.requires_grad:
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        self.both(update)

    @rule()
    def report(self) -> None:
        assert str(fastops.report(self.swapped)) and fastops.report(self.eager).swapped == 0

    @precondition(lambda self: self.works)
    @rule(faster=st.sampled_from(["onednn", "torch"]))
    def tune(self, faster: str) -> None:
        def timer(call: Callable[[], object]) -> float:
            call()
            return 1.0 if dispatch.selected_backend() == faster else 2.0

        with fastops.backend("auto"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fastops.tune(self.swapped, self.x(), timer=timer)

    @rule(rows=st.integers(1, 4))
    def infer(self, rows: int) -> None:
        with torch.no_grad():
            eager, swapped = self.both(lambda model: model.eval()(self.x(rows + 1)))
        self.close(swapped, eager)

    @rule()
    def threads(self) -> None:
        self.both(lambda model: model.eval())
        way = dispatch.selected_backend()

        def run(rows: int) -> list[Any]:
            with fastops.backend(way):
                return results(self.swapped, self.x(rows))

        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(run, range(2, 8)))
        self.close(found, [results(self.eager, self.x(rows)) for rows in range(2, 8)])

    @precondition(lambda self: self.works and not self.is_compiled)
    @precondition(lambda self: not any(m._backward_hooks for m in self.eager.modules()))
    @rule(backend=st.sampled_from(["eager", "aot_eager"]))
    def compiled(self, backend: str) -> None:
        """Once: that takes longer than all the rest."""
        self.is_compiled = True
        torch._dynamo.reset()
        eager, swapped = copy.deepcopy(self.eager), copy.deepcopy(self.swapped)
        expected = results(eager, self.x())
        found = results(swapped, self.x(), torch.compile(swapped, backend=backend))
        exact, self.exact = self.exact, False
        self.close([found, list(swapped.buffers())], [expected, list(eager.buffers())])
        self.exact = exact

    # What must hold ---------------------------------------------------------------------------------------------------

    @invariant()
    def same(self) -> None:
        eager, swapped = self.both(lambda model: results(model, self.x()))
        self.close(swapped, eager)
        self.works = len(eager) > 1
        states = [model.state_dict() for model in (self.eager, self.swapped)]
        assert [*states[0]] == [*states[1]]
        self.close([*states[1].values()], [*states[0].values()])
        seen = [
            [(path, m.training, [*vars(m)], type(m).__name__) for path, m in model.named_modules()]
            for model in (self.eager, self.swapped)
        ]
        assert seen[0] == seen[1]
        if not self.exact:
            with torch.no_grad():
                for one, other in zip(states[1].values(), states[0].values(), strict=True):
                    one.copy_(other)


def test_any_order(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    run_state_machine_as_test(Twins, settings=settings(settings.default, stateful_step_count=12))
    torch._dynamo.reset()
