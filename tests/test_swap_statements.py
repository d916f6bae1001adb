"""Statements of users' methods in which a call site is: what they do stays what it was."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from swap_models import Net, X, fused
from torch import Tensor, nn

import fastops

pytestmark = pytest.mark.usefixtures("exact")


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
    source = "from swap_models import Net\n\nclass Changed(Net):\n  def forward(self, x):\n"
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


def test_swapped_models_with_gradients_are_traced() -> None:
    """torch.jit.trace runs a function twice, with gradients and without, and compares what it saw."""
    model = fastops.swap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(2, 3, 2), nn.ReLU()))
    x = torch.randn(1, 2, 4)
    for backend in ("triton", "onednn", "torch"):
        with fastops.backend(backend):
            assert torch.equal(torch.jit.trace(model, x)(x), fastops.unswap(copy.deepcopy(model))(x))
