"""Random programs of layers, ReLUs and other operations, with random reuse: swapped they compute what they computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastops

WIDTH = 4

# How a step makes a value out of one or two earlier ones; layers and the ReLU module belong to the model.
STEPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "layer 0": lambda model, a, b: model.layers[0](a),
    "layer 1": lambda model, a, b: model.layers[1](a),
    "last layer": lambda model, a, b: model.last(input=a),
    "sequential": lambda model, a, b: model.sequential(a),
    "F.relu": lambda model, a, b: F.relu(a),
    "F.relu(inplace)": lambda model, a, b: F.relu(a, True),
    "relu": lambda model, a, b: a.relu(),
    "relu_": lambda model, a, b: a.relu_(),
    "ReLU": lambda model, a, b: model.relu(a),
    "dropout": lambda model, a, b: F.dropout(a, 0.5, model.training),
    "add": lambda model, a, b: a + b,
    "mul_": lambda model, a, b: a.mul_(0.5),
    "view": lambda model, a, b: a.view(-1, WIDTH),
    "tanh": lambda model, a, b: a.tanh() * 2,
    "cat": lambda model, a, b: torch.cat([a, b])[: a.shape[0]],
}


class Program(nn.Module):
    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = [(STEPS[name], first, second) for name, first, second in steps]
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.last, self.relu = nn.Linear(WIDTH, WIDTH), nn.ReLU()
        self.sequential = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1]
        for step, first, second in self.steps:
            values.append(step(self, values[first % len(values)], values[second % len(values)]))
        return values[-1], values[len(values) // 2]


def outcome(model: nn.Module, x: Tensor) -> list[Tensor] | str:
    """Outputs and gradients, or the error: in-place changes of what a gradient needs are one."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    model.zero_grad()
    try:
        outputs = model(x)
        sum(output.square().sum() for output in outputs).backward()
    except RuntimeError as error:
        return type(error).__name__
    gradients = [torch.zeros(0) if tensor.grad is None else tensor.grad for tensor in (x, *model.parameters())]
    return [*(output.detach() for output in outputs), *gradients]


links = st.integers(0, 7)
programs = st.lists(st.tuples(st.sampled_from(list(STEPS)), links, links), min_size=2, max_size=8)


@settings(max_examples=100, deadline=None)
@given(programs, st.booleans())
def test_random_program(steps: list[tuple[str, int, int]], training: bool) -> None:
    torch.manual_seed(0)
    model = Program(steps).double().train(training)
    reference = copy.deepcopy(model)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fastops.swap(model)
    with fastops.backend("torch"):
        expected, found = outcome(reference, x), outcome(model, x)
    assert not any(row.layer == "Program" for row in fastops.report(model).rows), "the program was not traced"
    if isinstance(expected, str):
        return  # eager refuses a change in place; fused, the value may not exist that would have been changed
    assert not isinstance(found, str)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
