"""`torch.compile(model, backend="fastops")`: what it fuses and replaces, that nothing else changes, and its report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import swap_models
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from cases import no_fallback
from compiling import Recorder, compiled, leaves
from torch import Tensor, nn

import fastops
from fastops.compile import compile_graph

pytestmark = [
    no_fallback,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def run(model: nn.Module, case: swap_models.Case) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all parameters and inputs."""
    torch.manual_seed(1)
    inputs, keywords = case.inputs(), case.keywords()
    tensors = [tensor.requires_grad_() for tensor in leaves((inputs, keywords))]
    model.zero_grad()
    torch.manual_seed(2)
    outputs = leaves(model(*inputs, **keywords))
    sum((output * torch.arange(output.numel()).view_as(output)).sum() for output in outputs).backward()
    return outputs, [tensor.grad for tensor in (*tensors, *model.parameters()) if tensor.grad is not None]


# What a graph shows and a trace of one module alone does not: branches taken, helpers inlined, convolutions.
FUSED = {
    "control flow in the root": 3,
    "LeNet": 3,
    "LeNet, sizes multiplied in a loop": 3,
    "optional input given": 2,
    "number given": 2,
    "None for a required input": 1,
    "list as input": 1,
    "generator as input": 2,
    "keyword-only and extra inputs": 1,
    "a child's result tested": 1,
    "input changed between layer and relu": 1,
    "helper methods": 2,
    "tied weights": 2,  # and the sum with its ReLU
}


@pytest.mark.parametrize("name", swap_models.CASES)
def test_same_results_and_gradients(name: str) -> None:
    """Models as users write them; where control flow breaks the graph, each part is rewritten by itself."""
    case = swap_models.CASES[name]
    torch.manual_seed(0)
    model = case.make().double()
    with fastops.backend("triton"):
        ours = compiled(model)
        for mode in (True, False):
            found, expected = (run(m.train(mode), case) for m in (ours, model))
            torch.testing.assert_close(found, expected)
    assert fastops.compile.report().fused == FUSED.get(name, case.fused)


class Everything(nn.Module):
    """All ops that the backend knows, called as functions, methods and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(1, 2, 2, padding=1), nn.Conv2d(1, 2, 2), nn.Conv3d(1, 2, 2)
        self.wrapped = nn.Conv2d(2, 2, 2, padding=1, padding_mode="circular")
        self.norm1, self.norm2 = nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm2d(2).eval()
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        line = F.relu(self.conv1(x[:, None]), inplace=True)
        plane = self.wrapped(torch.relu(self.conv2(x.view(-1, 1, 2, 3))))
        norms = torch.relu(self.norm1(x)).sum() + self.norm2(plane).relu().sum()
        cube = self.conv3(x.view(-1, 1, 1, 2, 3).expand(-1, -1, 2, -1, -1)).relu_()
        logits = self.head(self.hidden(input=x).relu())
        other = logits.detach() + 1
        pairs = F.mse_loss(logits, other), F.l1_loss(logits, other), F.smooth_l1_loss(logits, other, beta=0.3)
        losses = *pairs, F.huber_loss(logits, other, delta=0.3), F.cross_entropy(logits, target, label_smoothing=0.1)
        return sum(losses) + norms + line.sum() + plane.sum() + cube.sum()


LOSSES = ("cross_entropy", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss")
OF_EVERYTHING = (
    "conv_relu1d",
    "conv_relu2d",
    "conv2d",
    "conv_relu3d",
    "linear_relu",
    "linear",
    *LOSSES,
)


def step(model: nn.Module, batch: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(batch, 6), torch.randint(3, (batch,))
    loss = model(*inputs)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    ("way", "compiler"),
    [
        *((way, name) for way in ("triton", "onednn", "torch") for name in ("eager", "aot_eager")),
        ("triton", "inductor"),
    ],
)
def test_every_op_with_every_compiler(way: str, compiler: str) -> None:
    model = Everything()
    with fastops.backend(way):
        torch.testing.assert_close(step(compiled(model, compiler, fullgraph=True)), step(model))
    report = fastops.compile.report()
    assert report.fused == {"torch": 0, "onednn": 4, "triton": 6}[way]
    replaced = [row.outcome.split()[0].rpartition(".")[2] for row in report.rows if row.done and row.layer != "relu"]
    losses = () if way == "onednn" else LOSSES
    products = [op for op in OF_EVERYTHING if op not in LOSSES]
    assert sorted(replaced) == ([] if way == "torch" else sorted((*products, *losses)))


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_the_compiler_behind_sees_the_raw_ops(way: str) -> None:
    """Forward and backward; on the torch way it sees what Dynamo wrote."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    ops: set[str] = set()

    def remember(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.op == "call_function":  # of what may change an argument, the op is that of a wrapper
                wrapped = node.target is torch.ops.higher_order.auto_functionalized_v2
                ops.add(str(node.args[0] if wrapped else node.target))
        return make_boxed_func(graph.forward)

    with fastops.backend(way):
        step(compiled(Everything(), aot_autograd(fw_compiler=remember, bw_compiler=remember)))
    expected = {f"fastops.{op}{end}.default" for op in (*OF_EVERYTHING, "batch_norm_relu") for end in ("", "_backward")}
    assert {op for op in ops if op.startswith("fastops")} == (expected if way == "triton" else set())


def test_what_no_kernel_takes_stays_as_it_was() -> None:
    recorder, plain = Recorder(), Recorder()
    model = Everything()
    with fastops.backend("torch"):
        step(compiled(model, recorder))
        torch.compile(model, backend=plain)(torch.randn(4, 6), torch.randint(3, (4,)))
    assert recorder.calls == plain.calls
    assert str(recorder.graphs[0].graph) == str(plain.graphs[0].graph)


def test_few_compilations_for_many_batch_sizes() -> None:
    recorder = Recorder()
    model = Everything()
    with fastops.backend("triton"):
        ours = compiled(model, recorder)
        for batch in (4, 7, 3, 12):
            torch.testing.assert_close(step(ours, batch), step(model, batch))
    assert len(recorder.graphs) <= 2
    assert fastops.compile.report().fused == 6  # the same rows twice are one


class Modes(nn.Module):
    """Something begins or ends between the layer and its ReLU, or around both."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode, self.fc, self.out = mode, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "no_grad around":
            with torch.no_grad():
                y = F.relu(self.fc(x))
            return y + self.fc(x)
        if self.mode == "no_grad from the ReLU on":
            z = self.fc(x)
            with torch.no_grad():
                z.relu_()
            return z * 2
        if self.mode == "no_grad up to the ReLU":
            with torch.no_grad():
                z = self.fc(x)
            return F.relu(z) + x
        if self.mode == "autocast around":
            with torch.autocast("cpu", torch.bfloat16):
                return F.relu(self.fc(x)).float()
        if self.mode == "autocast up to the ReLU":
            with torch.autocast("cpu", torch.bfloat16):
                z = self.fc(x)
            return F.relu(z).float()
        if self.mode == "checkpoint":
            y = torch.utils.checkpoint.checkpoint(lambda t: F.relu(self.fc(t)), x, use_reentrant=False)
            return F.relu(self.out(y))
        if self.mode == "vmap":
            return torch.vmap(lambda row: F.relu(self.fc(row)))(x)
        if self.mode == "grad":
            return torch.func.grad(lambda t: F.relu(self.fc(t)).square().sum())(x)
        raise AssertionError(self.mode)


MODES = {
    "no_grad around": 1,
    "no_grad from the ReLU on": 0,
    "no_grad up to the ReLU": 0,
    "autocast around": 1,
    "autocast up to the ReLU": 0,
    "checkpoint": 2,
    "vmap": 1,
    "grad": 1,
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_that_begin_and_end_in_the_graph(mode: str, compiler: str) -> None:
    model = Modes(mode)
    case = swap_models.Case(lambda: model, 0, lambda: (torch.randn(5, 6),))
    with fastops.backend("triton"):
        ours = compiled(model, compiler, fullgraph=True)
        found, expected = run(ours, case), run(model, case)
        assert [t.requires_grad for t in found[0]] == [t.requires_grad for t in expected[0]]
        torch.testing.assert_close(found, expected)
    assert fastops.compile.report().fused == MODES[mode]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_under_autocast(dtype: torch.dtype, compiler: str) -> None:
    model = Everything()
    with fastops.backend("triton"), torch.autocast("cpu", dtype):
        found, expected = step(compiled(model, compiler)), step(model)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert fastops.compile.report().fused == 6


def test_trains_like_eager() -> None:
    """Several steps with an optimizer, through the default compiler."""
    torch.manual_seed(0)
    model = Everything()
    losses = []
    with fastops.backend("triton"):
        twin = torch.compile(copy.deepcopy(model), backend=compile_graph)
        for one in (twin, model):
            optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
            losses.append([])
            for _ in range(4):
                optimizer.zero_grad()
                loss = one(torch.ones(4, 6), torch.tensor([0, 2, 1, 0]))
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_swapped_model_stays_swapped() -> None:
    """Layers that are fastops' already are in the graph as what they are."""
    model = swap_models.Functional()
    x = torch.randn(5, 6)
    with fastops.backend("triton"):
        torch.testing.assert_close(compiled(fastops.swap(copy.deepcopy(model)))(x), model(x))
    assert not fastops.compile.report().rows


def test_sizes_that_depend_on_data_are_left_alone() -> None:
    class Chosen(swap_models.Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0] > 0])

    model, x = Chosen(), torch.randn(9, 6)
    with fastops.backend("triton"), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(model, fullgraph=True)(x), model(x))
    assert {row.outcome for row in fastops.compile.report().rows if row.layer == "linear"} == {
        "left to the compiler: its shapes depend on data"
    }


def test_report() -> None:
    with fastops.backend("onednn"):
        compiled(swap_models.FlatLeNet())(torch.randn(2, 1, 18, 18))
        compiled(swap_models.UsedTwice())(torch.randn(2, 6))
    report = fastops.compile.report()
    assert [[row.name, row.layer, row.outcome] for row in report.rows] == [
        ["conv1", "conv2d", "fastops.functional.conv_relu2d (onednn)"],
        ["relu", "relu", "fused with conv1"],
        ["conv2", "conv2d", "fastops.functional.conv2d (onednn)"],
        ["x_1", "relu", "not fused: its input is max_pool2d_1, not a layer"],
        ["fc1", "linear", "fastops.functional.linear_relu (onednn)"],
        ["relu_2", "relu", "fused with fc1"],
        ["fc2", "linear", "fastops.functional.linear_relu (onednn)"],
        ["relu_3", "relu", "fused with fc2"],
        ["fc3", "linear", "fastops.functional.linear (onednn)"],
        ["fc", "linear", "fastops.functional.linear (onednn)"],
        ["relu", "relu", "not fused: the output of fc is used elsewhere too"],
    ]
    lines = str(report).splitlines()
    assert [line for line in lines if not line.startswith(" ")][:-1] == [
        "swapped layers",
        "fused activations",
        "left alone",
    ]
    assert lines[3].split(maxsplit=2) == ["fc{1,2}", "linear", "fastops.functional.linear_relu (onednn) (2 alike)"]
    with fastops.backend("torch"):
        torch._dynamo.reset()
        compiled(swap_models.sequential())(torch.randn(2, 6))
    report = fastops.compile.report()
    assert (report.swapped, report.fused) == (0, 0)
    assert {row.outcome for row in report.rows} == {
        "left to the compiler: backend 'torch' is selected",
        "not fused: no kernel takes 0",
        "not fused: no kernel takes 2",
    }


def test_options_are_those_of_the_compiler_behind() -> None:
    model, x = swap_models.Functional(), torch.randn(5, 6)
    for options in ({"options": {"epilogue_fusion": False}}, {"mode": "max-autotune-no-cudagraphs"}):
        torch.testing.assert_close(torch.compile(model, backend=compile_graph, **options)(x), model(x))
    with pytest.raises(Exception, match="Unexpected optimization option nonsense"):
        torch.compile(model, backend=compile_graph, options={"nonsense": 1})(x)
    with pytest.raises(Exception, match="nonsense"):
        torch.compile(model, backend=compile_graph, options={"compiler": "nonsense"})(x)
