"""The kernels of batch norm against torch, on memory with guards around: layouts, sizes, dtypes, masks, statistics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter.accuracy import assert_as_accurate_as_torch
from interpreter.guard import run_guarded, same_bits
from torch import Tensor

from fastops.kernels import batch_norm as kernels
from fastops.kernels import configs, geometry
from fastops.kernels.activation import Activation, needs_input
from fastops.kernels.geometry import Columns
from fastops.ops import activations

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "rows": (19, 5),
    "one position": (3, 8, 1, 1),
    "few positions, many samples": (17, 3, 7),
    "few positions, few samples": (3, 5, 7, 7),
    "positions of several tiles": (2, 3, 13, 70),
    "channels of several tiles": (3, 200, 2, 4),
    "bytes of several tiles": (3, 24, 10, 12),
    "volume": (2, 8, 2, 3, 4),
}


def layouts() -> list[Any]:
    """Every shape, and those that have it in the other memory format."""
    return [
        pytest.param(shape, last, id=name + (", channels last" if last else ""))
        for name, shape in SHAPES.items()
        for last in ((False, True) if len(shape) > 3 and shape[2:] != (1, 1) else (False,))
    ]


@pytest.fixture(params=["one launch", "three launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in training, whatever the size."""
    if request.param == "three launches":
        monkeypatch.setattr(geometry, "WHOLE", 0)


@pytest.fixture(params=["the interpreter's tiles", "a GPU's", "a GPU's, three launches"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU are smaller: a program has several, strips share a sum, and a loop merges those."""
    if "three" in request.param:
        monkeypatch.setattr(geometry, "WHOLE", 0)
    if "GPU" in request.param:
        original = kernels.tiling

        def tiling(call: kernels.Call, *activation: Activation) -> kernels.Tiling:
            return original(call._replace(device=torch.device("meta")), *activation)

        monkeypatch.setattr(kernels, "tiling", tiling)
        monkeypatch.setattr(kernels, "register_limit", lambda *_, **__: {})
        monkeypatch.setattr(kernels, "ELEMENTS", 256)
        monkeypatch.setattr(kernels, "WHOLE_ELEMENTS", 1024)
        monkeypatch.setattr(kernels, "MERGED", 4)


def draw(shape: tuple[int, ...], last: bool, dtype: torch.dtype, parameters: torch.dtype) -> list[Tensor]:
    """Input, other, weight, bias, mean, variance and grad_output."""
    C = shape[1]
    large = [torch.randn(shape) for _ in range(3)]
    if last:
        large = [t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d) for t in large]
    weight, bias, mean = torch.randn(3, C)
    x, other, grad = (tensor.to(dtype) for tensor in large)
    vectors = (weight, bias, mean, torch.rand(C) + 0.5)
    return [x, other, *(vector.to(parameters) for vector in vectors), grad]


RELU: Activation = ("relu",)


def ours(
    x: Tensor, other: Tensor | None, training: bool, *vectors: Tensor, grad: Tensor, activation: Activation = RELU
) -> list[Tensor]:
    """Output and all gradients."""
    name, *parameters = activation
    weight, bias, *statistics = vectors
    known = (None, None) if training else statistics
    last = not x.is_contiguous()
    bits = other is not None and activation == RELU and Columns.of(x.shape, last, training, x.dtype).row() % 8 == 0
    arguments = x, other, weight, bias, *known, None, None, 0.1, 1e-5, name, parameters, bits
    output, mean, spread, mask = run_guarded(kernels.batch_norm_act, *arguments)
    saved = (mean, spread) if training else statistics
    residual = other is not None
    kept = other if needs_input(activation) else None
    common = x, kept, weight, bias, *saved, output, mask, training, 1e-5, residual, last, name, parameters
    gradients = run_guarded(kernels.batch_norm_act_backward, grad, *common, True, residual, True, True)
    return [output, *(gradient for gradient in gradients if gradient is not None)]


def torchs(training: bool, residual: bool, *tensors: Tensor, activation: Activation = RELU) -> list[Tensor]:
    x, other, weight, bias, mean, var, grad = tensors
    variables = [tensor.detach().requires_grad_() for tensor in ((x, other) if residual else (x,))]
    parameters = [tensor.detach().requires_grad_() for tensor in (weight, bias)]
    known = (None, None) if training else (mean, var)
    output = F.batch_norm(variables[0], *known, *parameters, training, 0.1, 1e-5)
    output = activations.applied(activation, output + variables[1] if residual else output)
    return [output, *torch.autograd.grad(output, [*variables, *parameters], grad)]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("shape", "last"), layouts())
def test_layouts(shape: tuple[int, ...], last: bool, training: bool, residual: bool) -> None:
    runs = []
    for _ in range(3):  # torch's sums of products are float64 here and there
        tensors = draw(shape, last, torch.float32, torch.float32)
        x, other, *vectors, grad = tensors
        results = ours(x, other if residual else None, training, *vectors, grad=grad)
        for result, expected in zip(results, torchs(training, residual, *tensors), strict=True):
            assert result.stride() == expected.stride()
        runs.append((results, tensors))
    assert_as_accurate_as_torch(lambda *t: torchs(training, residual, *t), *runs)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("parameters", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_dtypes(dtype: torch.dtype, training: bool, parameters: str) -> None:
    if parameters == "float32" and dtype.itemsize != 2:
        pytest.skip("torch allows it beside 16 bits alone")
    own = dtype if parameters == "own" else torch.float32
    runs = []
    for _ in range(4):  # in float64 torch itself is the reference, with errors of its own
        tensors = draw((4, 8, 5, 3), False, dtype, own)
        x, other, *vectors, grad = tensors
        results = ours(x, other, training, *vectors, grad=grad)
        assert [result.dtype for result in results] == [dtype, dtype, dtype, own, own]
        runs.append(([result.to(dtype) for result in results], [t.to(dtype) for t in tensors]))
    assert_as_accurate_as_torch(lambda *t: torchs(training, True, *t), *runs)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 4, 4), (3, 5, 4, 4), (17, 8, 3, 3)], ids=str)
def test_however_the_mask_is_found_gradients_are_the_same(shape: tuple[int, ...], last: bool) -> None:
    """From the input, from the output, and from bits where rows fill bytes."""
    x, _, *vectors, grad = draw(shape, last, torch.float32, torch.float32)
    weight, bias = vectors[:2]
    zero = torch.zeros_like(x)
    options = weight, bias, None, None, None, None, 0.1, 1e-5, "relu", []
    full = Columns.of(shape, last, True, x.dtype).row() % 8 == 0
    output, mean, spread, bits = kernels.batch_norm_act(x, zero, *options, full)
    assert bits.numel() == (x.numel() // 8 if full else 0)
    ways = [(False, bits), (True, bits[:0]), *([(True, bits)] if full else [])]
    common = x, None, weight, bias, mean, spread, output
    found = []
    for residual, mask in ways:
        call = *common, mask, True, 1e-5, residual, last, "relu", [], True, residual, True, True
        found.append(kernels.batch_norm_act_backward(grad, *call))
    for gradients in found[1:]:
        assert torch.equal(gradients[1], torch.ops.aten.threshold_backward(grad, output, 0))
        assert all(same_bits(gradients[index], found[0][index]) for index in (0, 2, 3))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [("silu",), ("tanh",), ("leaky_relu", -0.3)], ids=str)
def test_activations(activation: Activation, dtype: torch.dtype, residual: bool) -> None:
    """Slopes from the input and from the output, in both layouts."""
    runs = []
    for draws in range(4):
        tensors = draw((3, 8, 5, 3), draws % 2 == 1, dtype, dtype)
        x, other, *vectors, grad = tensors
        results = ours(x, other if residual else None, draws < 2, *vectors, grad=grad, activation=activation)
        expected = torchs(draws < 2, residual, *tensors, activation=activation)
        assert [result.stride() for result in results] == [result.stride() for result in expected]
        runs.append((results, tensors))
    for part, training in ((runs[:2], True), (runs[2:], False)):
        assert_as_accurate_as_torch(lambda *t, on=training: torchs(on, residual, *t, activation=activation), *part)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("shape", "last"), layouts())
@pytest.mark.parametrize("momentum", [0.3, 1.0])
def test_running_statistics_of_every_layout(shape: tuple[int, ...], last: bool, momentum: float) -> None:
    """Each moves once, wherever tiles overlap and however many columns a channel has."""
    x, *_ = draw(shape, last, torch.float32, torch.float32)
    running = torch.arange(shape[1]).float(), torch.ones(shape[1])
    expected = [tensor.clone() for tensor in running]
    kernels.batch_norm_act(x, *(None,) * 5, *running, momentum, 1e-5, "relu", [], False)
    F.batch_norm(x, *expected, training=True, momentum=momentum)
    torch.testing.assert_close(list(running), expected)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1 / 3, 1.0, 0.0])
def test_running_statistics(momentum: float, dtype: torch.dtype) -> None:
    """In place; the variance is that of a sample. An update is as exact as the dtype."""

    def updated(x: Tensor) -> tuple[Tensor, Tensor]:
        running = torch.arange(6).to(x.dtype), torch.ones(6, dtype=x.dtype)
        F.batch_norm(x, *running, training=True, momentum=momentum)
        return running

    x = (torch.randn(5, 6, 7) * 2 + 3).to(dtype)
    results = torch.arange(6).to(dtype), torch.ones(6, dtype=dtype)
    kernels.batch_norm_act(x, None, None, None, None, None, *results, momentum, 1e-5, "relu", [], False)
    assert_as_accurate_as_torch(updated, (results, [x]))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_statistics_do_not_cancel(mean: float, last: bool) -> None:
    """The variance of values around a large mean, and of one outlier: what E[x^2] - E[x]^2 has wrong digits of."""
    x = torch.randn(4, 3, 16, 16) + mean
    x[0, 0, 0, 0] = 0
    x = x.to(memory_format=torch.channels_last) if last else x
    _, found, spread, _ = kernels.batch_norm_act(x, *(None,) * 7, 0.1, 1e-5, "relu", [], False)
    variance, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(spread, (variance + 1e-5).rsqrt(), rtol=2e-6, atol=0)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity(training: bool, value: float) -> None:
    tensors = draw((3, 4, 5), False, torch.float32, torch.float32)
    x, other, *vectors, grad = tensors
    x[1, 2, 3] = value  # whose position a lane past the edge repeats
    vectors[0].abs_()
    results = ours(x, other, training, *vectors, grad=grad)
    expected = torchs(training, True, *tensors)
    assert torch.equal(results[0].isnan(), expected[0].isnan())
    torch.testing.assert_close(results[0], expected[0], equal_nan=True)
    torch.testing.assert_close(results[2:], expected[2:], equal_nan=True)


def test_bits_do_not_depend_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many strips share a sum is a matter of the sizes alone."""
    plans = []
    for count in (16, 132):
        monkeypatch.setattr(configs, "multiprocessors", lambda _, count=count: count)
        configs.forget_plans()
        call = kernels.Call(
            torch.device("meta"), torch.float32, torch.Size((32, 64, 56, 56)), False, True, True, True, 1e-5
        )
        monkeypatch.setattr(kernels, "register_limit", lambda *_, **__: {})
        plans.append(kernels.tiling(call))
    assert plans[0] == plans[1] and plans[0].strips()[0] > 1


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(("shape", "last"), itertools.product([(4, 6, 5, 5), (16, 6, 5, 5)], [False, True]))
def test_repeated(shape: tuple[int, ...], last: bool) -> None:
    x, other, *vectors, grad = draw(shape, last, torch.float32, torch.float32)
    first, second = (ours(x, other, True, *vectors, grad=grad) for _ in range(2))
    assert all(map(same_bits, first, second))
