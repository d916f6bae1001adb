"""Random programs of layers, ReLUs and other operations, with random reuse: swapped they compute what they computed."""

from __future__ import annotations

import copy
import linecache

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastops

WIDTH = 4

# How a step makes a value out of one or two others; all three variables are overwritten again and again.
STEPS = (
    "{v} = self.layers[0]({a})",
    "{v} = self.layers[1]({a})",
    "{v} = self.last(input={a})",
    "{v} = self.sequential({a})",
    "{v} = self.identity({a})",
    "{v} = self.relu(self.last({a}))",
    "{v} = F.relu(self.layers[0]({a}) + {b})",
    "{v} = F.relu({a})",
    "{v} = F.relu({a}, True)",
    "{v} = F.relu({a}, inplace=True)",
    "{v} = {a}.relu()",
    "{v} = {a}.relu_()",
    "{v} = self.relu({a})",
    "{v} = F.dropout({a}, 0.5, self.training)",
    "{v} = {a} + {b}",
    "{a} += {b}",
    "{v} = {a}",
    "{v} = {a}.mul_(0.5)",
    "{v} = {a}.view(-1, WIDTH)",
    "{v} = {a}.tanh() * 2",
    "{v} = torch.cat([{a}, {b}])[: {a}.shape[0]]",
    "if self.training:\n    {v} = self.last({a})",
    "if self.training:\n    {v} = self.layers[1]({v})\nelse:\n    {v} = self.relu({v})",
    "if self.absent is not None:\n    {v} = self.absent({v})",
    "for layer in self.layers:\n    {v} = layer({v})",
    "with torch.no_grad():\n    {v} = self.last({v})\n    {v} = self.relu({v})",
    "try:\n    {v} = self.last({v})\n    {v} = self.relu({v})\nfinally:\n    pass",
    "{v} = (lambda t: self.relu(self.last(t)))({a})",
    "{v} = [self.relu(self.last({a})) for _ in range(2)][0]",
)


class Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.last, self.relu, self.identity = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Identity()
        self.sequential = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.absent = None


def program(steps: list[tuple[str, int, int, int]]) -> type[Program]:
    """A class whose ``forward`` has these steps as its source."""
    lines = ["v0 = x * 1", "v1 = x * 2", "v2 = x - 1"]
    for step, v, a, b in steps:
        lines += step.format(v=f"v{v}", a=f"v{a}", b=f"v{b}").splitlines()
    lines.append("return v0, v1, v2")
    source = "class Random(Program):\n  def forward(self, x):\n" + "".join(f"    {line}\n" for line in lines)
    filename = f"<program {hash(source)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {**globals(), "F": F}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["Random"]  # type: ignore[no-any-return]


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


names = st.integers(0, 2)
programs = st.lists(st.tuples(st.sampled_from(STEPS), names, names, names), min_size=2, max_size=9)


@settings(max_examples=150, deadline=None)
@given(programs, st.booleans())
def test_random_program(steps: list[tuple[str, int, int, int]], training: bool) -> None:
    torch.manual_seed(0)
    model = program(steps)().double().train(training)
    reference = copy.deepcopy(model)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fastops.swap(model)
    with fastops.backend("torch"):
        expected, found = outcome(reference, x), outcome(model, x)
    assert not any("not looked into" in row.outcome for row in fastops.report(model).rows), (
        "its source was not believed"
    )
    if isinstance(expected, str):
        return  # eager refuses a change in place; fused, the value may not exist that would have been changed
    assert not isinstance(found, str)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
