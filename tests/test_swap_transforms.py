"""A swapped model under `torch.func`, `torch.compile`, `torch.export` and a profiler, as its plain self is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_models import CASES, Functional, pair
from torch import Tensor, nn

import fastops

pytestmark = pytest.mark.usefixtures("exact")


def test_functional_call_and_transforms() -> None:
    model, reference = pair(CASES["functional relu"])
    fastops.swap(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    state = {name: value.detach() * 2 for name, value in model.state_dict().items()}

    def loss(candidate: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda state: torch.func.functional_call(candidate, state, (x,)).square().sum()

    found, expected = torch.func.grad(loss(model))(state), torch.func.grad(loss(reference))(state)
    assert all(torch.equal(found[name], expected[name]) for name in state)
    rows = torch.func.vmap(lambda row: torch.func.functional_call(model, state, (row,)))(x)
    torch.testing.assert_close(rows, torch.func.functional_call(reference, state, (x,)))


@pytest.mark.parametrize("name", ["Sequential", "functional relu", "nested Sequentials", "dropout(self.training)"])
def test_compile_in_one_graph(name: str, fresh_dynamo: None) -> None:
    case = CASES[name]
    model, reference = pair(case)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fastops.swap(model).eval(), fullgraph=True, backend=backend)
    (x,) = case.inputs()
    assert torch.equal(compiled(x), reference.eval()(x))
    assert torch.equal(compiled(x), reference(x)) and len(graphs) == 1
    assert any(node.target == "relu" for node in graphs[0].graph.nodes)  # fused: the method, not the model's function


def test_compile_many_classes(fresh_dynamo: None) -> None:
    """torch.compile keeps a limited number of results for one function: fused classes must not share theirs."""
    for width in range(1, torch._dynamo.config.recompile_limit + 3):
        layers = [nn.Linear(6, 6) for _ in range(width)]
        model = fastops.swap(nn.Sequential(*layers, nn.ReLU()))
        x = torch.randn(2, 6)
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
            assert torch.equal(compiled, model(x))


def test_swap_after_compile(fresh_dynamo: None) -> None:
    model, reference = pair(CASES["functional relu"])
    model.compile(backend="eager")
    x = torch.randn(5, 6, dtype=torch.float64)
    for change in (lambda m: m, fastops.swap, fastops.unswap):
        change(model)
        assert torch.equal(model(x), reference(x))


def test_export() -> None:
    model, reference = pair(CASES["functional relu"])
    x = torch.randn(5, 6, dtype=torch.float64)
    program = torch.export.export(fastops.swap(model), (x,))
    assert torch.equal(program.module()(x), reference(x))


def test_a_profiler_goes_on() -> None:
    seen = []
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        model = fastops.swap(Functional())
        seen.clear()
        model(torch.randn(2, 6))
    finally:
        sys.setprofile(None)
    assert seen and fastops.report(model).fused == 2
