"""Copies, parametrizations, tensors without values, profilers and tracers; and the raw ops' own contract."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, gradients, no_fallback, one_case_per_op
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune

import fastops
import fastops.functional as FF
from fastops import nn as fnn
from fastops.kernels.geometry import memory_format_of

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _half_pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "pruning": _half_pruned,
    "pruning for good": lambda layer: (_half_pruned(layer), prune.remove(layer, "weight")),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: fnn.Linear(4, 3), (5, 4)),
    "LinearReLU": (lambda: fnn.LinearReLU(4, 3), (5, 4)),
    "Conv2d": (lambda: fnn.Conv2d(2, 3, 2), (2, 2, 4, 4)),
    "ConvReLU2d": (lambda: fnn.ConvReLU2d(2, 3, 2), (2, 2, 4, 4)),
}


def step(layer: nn.Module, shape: tuple[int, ...], relu: bool = False) -> list[Tensor]:
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    output = layer(x).relu() if relu else layer(x)
    return [output, *torch.autograd.grad(output.square().sum(), [p for p in layer.parameters() if p.requires_grad])]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_computed(name: str, change: str, backend: str) -> None:
    make, shape = LAYERS[name]
    results = []
    for plain in (False, True):
        torch.manual_seed(0)
        layer = make()
        if plain:
            layer.__class__ = type(layer).__mro__[1]  # torch's
        CHANGES[change](layer)
        results.append(step(layer, shape, relu=plain and "ReLU" in name))
    torch.testing.assert_close(*results)


def _saved(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("name", LAYERS)
def test_copies(name: str, copied: Callable[[nn.Module], nn.Module], backend: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    twin = copied(layer)
    assert type(twin) is type(layer)
    torch.testing.assert_close(step(twin, shape), step(layer, shape), rtol=0, atol=0)


def test_lazy_modules(backend: str) -> None:
    """They have no weights yet, so swap leaves them alone until they ran once."""
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    fastops.swap(model)
    x = torch.randn(4, 3)
    expected = model(x)
    fastops.swap(model)
    assert fastops.report(model).swapped == 2 and fastops.report(model).fused == 1
    torch.testing.assert_close(model(x), expected)


def test_meta_device_and_to_empty(backend: str) -> None:
    with torch.device("meta"):
        layer = fnn.LinearReLU(4, 3)
        assert layer(torch.empty(2, 4)).shape == (2, 3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer(torch.ones(2, 4)), F.relu(F.linear(torch.ones(2, 4), layer.weight, layer.bias)))


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "cross_entropy"], ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values(case: Case, kind: str, backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        if kind == "fake":
            leaves = [mode.from_tensor(t.detach()).requires_grad_() for t in case.tensors()]
            with mode:
                return gradients(function, *leaves)
        return gradients(function, *(t.detach().to("meta").requires_grad_() for t in case.tensors()))

    found, expected = run(case.ours), run(case.torchs)
    assert [(t.shape, t.dtype, t.device) for t in found] == [(t.shape, t.dtype, t.device) for t in expected]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_without_values(reduction: str, backend: str) -> None:
    logits, target = torch.randn(2, 3, 4, device="meta"), torch.empty(2, 4, dtype=torch.int64, device="meta")
    found, expected = (
        gradients(lambda x: f(x, target, reduction=reduction), logits.clone().requires_grad_())  # noqa: B023
        for f in (FF.cross_entropy, F.cross_entropy)
    )
    assert [(t.shape, t.dtype, t.device) for t in found] == [(t.shape, t.dtype, t.device) for t in expected]


# Who watches ----------------------------------------------------------------------------------------------------------


@one_case_per_op
@pytest.mark.parametrize("grad", [True, False])
def test_a_profiler_sees_the_op_by_its_name(case: Case, grad: bool) -> None:
    op = case.op
    with fastops.backend("triton"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = case.ours(*case.tensors(torch.float32, requires_grad=grad))
        if grad:
            result.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert f"fastops::{op}" in names
    assert (f"fastops::{op}_backward" in names) == grad


@one_case_per_op
def test_a_tracer_sees_the_op(case: Case) -> None:
    """No shortcut hides a call from torch.jit.trace, which would take its result for a constant."""
    tensors = case.tensors(torch.float32, requires_grad=False)
    with fastops.backend("triton"):
        traced = torch.jit.trace(lambda *tensors: case.ours(*tensors), tensors)  # a partial has no name to trace
        others = tuple(tensor * 0.5 for tensor in tensors)
        torch.testing.assert_close(traced(*others), case.torchs(*others))


@one_case_per_op
def test_tensors_that_are_not_what_their_storage_says(case: Case) -> None:
    """Zeros without storage, which forward-mode AD makes, and negated views, which have no kernel to read them."""
    tensors = case.tensors(torch.float32, requires_grad=False)
    zeros = tuple(torch._efficientzerotensor(t.shape) for t in tensors)
    with fastops.backend("triton"):
        torch.testing.assert_close(case.ours(*zeros), case.torchs(*(torch.zeros(t.shape) for t in zeros)))
        negated = tuple(torch._neg_view(t) for t in tensors)
        torch.testing.assert_close(case.ours(*negated), case.torchs(*(-t for t in tensors)), equal_nan=True)


# Raw ops --------------------------------------------------------------------------------------------------------------


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
            yield f"conv_relu{n}d", (x, w, b, *options, groups, last, way)
            yield f"conv{n}d", (x[:1], w, None, *options, groups, last, way)
            common = (tuple(x.shape), tuple(w.shape), *options, groups, last)
            yield f"conv{n}d_backward", (g, None, w, None, *common, True, False, False, way)
            yield f"conv_relu{n}d_backward", (g, x, None, g, *common, False, True, True, way)
            yield f"conv_relu{n}d_backward", (g, x, w, g, *common, True, True, True, way)
            for saves, act in ((True, ("gelu", [])), (False, ("gelu", [])), (False, ("leaky_relu", [0.3]))):
                yield f"conv_act{n}d", (x, w, b, *options, groups, last, *act, saves, way)
            act = "mish", []
            before = g.movedim(1, -1).contiguous().movedim(-1, 1)
            yield f"conv_act{n}d_backward", (g, x, w, b, before, *common, *act, True, True, True, way)
            yield f"conv_act{n}d_backward", (g, x, w, b, g[:0], *common, *act, True, False, True, way)
            yield f"conv_act{n}d_backward", (g, None, w, None, g, *common, "tanh", [], True, False, False, way)


def raw_batch_norms() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """In training, with statistics to change and without, and in evaluation; what marks the ReLU's mask."""
    x, c = torch.randn(2, 8, 4, 4), torch.rand(8) + 0.5
    for large in (x, x.to(memory_format=torch.channels_last), torch.randn(8, 2, 4, 4).transpose(0, 1)):
        for running in (None, c):
            batch = None, None, running, running if running is None else running.clone(), 0.1, 1e-5
            yield "batch_norm_relu", (large, None, c, c, *batch, "relu", [], False, "triton")
            yield "batch_norm_act", (large, None, c, c, *batch, "gelu", [], False, "triton")
        known = c, c, None, None, 0.1, 1e-5
        other = large.contiguous(memory_format=memory_format_of(large))
        yield "batch_norm_add_relu", (large, other, None, None, *known, "relu", [], True, "triton")
        yield "batch_norm_add_act", (large, other, None, None, *known, "leaky_relu", [0.3], False, "triton")
        last = memory_format_of(large) is torch.channels_last
        bits = torch.full((x.numel() // 8,), 173, dtype=torch.uint8)
        for op, slope_of in (("batch_norm_relu", ("relu", [])), ("batch_norm_act", ("softplus", [1.0, 20.0]))):
            options = (True, 1e-5, False, last, *slope_of, True, False, True, True, "triton")
            yield f"{op}_backward", (x, large, None, c, c, c, c, other, bits[:0], *options)
        options = (True, 1e-5, True, last, "gelu", [], True, True, True, True, "triton")
        yield "batch_norm_add_act_backward", (x, large, other, c, c, c, c, None, bits[:0], *options)
        for found in (bits, bits[:0]):
            options = (False, 1e-5, True, last, "relu", [], True, True, False, False, "triton")
            yield "batch_norm_add_relu_backward", (x, large, None, None, None, c, c, other, found, *options)


def raw_poolings() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """In both layouts and a permuted one, with taps and without, of which a backward pass makes its own."""
    x = torch.randn(2, 3, 6, 5)
    window = [3, 3], [2, 2], [1, 1], [1, 1], True
    for input in (x, x.to(memory_format=torch.channels_last), torch.randn(3, 2, 6, 5).transpose(0, 1)):
        yield "relu_max_pool2d", (input, *window, True, "triton")
        yield "relu_max_pool2d", (input, *window, False, "triton")
        last = memory_format_of(input) is torch.channels_last
        output, taps = torch.ops.fastops.relu_max_pool2d(input, *window, True, "triton")
        rest = *window, last, True, "triton"
        yield "relu_max_pool2d_backward", (output, input, taps, *rest)
        yield "relu_max_pool2d_backward", (output.mT.contiguous().mT, input, taps.new_empty(0), *rest)


def raw_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments for every raw op, with the layouts that its results follow."""
    a, w, b, g = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2), torch.randn(4, 2)
    for way in ("triton", "onednn"):
        yield "linear_relu", (a, w, b, way)
        yield "linear", (torch.randn(2, 4, 3).transpose(0, 1), torch.randn(3, 2).t(), None, way)
        yield "linear", (a[0], w, b, way)
        yield "linear_relu_backward", (g, a, w, g, True, True, True, way)
        yield "linear_backward", (g, None, w, None, True, False, False, way)
        yield "linear_relu_backward", (torch.ones(()).expand(4, 2), a, None, g, False, True, False, way)
        for saves, act in ((True, ("gelu", [])), (False, ("gelu", [])), (False, ("leaky_relu", [0.3]))):
            yield "linear_act", (a, w, b, *act, saves, way)
        yield "linear_act_backward", (g, a, w, b, g, "gelu", [], True, True, True, way)
        yield "linear_act_backward", (g, a, w, b, g[:0], "mish", [], True, False, True, way)
        yield "linear_act_backward", (g, None, w, None, g, "tanh", [], True, False, False, way)
        yield from raw_convolutions(way)
    layouts = {
        "contiguous": a,
        "transposed": torch.randn(3, 4).t(),
        "strided": torch.randn(8, 6)[::2, ::2],
        "expanded": torch.randn(4, 1).expand(4, 3),
    }
    for op, numbers in (("mse_loss", ()), ("l1_loss", ()), ("smooth_l1_loss", (0.3,)), ("huber_loss", (0.3,))):
        for input in layouts.values():
            for target in layouts.values():
                yield op, (input, target, "none", *numbers, "triton")
            yield op, (input, a, "mean", *numbers, "triton")
            yield f"{op}_backward", (a, input, a, "none", *numbers, True, True, "triton")
        yield f"{op}_backward", (torch.tensor(2.0), a, a, "mean", *numbers, False, True, "triton")
    for target in layouts.values():
        weights = (torch.rand(3), torch.rand(4, 1))
        yield "binary_cross_entropy_with_logits", (a, target, *weights, "none", "triton")
        needs = (True, True)
        yield "binary_cross_entropy_with_logits_backward", (a, a, target, *weights, "none", *needs, "triton")
    yield "binary_cross_entropy_with_logits", (a, a, None, None, "mean", "triton")
    yield from raw_batch_norms()
    yield from raw_poolings()
    probabilities = torch.rand(4, 2, 3).movedim(2, 1)
    for way in ("triton", "onednn"):
        for reduction, goal in (("none", torch.tensor([[0], [2], [1], [0]])), ("mean", probabilities)):
            positions = goal.shape[-1]
            layer = (a, torch.randn(3, 3 * positions).t(), torch.randn(3 * positions))
            options = (reduction, -100, 0.1)
            makes = (way == "onednn",) * 3
            yield "linear_cross_entropy", (*layer, goal, torch.rand(3), *options, False, 64, *makes, way)
            saved = (*torch.rand(3, 4, positions), torch.tensor(2.0), *torch.empty(3, 0))
            grad = torch.rand(4, positions) if reduction == "none" else torch.tensor(3.0)
            needs = (True, True, reduction == "none", goal.is_floating_point())
            yield "linear_cross_entropy_backward", (grad, *layer, goal, None, *saved, *options, 64, *needs, way)
    head = (a, torch.randn(3, 3).t(), torch.randn(3), torch.tensor([[0], [2], [1], [0]]), None)
    for needs in ((True, True, True), (False, True, False)):
        yield "linear_cross_entropy", (*head, "mean", -100, 0.1, False, 64, *needs, "onednn")
        saved = (*torch.rand(3, 4, 1), torch.tensor(2.0), *(torch.rand(variable.shape) for variable in head[:3]))
        options = ("mean", -100, 0.1, 64, *needs, False, "onednn")
        yield "linear_cross_entropy_backward", (torch.tensor(3.0), *head, *saved, *options)
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
    tests = ("test_schema",)  # fakes: below, and for an example of each op in the next test
    torch.library.opcheck(function, arguments, test_utils=tests)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for f, r in zip(*((t,) if isinstance(t, Tensor) else t for t in (fake, real)), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("op", dict(RAW_CALLS))
def test_raw_op_compiles(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastops, op).default, dict(RAW_CALLS)[op])


@pytest.mark.parametrize("op", dict(RAW_CALLS))
def test_a_raw_op_says_which_derivatives_it_has_not(op: str) -> None:
    """It would lose gradients and tangents without a word: forward AD through a raw op is the known silent case."""
    function, arguments = getattr(torch.ops.fastops, op).default, dict(RAW_CALLS)[op]
    first, others = arguments[0], arguments[1:]
    message = f"fastops::{op} is a raw op without such derivatives"
    if op.endswith("_backward"):
        with pytest.raises(RuntimeError, match=message):
            function(first.clone().requires_grad_(), *others)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        function(forward_ad.make_dual(first, first), *others)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda tensor: function(tensor, *others), (first,), (first,))
    with pytest.raises(RuntimeError, match=message):
        torch.func.vjp(lambda tensor: function(tensor, *others), first)


@one_case_per_op
def test_a_raw_op_has_the_first_derivatives(case: Case) -> None:
    """So that whoever captures one in a graph, as torch.compile and torch.export do, can train through it."""
    with fastops.backend("triton"):
        expected = gradients(case.ours, *case.tensors(torch.float32))
        found = gradients(lambda *tensors: _in_a_graph(case.ours, *tensors), *case.tensors(torch.float32))
    torch.testing.assert_close(found, expected)


def _in_a_graph(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The call as a graph module that holds the raw op."""
    with torch.no_grad():
        graph = make_fx(lambda *given: function(*given))(*tensors)
    assert any("fastops" in str(node.target) for node in graph.graph.nodes)
    result: Tensor = graph(*tensors)
    return result
