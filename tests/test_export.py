"""torch.export of models with fastops layers: strict or not, any batch, saved, loaded and decomposed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from cases import no_fallback
from forked import run_python
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops import nn as fnn

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.loss = fnn.LinearReLU(3, 5), fnn.Linear(5, 4), fnn.CrossEntropyLoss()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.out(self.hidden(input)), target)


LOAD = """
import sys, torch, fastops
program = torch.export.load(sys.argv[1])
names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
assert any(name.startswith("fastops.linear") for name in names), names
input, target, expected = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(program.module()(input, target), expected)
"""


def test_exported_program_loads_where_only_fastops_is_imported(tmp_path: Path) -> None:
    model = Net()
    input, target = torch.randn(6, 3), torch.randint(4, (6,))
    batch = torch.export.Dim("batch", min=2)
    with fastops.backend("triton"):
        program = torch.export.export(model, (input, target), dynamic_shapes=({0: batch}, {0: batch}), strict=True)
    torch.export.save(program, tmp_path / "program.pt2")
    input, target = torch.randn(9, 3), torch.randint(4, (9,))
    torch.save((input, target, model(input, target).detach()), tmp_path / "data.pt")
    arguments = ["-W", "ignore", "-c", LOAD, tmp_path / "program.pt2", tmp_path / "data.pt"]
    result = run_python(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_without_strictness(strict: bool) -> None:
    model = Net()
    input, target = torch.randn(6, 3), torch.randint(4, (6,))
    program = torch.export.export(model, (input, target), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(input, target), model(input, target))


@pytest.mark.parametrize("strict", [True, False])
def test_export_on_every_way(strict: bool, backend: str) -> None:
    """Of a swapped model: strict or not, the program names the raw ops of the way, also after decompositions."""
    torch.manual_seed(0)
    model = fastops.swap(nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3), nn.ReLU()))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 1, 4, 4),), dynamic_shapes=({0: batch},), strict=strict)
    input = torch.randn(9, 1, 4, 4)
    for exported in (program, program.run_decompositions()):
        torch.testing.assert_close(exported.module()(input), model(input))
        names = [str(node.target) for node in exported.graph.nodes]
        # Without strictness torch replaces the call of modules, and nothing is fused then.
        op = "fastops.linear_relu.default" if strict else "fastops.linear.default"
        assert (op in names) == (backend != "torch")


def test_exported_program_can_be_trained(backend: str) -> None:
    """The raw ops in the program have the gradients of the functions."""
    model = fastops.swap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = torch.randn(4, 6)
    program = torch.export.export(model, (x,)).module()
    for module in (program, model):
        module(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close({name: p.grad for name, p in program.named_parameters()}, expected)


class OnGPU(nn.Module):
    """Calls of which `auto` decides by their size, with parameters that a GPU would have."""

    def __init__(self) -> None:
        super().__init__()
        half = {"device": "cuda", "dtype": torch.bfloat16}
        self.features = nn.Parameter(torch.empty(16, 16, **half))  # type: ignore[arg-type]
        self.classes = nn.Parameter(torch.empty(1000, 16, **half))  # type: ignore[arg-type]
        self.exact = nn.Parameter(torch.empty(16, 16, device="cuda"))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        hidden = FF.linear_relu(FF.add_relu(input, input), self.features)
        exact = FF.linear_relu(hidden.float(), self.exact)  # which is torch's whatever the size
        return FF.linear_cross_entropy(exact.bfloat16(), self.classes, target)


@pytest.mark.parametrize("strict", [True, False])
def test_auto_asks_nothing_of_a_batch_of_any_size_on_a_gpu(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way is faster depends on it: so kernels it is, and no guard. Here fake tensors are a GPU's."""
    monkeypatch.setattr(dispatch, "_INTERPRETER", False)
    batch = torch.export.Dim("batch", min=1)
    with FakeTensorMode(allow_non_fake_inputs=True), fastops.backend("auto"):
        arguments = (
            torch.empty(8, 16, device="cuda", dtype=torch.bfloat16),
            torch.empty(8, dtype=torch.int64, device="cuda"),
        )
        program = torch.export.export(OnGPU(), arguments, dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
        fixed = torch.export.export(OnGPU(), arguments, strict=strict)
    names = [
        [str(node.target) for node in each.graph.nodes if "fastops" in str(node.target)] for each in (program, fixed)
    ]
    assert [name.split(".")[1] for name in names[0]] == ["add_relu", "linear_relu", "linear_cross_entropy"]
    assert names[1] == []
