"""Which way a call goes: the rule, and what `explain` says of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case, one_case_per_op
from compiling import Recorder
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.compile import compile_graph
from fastops.kernels import onednn, private
from fastops.nn import LinearCrossEntropyOptions
from fastops.ops import OPS, Explanation, Op
from fastops.ops import linear as linear_op


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process where neither the environment nor the processor prefers a way."""
    monkeypatch.setattr(linear_op, "onednn_from", None)
    with fastops.backend("auto"):
        yield


class Spy(TorchDispatchMode):
    """Records which raw ops run, and with which backend."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastops":
            self.ran.append((func._opname, args[-1]))
        return func(*args, **(kwargs or {}))


x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
indices = torch.tensor([0, 1, 2, 0])
images, kernels = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 3, 3)
PRODUCTS = ("linear", "linear_relu", "conv1d", "conv2d", "conv3d", "conv_relu1d", "conv_relu2d", "conv_relu3d")


class Machine:
    """What the rule knows of a machine, to be set for one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def has(self, *, triton: bool, interpreter: bool, onednn_from: onednn.Gain | None = None) -> None:
        self.monkeypatch.setattr(dispatch, "triton_installed", triton)
        self.monkeypatch.setattr(dispatch, "_INTERPRETER", interpreter)
        self.monkeypatch.setattr(linear_op, "onednn_from", onednn_from)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# (selected, Triton installed, interpreter on) -> ways of: float32, float64, int32 linear layers; MSE; cross-entropy.
# A convolution of the same dtype goes the way of a linear layer.
CPU_RULES = [
    ("auto", True, True, ["triton", "triton", "torch", "triton", "triton"]),
    ("auto", False, True, ["torch", "torch", "torch", "torch", "torch"]),
    ("auto", True, False, ["torch", "torch", "torch", "torch", "torch"]),
    ("auto", False, False, ["torch", "torch", "torch", "torch", "torch"]),
    ("triton", True, True, ["triton", "triton", "torch", "triton", "triton"]),
    ("onednn", True, True, ["onednn", "torch", "torch", "torch", "torch"]),
    ("onednn", False, False, ["onednn", "torch", "torch", "torch", "torch"]),
    ("torch", True, True, ["torch", "torch", "torch", "torch", "torch"]),
    ("torch", False, False, ["torch", "torch", "torch", "torch", "torch"]),
]


@pytest.mark.parametrize(("selected", "triton", "interpreter", "ways"), CPU_RULES)
def test_rule_on_the_cpu(machine: Machine, selected: str, triton: bool, interpreter: bool, ways: list[str]) -> None:
    machine.has(triton=triton, interpreter=interpreter)
    with fastops.backend(selected):
        explanations = [
            fastops.explain("linear", x, w, b),
            fastops.explain("linear_relu", x.double(), w.double(), b.double()),
            fastops.explain("linear", x.int(), w.int()),
            fastops.explain("mse_loss", x, x),
            fastops.explain("cross_entropy", x, indices),
        ]
        convolutions = [
            fastops.explain("conv2d", images, kernels),
            fastops.explain("conv_relu1d", images[..., 0].double(), kernels[..., 0].double(), padding="same"),
            fastops.explain("conv2d", images.int(), kernels.int()),
        ]
    assert [explanation.backend for explanation in explanations] == ways
    assert [explanation.backend for explanation in convolutions] == ways[:3]
    assert all(explanation.reason for explanation in (*explanations, *convolutions))


def on_a_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64]
)
@pytest.mark.parametrize("triton", [True, False])
def test_rule_on_a_gpu(machine: Machine, dtype: torch.dtype, triton: bool) -> None:
    """The rule reads devices, dtypes and shapes, no values: here fake tensors are a GPU's."""
    machine.has(triton=triton, interpreter=False)
    has_kernel = triton and dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    with FakeTensorMode():
        a, weight = torch.empty(1 << 22, 32, dtype=dtype, device="cuda"), on_a_gpu(32, 32, dtype=dtype)
        target = torch.empty(1 << 22, dtype=torch.int64, device="cuda")
    image, kernel = a.view(1 << 20, 32, 2, 2), weight.view(32, 32, 1, 1)
    fuses, product = "triton" if has_kernel else "torch", "triton" if has_kernel and dtype.itemsize == 2 else "torch"
    for selected, bare, with_relu, fused in (
        ("auto", "torch", product, fuses),
        ("triton", fuses, fuses, fuses),
        ("onednn", "torch", "torch", "torch"),
        ("torch", "torch", "torch", "torch"),
    ):
        if selected == "triton" and not triton:
            continue  # `test_triton_that_cannot_run_says_so`
        with fastops.backend(selected):
            assert fastops.explain("linear", a, weight).backend == bare
            assert fastops.explain("linear_relu", a, weight).backend == with_relu
            assert fastops.explain("conv2d", image, kernel, stride=2).backend == bare
            assert fastops.explain("add_relu", a, a).backend == fused
            assert fastops.explain("mse_loss", a, a).backend == fused
            assert fastops.explain("binary_cross_entropy_with_logits", a, a, a[:, :1]).backend == fused
            assert fastops.explain("cross_entropy", a, target).backend == fused


def test_auto_takes_kernels_on_a_gpu_where_they_fuse(machine: Machine) -> None:
    """Forward and backward, each with a reason: a product alone fuses nothing, masking and summing a gradient does."""
    machine.has(triton=True, interpreter=False)
    with FakeTensorMode():
        image, layer = on_a_gpu(512, 64, 64, 64), (on_a_gpu(1 << 20, 16), on_a_gpu(128, 16), on_a_gpu(128))
        last = image.to(memory_format=torch.channels_last)
        table = [
            ("linear", layer, {}, "torch", "torch", "product alone"),
            ("linear_relu", layer, {}, "triton", "vendor", "epilogue"),
            ("conv2d", (image, on_a_gpu(32, 64, 3, 3)), {}, "torch", "torch", "convolution alone"),
            ("conv_relu2d", (image, on_a_gpu(32, 64, 3, 3)), {}, "torch", "torch", "to channels-last"),
            ("conv_relu2d", (last, on_a_gpu(32, 64, 3, 3)), {}, "triton", "vendor", "epilogue"),
            ("conv_act2d", (last, on_a_gpu(32, 64, 3, 3)), {"activation": "silu"}, "triton", "vendor", "epilogue"),
            ("conv_relu2d", (image, on_a_gpu(64, 1, 3, 3)), {"groups": 64}, "torch", "torch", "to channels-last"),
            ("conv_relu2d", (last, on_a_gpu(64, 1, 5, 5)), {"groups": 64}, "triton", "vendor", "depthwise"),
            ("conv_relu2d", (last, on_a_gpu(64, 1, 7, 7)), {"groups": 64}, "torch", "torch", "so many taps"),
            ("conv2d", (last, on_a_gpu(64, 1, 3, 3)), {"groups": 64}, "torch", "torch", "convolution alone"),
            ("conv_relu2d", (last[:, :3], on_a_gpu(32, 3, 3, 3)), {}, "triton", "vendor", "epilogue"),
            ("conv_relu1d", (image.flatten(2), on_a_gpu(32, 64, 3)), {}, "torch", "torch", "to channels-last"),
            ("add_relu", (image, image), {}, "triton", "triton", "one kernel"),
            ("mse_loss", (image, image), {}, "triton", "triton", "one kernel"),
            ("linear_cross_entropy", (*layer[:2], on_a_gpu(1 << 20, 128)), {}, "triton", "triton", "one kernel"),
        ]
        for op, arguments, options, forward, backward, reason in table:
            found = fastops.explain(op, *arguments, **options)
            assert (found.backend, found.backward) == (forward, backward), op
            assert reason in found.reason
            assert found.backward_reason
            with fastops.backend("triton"):
                found = fastops.explain(op, *arguments, **options)
                assert (found.backend, found.backward) == ("triton", "triton"), op


def test_auto_leaves_small_calls_and_exact_products_on_a_gpu_to_torch(machine: Machine) -> None:
    """Where the host takes longer to call a kernel than the GPU gains, and where the vendor's products are faster."""
    machine.has(triton=True, interpreter=False)
    with FakeTensorMode():
        image = on_a_gpu(8, 64, 56, 56).to(memory_format=torch.channels_last)
        logits, rows = on_a_gpu(512, 1000), on_a_gpu(512, 16)
        statistics, target = (on_a_gpu(64), on_a_gpu(64)), torch.empty(512, dtype=torch.int64, device="cuda")
        exact = on_a_gpu(1 << 20, 64, dtype=torch.float32)
        for op, arguments, reason in (
            ("linear_relu", (rows, on_a_gpu(32, 16)), "cost the host"),
            ("linear_act", (rows, on_a_gpu(32, 16), None, "gelu"), "cost the host"),
            ("conv_relu2d", (image, on_a_gpu(64, 64, 3, 3)), "cost the host"),
            ("batch_norm_relu", (image, *statistics), "cost the host"),
            ("add_relu", (image, image), "cost the host"),
            ("relu_max_pool2d", (image, 2), "cost the host"),
            ("mse_loss", (logits, logits), "cost the host"),
            ("cross_entropy", (logits, target), "cost the host"),
            ("linear_cross_entropy", (rows, on_a_gpu(1000, 16), target), "fit into the memory budget"),
            ("linear_relu", (exact, on_a_gpu(1024, 64, dtype=torch.float32)), "vendor's library multiplies float32"),
        ):
            found = fastops.explain(op, *arguments)
            assert (found.backend, found.backward) == ("torch", "torch"), op
            assert reason in found.reason, op
            with fastops.backend("triton"):
                assert fastops.explain(op, *arguments).backend == "triton", op


@pytest.mark.parametrize("shape", [(7,), (5, 7)], ids=str)
def test_a_head_is_torchs_up_to_a_budget_of_all_its_logits(machine: Machine, shape: tuple[int, ...]) -> None:
    machine.has(triton=True, interpreter=False)
    size = torch.empty(shape[:-1]).numel() * 11 * torch.float32.itemsize
    with FakeTensorMode():
        call = on_a_gpu(*shape, dtype=torch.float32), on_a_gpu(11, 7, dtype=torch.float32)
        target = torch.empty(shape[:-1], dtype=torch.int64, device="cuda")
        ways = {
            budget: fastops.explain(
                "linear_cross_entropy", *call, target, options=LinearCrossEntropyOptions(memory_budget=budget)
            ).backend
            for budget in (size - 1, size)
        }
    assert ways == {size - 1: "triton", size: "torch"}


PRODUCT = 4 * 3 * 2  # multiply-adds of the linear layer


@pytest.mark.parametrize(
    ("gain", "threads", "way"),
    [
        (None, 1, "torch"),
        (onednn.Gain(PRODUCT + 1), 1, "torch"),
        (onednn.Gain(PRODUCT), 2, "onednn"),
        (onednn.Gain(PRODUCT, each_thread=True), 1, "onednn"),
        (onednn.Gain(PRODUCT, each_thread=True), 2, "torch"),
        (onednn.Gain(PRODUCT // 2, each_thread=True), 2, "onednn"),
        (onednn.Gain(1, 3 * 2), 1, "onednn"),
        (onednn.Gain(1, 3 * 2 + 1), 1, "torch"),
    ],
)
def test_auto_takes_onednn_from_the_table_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, gain: onednn.Gain | None, threads: int, way: str
) -> None:
    machine.has(triton=True, interpreter=False, onednn_from=gain)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert fastops.explain("linear", x, w, b).backend == way
    assert fastops.explain("linear", x.double(), w.double()).backend == "torch"
    assert fastops.explain("mse_loss", x, x).backend == "torch"
    assert fastops.explain("conv2d", images, kernels).backend == "torch"


@pytest.mark.parametrize(
    ("family", "threads", "size", "way"),
    [  # a layer of each model that was measured: FashionMLP, WideMLP and TwoLayerNet
        ("25", 2, (64, 784, 512), "torch"),
        ("25", 64, (256, 1024, 4096), "onednn"),
        ("26", 2, (64, 784, 512), "onednn"),
        ("26", 2, (64, 1000, 100), "torch"),
        ("26", 1, (64, 1000, 100), "onednn"),
    ],
)
def test_processors(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, family: str, threads: int, size: tuple[int, int, int], way: str
) -> None:
    gain = onednn.GAINS["AuthenticAMD", family, "AVX512"]
    machine.has(triton=True, interpreter=False, onednn_from=gain)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, features, outputs = size
    assert fastops.explain("linear_relu", torch.ones(rows, features), torch.ones(outputs, features)).backend == way


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["dynamo", "fastops", "export"])
@pytest.mark.parametrize(("threads", "way"), [(1, "onednn"), (2, "torch")])
def test_compiled_code_takes_onednn_from_twice_as_much_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, threads: int, way: str, compiler: str
) -> None:
    """By the threads that there are when it is compiled."""
    machine.has(triton=True, interpreter=False, onednn_from=onednn.Gain(PRODUCT // 2, each_thread=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    recorder = Recorder()
    if compiler == "dynamo":
        torch.compile(FF.linear_relu, backend=recorder, fullgraph=True)(x, w, b)
    elif compiler == "fastops":
        options = {"compiler": aot_autograd(fw_compiler=recorder)}
        torch.compile(lambda *words: F.relu(F.linear(*words)), backend=compile_graph, options=options)(x, w, b)
    else:
        layer = fastops.nn.LinearReLU(3, 2)
        recorder.graphs.append(torch.export.export(layer, (x,), strict=False).graph_module)
    assert ("linear_relu.default" in recorder.calls) is (way == "onednn")


UNFIT: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "sparse": ("linear", (x.to_sparse(), w), "layout"),
    "two devices": ("linear", (x, w.to("meta")), "devices"),
    "two dtypes": ("linear", (x, w.double()), "dtypes differ"),
    "empty": ("linear", (x[:0], w), "empty"),
    "shapes": ("linear", (x, w.t()), "shapes"),
    "bias": ("linear", (x, w, b[:1]), "bias"),
    "no tensor": ("linear", (None, w), "no tensor"),
    "element weights": ("mse_loss", (x, x, None, None, "mean", x), "weights"),
    "broadcast": ("mse_loss", (x, x[:1]), "shapes differ"),
    "no reduction": ("mse_loss", (x, x, None, None, "max"), "'max' is no reduction"),
    "weight does not broadcast": ("binary_cross_entropy_with_logits", (x, x, x[:2]), "broadcast"),
    "trained weight": ("binary_cross_entropy_with_logits", (x, x, x.clone().requires_grad_()), "requires a gradient"),
    "int32 indices": ("cross_entropy", (x, indices.int()), "int32"),
    "target shape": ("cross_entropy", (x, indices[:2]), "target shape"),
    "0d": ("cross_entropy", (x[0, 0], indices[0]), "class dimension"),
    "class weights": ("cross_entropy", (x, indices, b), "per class"),
    "trained class weights": ("cross_entropy", (x, indices, torch.rand(3).requires_grad_()), "requires a gradient"),
    "smoothing": ("cross_entropy", (x, indices, None, None, -100, None, "mean", 2.0), "label_smoothing"),
    "ignored probabilities": ("cross_entropy", (x, x, None, None, 1), "negative ignore_index"),
    "convolved sparse": ("conv2d", (images.to_sparse(), kernels), "layout"),
    "convolved dtypes": ("conv2d", (images, kernels.double()), "dtypes differ"),
    "convolved empty": ("conv2d", (images[:0], kernels), "empty"),
    "convolved subclass": ("conv2d", (images.as_subclass(type("Marked", (Tensor,), {})), kernels), "Marked"),
    "too few dimensions": ("conv2d", (images[0, 0], kernels), "in 2 dimensions"),
    "too many dimensions": ("conv1d", (images, kernels[..., 0]), "in 1 dimensions"),
    "other weight": ("conv_relu3d", (images, kernels), "in 3 dimensions"),
    "channels": ("conv2d", (images[:, :3], kernels), "same channels"),
    "channels of groups": ("conv2d", (images, kernels, None, 1, 0, 1, 2), "same channels"),
    "groups": ("conv2d", (images, kernels, None, 1, 0, 1, 4), "groups"),
    "no groups": ("conv2d", (images, kernels, None, 1, 0, 1, 0), "groups"),
    "groups of truth": ("conv2d", (images, kernels, None, 1, 0, 1, True), "groups"),
    "output channels": ("conv2d", (images, kernels, x[0]), "bias"),
    "stride of 0": ("conv2d", (images, kernels, None, 0), "not valid"),
    "stride of truth": ("conv2d", (images, kernels, None, True), "not valid"),
    "stride of NumPy": ("conv2d", (images, kernels, None, np.int64(2)), "not valid"),
    "three strides": ("conv2d", (images, kernels, None, (1, 1, 1)), "not valid"),
    "negative padding": ("conv2d", (images, kernels, None, 1, (0, -1)), "not valid"),
    "unknown padding": ("conv2d", (images, kernels, None, 1, "full"), "not valid"),
    "strided same": ("conv2d", (images, kernels, None, 2, "same"), "not valid"),
    "no dilation": ("conv2d", (images, kernels, None, 1, 0, 0), "not valid"),
    "large kernel": ("conv2d", (images, kernels, None, 1, 0, 3), "larger than the input"),
    "subclass": ("linear", (x.as_subclass(type("Marked", (Tensor,), {})), w), "Marked"),
}


head = torch.randn(5, 3)  # 5 classes of the 3 features of x
UNFIT_HEADS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "sparse": ((x.to_sparse(), head, indices), {}, "layout"),
    "dtypes": ((x, head.double(), indices), {}, "dtypes differ"),
    "features": ((x, head[:, :2], indices), {}, "do not make a linear layer"),
    "bias": ((x, head, indices), {"linear_bias": b}, "one element per output feature"),
    "positions": ((x[0], head[:, None], indices[:1]), {}, "batched input"),
    "probabilities": ((x, head, torch.rand(4, 5)), {"ignore_index": 1}, "no ignore_index"),
    "int32 indices": ((x, head, indices.int()), {}, "int32"),
    "target shape": ((x, head, indices[:2]), {}, "target shape"),
    "large ignore_index": ((x, head, indices), {"ignore_index": 2**63}, "64-bit"),
    "class weights": ((x, head, indices), {"weight": b}, "per class"),
    "trained class weights": ((x, head, indices), {"weight": torch.rand(5).requires_grad_()}, "requires a gradient"),
    "no reduction": ((x, head, indices), {"reduction": "max"}, "'max' is no reduction"),
    "smoothing": ((x, head, indices), {"label_smoothing": 2.0}, "label_smoothing"),
    "options": ((x, head, indices), {"options": 8}, "options are not of torch's class"),
}


@pytest.mark.parametrize("case", UNFIT_HEADS)
def test_reason_why_no_kernel_takes_a_head(case: str) -> None:
    arguments, keywords, reason = UNFIT_HEADS[case]
    for selected in ("triton", "onednn"):
        with fastops.backend(selected):
            explanation = fastops.explain("linear_cross_entropy", *arguments, **keywords)
        assert explanation.backend == "torch"
        assert reason in explanation.reason


@pytest.mark.parametrize("case", UNFIT)
def test_reason_why_no_kernel_is_taken(case: str) -> None:
    op, arguments, reason = UNFIT[case]
    with fastops.backend("triton"):
        explanation = fastops.explain(op, *arguments)
    assert explanation.backend == "torch"
    assert reason in explanation.reason
    assert str(explanation) == f"torch: {explanation.reason}"


@one_case_per_op
@pytest.mark.parametrize("selected", dispatch.BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_explain_tells_what_runs(case: Case, selected: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    explanations = []
    decide = dispatch._way
    monkeypatch.setattr(dispatch, "_way", lambda *a: explanations.append(decide(*a)) or explanations[-1])
    tensors = case.tensors(torch.float32, requires_grad=False)
    with fastops.backend(selected), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Spy() as spy:
            case.ours(*tensors)
        ran = spy.ran[0][1] if spy.ran else "torch"
        assert explanations[-1].backend == ran
        if not any(name in case.op for name in ("cross_entropy", "batch_norm", "max_pool")):  # take more than these
            assert fastops.explain(case.op, *tensors).backend == ran


def test_the_uneven_end_of_padding_counts() -> None:
    with fastops.backend("triton"):
        assert fastops.explain("conv1d", torch.randn(1, 2, 1), torch.randn(3, 2, 4), padding="same").backend == "triton"
        assert fastops.explain("conv1d", torch.randn(1, 2, 1), torch.randn(3, 2, 4), padding=1).backend == "torch"


def test_explain_takes_keywords_and_refuses_unknown_ops() -> None:
    with fastops.backend("triton"):
        assert fastops.explain("linear", input=x, weight=w).backend == "triton"
    with pytest.raises(ValueError, match=r"unknown op 'conv9d': expected one of 'add_relu', .*'linear', 'linear_relu'"):
        fastops.explain("conv9d", x)


@pytest.mark.parametrize("op", [*PRODUCTS, "mse_loss", "cross_entropy"])
@pytest.mark.parametrize(
    ("triton", "interpreter", "message"),
    [
        (True, False, "set TRITON_INTERPRET=1"),
        (False, True, "Triton is not installed"),
        (False, False, "Triton is not installed"),
    ],
)
def test_triton_that_cannot_run_says_so(
    machine: Machine, op: str, triton: bool, interpreter: bool, message: str
) -> None:
    machine.has(triton=triton, interpreter=interpreter)
    arguments = {"cross_entropy": (x, indices), "conv2d": (images, kernels)}.get(op, (x, x))
    with fastops.backend("triton"):
        with pytest.raises(RuntimeError, match=message):
            getattr(FF, op)(*arguments)
        with pytest.raises(RuntimeError, match=message):
            fastops.explain(op, *arguments)


@pytest.mark.parametrize("forward", ["triton", "onednn"])
def test_backward_runs_where_forward_did(forward: str) -> None:
    weight = w.clone().requires_grad_()
    with fastops.backend(forward):
        output = FF.linear_relu(x, weight)
    with fastops.backend("torch"), Spy() as spy:
        output.sum().backward()
    assert spy.ran == [("linear_relu_backward", forward)]


@pytest.mark.parametrize("forward", ["triton", "onednn"])
def test_backward_of_a_convolution_runs_where_forward_did(forward: str) -> None:
    weight = kernels.clone().requires_grad_()
    with fastops.backend(forward):
        output = FF.conv_relu2d(images, weight)
    with fastops.backend("torch"), Spy() as spy:
        output.sum().backward()
    assert spy.ran == [("conv_relu2d_backward", forward)]


@pytest.mark.parametrize("op", PRODUCTS[2:])
def test_autocast_of_a_convolution_is_its_dtype(op: str) -> None:
    """What counts is the dtype that autocast gives: oneDNN's convolution takes float32 alone."""
    n = int(op[-2])
    input, weight = torch.randn(1, 2, *(4,) * n), torch.randn(3, 2, *(2,) * n)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for selected, way in {"triton": "triton", "onednn": "torch", "torch": "torch"}.items():
                with fastops.backend(selected):
                    assert fastops.explain(op, input, weight=weight).backend == way
                    assert getattr(FF, op)(input, weight).dtype is dtype
                    assert fastops.explain(op, input.double(), weight.double()).backend == way


def test_the_short_way_agrees_with_explain_under_autocast(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is computed in float32 there, of twice the bytes, which decide."""
    machine.has(triton=True, interpreter=False)
    monkeypatch.setattr(dispatch, "_is_any_autocast_enabled", lambda: True)
    monkeypatch.setattr(dispatch, "autocast_dtype", lambda rule, input: None)
    asked: list[str] = []

    def way(op: Op, *_: Any) -> Explanation:
        asked.append(op.name)
        return dispatch._SELECTED_TORCH

    monkeypatch.setattr(dispatch, "_way", way)
    with FakeTensorMode():
        logits = on_a_gpu(4096, 6000)
        size = OPS["mse_loss"].saved_bytes(logits)
        assert size < dispatch.LEAST_SAVED < 2 * size
        monkeypatch.setattr(dispatch, "Tensor", type(logits))  # the short way is for plain tensors
        dispatch.call(OPS["add_relu"], on_a_gpu(8, 8), on_a_gpu(8, 8))
        assert asked == []
        dispatch.call(OPS["mse_loss"], logits, logits, None, "mean")
        assert asked == ["mse_loss"]


def test_sizes_that_are_no_numbers() -> None:
    """A compiler's are symbols, of which the answer is what holds for all; `jit.trace` has tensors for them."""
    assert [private.surely(condition) for condition in (True, False, torch.tensor(True))] == [True, False, True]
