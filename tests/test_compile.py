"""torch.compile, torch.export and the raw ops' own contract."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from cases import Case, gradients, no_fallback, one_case_per_op
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops import nn as fnn

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ROOT = Path(__file__).parents[1]
KERNEL_WAYS = pytest.mark.parametrize("way", ["triton", "onednn"])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def raw_op(case: Case) -> str:
    """The name of the raw op behind a function."""
    return next((op for op in ("linear", "conv") if case.op.startswith(op)), case.op)


class Recorder:
    """The compile backend 'aot_eager' that remembers the names of the ops in every graph."""

    def __init__(self) -> None:
        self.ops: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def remember(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            self.ops.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=remember, bw_compiler=remember)(graph, inputs)


@one_case_per_op
@KERNEL_WAYS
def test_compiled_function(case: Case, way: str) -> None:
    """One whole graph forward and backward that names the raw ops, with the results of eager."""
    tensors = case.tensors(torch.float32)
    recorder = Recorder()
    with fastops.backend(way):
        compiled = torch.compile(case.ours, backend=recorder, fullgraph=True)
        torch.testing.assert_close(gradients(compiled, *tensors), gradients(case.ours, *tensors))
    op = raw_op(case)
    raw_ops = {f"fastops.{op}.default", f"fastops.{op}_backward.default"}
    assert {name for name in recorder.ops if name.startswith("fastops")} == (
        raw_ops if way == "triton" or op in ("linear", "conv") else set()
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.loss = fnn.LinearReLU(3, 5), fnn.Linear(5, 4), fnn.CrossEntropyLoss()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.out(self.hidden(input)), target)


@KERNEL_WAYS
def test_compiled_model_of_any_batch_size(way: str) -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with fastops.backend(way), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 3, 12):
            input, target = torch.randn(batch, 3), torch.randint(4, (batch,))
            found = gradients(lambda *_: compiled(input, target), *model.parameters())  # noqa: B023
            expected = gradients(lambda *_: model(input, target), *model.parameters())  # noqa: B023
            torch.testing.assert_close(found, expected)


class ConvNet(nn.Module):
    """Convolutions of every kind of padding, channels-last between two of them, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fnn.ConvReLU2d(2, 4, 3, stride=2, padding=1)
        self.second = fnn.Conv2d(4, 6, 2, padding="same", groups=2)
        self.third = fnn.Conv2d(6, 3, 3, padding=1, padding_mode="reflect")
        self.out, self.loss = fnn.Linear(3, 4), fnn.CrossEntropyLoss()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        features = self.first(input).contiguous(memory_format=torch.channels_last)
        return self.loss(self.out(self.third(self.second(features)).mean((2, 3))), target)


@KERNEL_WAYS
def test_compiled_convolutions_of_any_batch_size(way: str) -> None:
    model = ConvNet()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with fastops.backend(way), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 2, 5):
            input, target = torch.randn(batch, 2, 7, 6), torch.randint(4, (batch,))
            found = gradients(lambda *_: compiled(input, target), *model.parameters())  # noqa: B023
            expected = gradients(lambda *_: model(input, target), *model.parameters())  # noqa: B023
            torch.testing.assert_close(found, expected)


@KERNEL_WAYS
def test_compiled_under_autocast(way: str) -> None:
    tensors = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    compiled = torch.compile(FF.linear_relu, backend="aot_eager", fullgraph=True)
    with fastops.backend(way), torch.autocast("cpu", torch.float16):
        found, expected = compiled(*tensors), FF.linear_relu(*tensors)
    assert found.dtype is expected.dtype is torch.float16
    torch.testing.assert_close(found, expected)


def test_compiled_transforms() -> None:
    input, weight = torch.randn(4, 3), torch.randn(2, 3)

    def hessian_vector(weight: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda w: FF.linear_relu(input, w).square().sum())
        return torch.func.jvp(gradient, (weight,), (weight,))[1]

    def batched(weight: Tensor) -> Tensor:
        return torch.vmap(FF.linear, (0, None))(input, weight)

    with fastops.backend("triton"):
        for function in (hessian_vector, batched):
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(weight), function(weight))


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


def raw_convolutions(way: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Both ops in one to three dimensions: inputs and weights of either memory format, and what is not needed."""
    for n in (1, 2, 3):
        options = ((2, 1, 1)[:n], (1, 0, 1)[:n], (1, 2, 1)[:n])
        size, kernel = (5, 4, 3)[:n], (3, 2, 2)[:n]
        output_size = tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zip(size, kernel, *options))  # noqa: B905
        layouts = itertools.product((False, True), repeat=2) if n > 1 else ((False, False),)
        for groups, (input_last, weight_last) in zip(itertools.cycle((1, 2)), layouts, strict=False):
            last = input_last or weight_last
            x, w = torch.randn(2, 4, *size), torch.randn(6, 4 // groups, *kernel)
            x, w = (
                tensor.movedim(1, -1).contiguous().movedim(-1, 1) if permuted else tensor
                for tensor, permuted in ((x, input_last), (w, weight_last))
            )
            b, g = torch.randn(6), torch.randn(2, 6, *output_size)
            yield "conv", (x, w, b, *options, groups, True, way)
            yield "conv", (x[:1], w, None, *options, groups, False, way)
            shapes = tuple(x.shape), tuple(w.shape)
            yield "conv_backward", (g, None, w, None, *shapes, *options, groups, False, last, way)
            yield "conv_backward", (g, x, None, g, *shapes, *options, groups, True, last, way)
            yield "conv_backward", (g, x, w, g, *shapes, *options, groups, True, last, way)


def raw_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments for every raw op, with the layouts that its results follow."""
    a, w, b, g = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2), torch.randn(4, 2)
    for way in ("triton", "onednn"):
        yield "linear", (a, w, b, True, way)
        yield "linear", (torch.randn(2, 4, 3).transpose(0, 1), torch.randn(3, 2).t(), None, False, way)
        yield "linear", (a[0], w, b, False, way)
        yield "linear_backward", (g, a, w, g, True, way)
        yield "linear_backward", (g, None, w, None, False, way)
        yield "linear_backward", (torch.ones(()).expand(4, 2), a, None, g, False, way)
        yield from raw_convolutions(way)
    layouts = {
        "contiguous": a,
        "transposed": torch.randn(3, 4).t(),
        "strided": torch.randn(8, 6)[::2, ::2],
        "expanded": torch.randn(4, 1).expand(4, 3),
    }
    for input in layouts.values():
        for target in layouts.values():
            yield "mse_loss", (input, target, "none", "triton")
        yield "mse_loss", (input, a, "mean", "triton")
        yield "mse_loss_backward", (a, input, a, "none", True, True, "triton")
    yield "mse_loss_backward", (torch.tensor(2.0), a, a, "mean", False, True, "triton")
    for target in layouts.values():
        weights = (torch.rand(3), torch.rand(4, 1))
        yield "binary_cross_entropy_with_logits", (a, target, *weights, "none", "triton")
        needs = (True, True)
        yield "binary_cross_entropy_with_logits_backward", (a, a, target, *weights, "none", *needs, "triton")
    yield "binary_cross_entropy_with_logits", (a, a, None, None, "mean", "triton")
    images = torch.randn(2, 3, 4, 4)
    inputs = {
        "rows": (a, torch.tensor([0, 2, 1, 0])),
        "one": (a[0], torch.tensor(1)),
        "transposed": (torch.randn(3, 4).t(), torch.tensor([0, 2, 1, 0])),
        "images": (images, torch.randint(3, (2, 4, 4))),
        "channels last": (images.contiguous(memory_format=torch.channels_last), torch.randint(3, (2, 4, 4))),
        "probabilities": (a, torch.rand(4, 3)),
        "transposed probabilities": (a, torch.rand(3, 4).t()),
    }
    for input, target in inputs.values():
        for reduction in ("none", "mean"):
            options = (reduction, -100, 0.1)
            yield "cross_entropy", (input, target, torch.rand(3), *options, "triton")
            log_sum_exp = input.logsumexp(0 if input.dim() == 1 else 1)
            saved = (log_sum_exp, torch.tensor(2.0))
            grad = torch.rand_like(log_sum_exp) if reduction == "none" else torch.tensor(3.0)
            needs = (True, target.is_floating_point())
            yield "cross_entropy_backward", (grad, input, target, None, *saved, *options, *needs, "triton")


RAW_CALLS = list(raw_calls())


@pytest.mark.parametrize(("op", "arguments"), RAW_CALLS)
def test_raw_op_keeps_its_contract(op: str, arguments: tuple[Any, ...]) -> None:
    """Schema and fake tensors (shapes, dtypes and strides) of the raw op agree with what it does."""
    function = getattr(torch.ops.fastops, op).default
    real = function(*arguments)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(function, arguments, test_utils=tests)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for f, r in zip(*((t,) if isinstance(t, Tensor) else t for t in (fake, real)), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("op", dict(RAW_CALLS))
def test_raw_op_compiles(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastops, op).default, dict(RAW_CALLS)[op])
