"""torch.compile, torch.export and the raw ops' own contract."""

from __future__ import annotations

from collections.abc import Callable
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
from fastops.ops import OPS

pytestmark = [
    no_fallback,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ROOT = Path(__file__).parents[1]
KERNEL_WAYS = pytest.mark.parametrize("way", ["triton", "onednn"])


class Recorder:
    """The compile backend 'aot_eager' that remembers the names of the ops in every graph."""

    def __init__(self) -> None:
        self.ops: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def remember(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            for node in graph.graph.nodes:
                if node.op == "call_function":  # of what may change an argument, the op is that of a wrapper
                    wrapped = node.target is torch.ops.higher_order.auto_functionalized_v2
                    self.ops.add(str(node.args[0] if wrapped else node.target))
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
    raw_ops = {f"fastops.{case.op}.default", f"fastops.{case.op}_backward.default"}
    assert {name for name in recorder.ops if name.startswith("fastops")} == (
        raw_ops if way == "triton" or OPS[case.op].onednn else set()
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
