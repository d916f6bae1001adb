"""torch.export of models with fastops layers: strict or not, any batch, saved, loaded and decomposed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import no_fallback
from torch import Tensor, nn

import fastops
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
    arguments = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "program.pt2"), str(tmp_path / "data.pt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
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
