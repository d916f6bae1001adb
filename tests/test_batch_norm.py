"""Batch norm with ReLU: running statistics as torch's, whoever looks on, and how much memory it moves."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

import fastops
import fastops.functional as FF
from fastops import nn as fnn
from fastops.ops.activations import FUNCTIONS

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::FutureWarning")]
ROOT = Path(__file__).parents[1]
LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "rows": (fnn.BatchNormReLU1d, nn.BatchNorm1d, (6, 5)),
    "1d": (fnn.BatchNormReLU1d, nn.BatchNorm1d, (4, 5, 7)),
    "2d": (fnn.BatchNormReLU2d, nn.BatchNorm2d, (3, 5, 4, 3)),
    "3d": (fnn.BatchNormReLU3d, nn.BatchNorm3d, (2, 5, 2, 3, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum=None": {"momentum": None},
    "momentum=0.4": {"momentum": 0.4, "eps": 0.1},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def pair(layer: str, **options: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """Our layer and torch's with the same weights, and the shape of an input."""
    ours, torchs, shape = LAYERS[layer]
    made = ours(5, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(5))
    twin = torchs(5, **options).double()
    twin.load_state_dict(made.state_dict())
    return made, twin, shape


def assert_same_state(ours: nn.Module, torchs: nn.Module) -> None:
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_modules(layer: str, options: str, backend: str) -> None:
    """Two steps, one in evaluation, one more: outputs, gradients and all of the state."""
    ours, torchs, shape = pair(layer, **OPTIONS[options])
    for training in (True, True, False, True):
        x = torch.randn(shape, dtype=torch.float64) + 1
        results = []
        for module, function in ((ours, lambda y: y), (torchs, F.relu)):
            module.train(training)
            leaf = x.clone().requires_grad_()
            output = function(module(leaf))
            results.append([output, *torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()])])
            assert torch.equal(leaf, x)
        torch.testing.assert_close(*results)
        assert_same_state(ours, torchs)


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("layer", LAYERS)
def test_modules_with_an_activation(layer: str, activation: str, backend: str) -> None:
    _, torchs, shape = pair(layer)
    ours = getattr(fnn, f"BatchNormAct{type(torchs).__name__[-2:]}")(5, activation=activation).double()
    ours.load_state_dict(torchs.state_dict())
    assert repr(ours).endswith(f"activation={activation!r})")
    for training in (True, False):
        x = torch.randn(shape, dtype=torch.float64) + 1
        results = []
        for module, function in ((ours, lambda y: y), (torchs, FUNCTIONS[activation])):
            module.train(training)
            leaf = x.clone().requires_grad_()
            output = function(module(leaf))
            results.append([output, *torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()])])
        torch.testing.assert_close(*results)
        assert_same_state(ours, torchs)


@pytest.mark.parametrize("change", ["momentum", "frozen", "track_running_stats", "no buffers"])
def test_changes_count_from_then_on(change: str, backend: str) -> None:
    ours, torchs, shape = pair("2d")
    for module in (ours, torchs):
        if change == "momentum":
            module.momentum = 0.7
        elif change == "frozen":
            module.eval().requires_grad_(False)
        elif change == "track_running_stats":
            module.track_running_stats = False
        else:
            module.running_mean = module.running_var = module.num_batches_tracked = None
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), F.relu(torchs(x)))
    assert_same_state(ours, torchs)


def test_one_value_per_channel(backend: str) -> None:
    layer = fnn.BatchNormReLU1d(5)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        layer(torch.randn(1, 5))
    assert layer.num_batches_tracked == 1  # as torch, which counts first
    assert layer.eval()(torch.randn(1, 5)).shape == (1, 5)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(torch.randn(1, 5, 2, 2))


def sums_with_statistics(way: Callable[..., Any]) -> list[Tensor]:
    """What ``way`` makes of our function and of torch's, and the running statistics afterwards."""
    torch.manual_seed(0)
    x, other, weight = torch.randn(2, 4, 8, 3, dtype=torch.float64), *torch.randn(2, 8, dtype=torch.float64)
    statistics = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    found = way(lambda a, w: _sum(a, other.view(8, 1), *statistics, w), x[0].clone(), weight.clone())
    return [*found, *statistics]


def _sum(x: Tensor, other: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
    function = FF.batch_norm_add_relu if fastops.dispatch.selected_backend() != "torch" else _torchs
    return function(x, other.expand(x.shape).contiguous(), mean, var, weight, None, True, 0.3)


def _torchs(x: Tensor, other: Tensor, *arguments: Any) -> Tensor:
    return F.relu(F.batch_norm(x, *arguments) + other)


def _gradients(function: Callable[..., Tensor], *leaves: Tensor, again: bool = False) -> list[Tensor]:
    for leaf in leaves:
        leaf.requires_grad_()
    output = function(*leaves)
    found = torch.autograd.grad(output.square().sum(), leaves, create_graph=again)
    if again:
        return [*found, *torch.autograd.grad(found[0].square().sum() + found[1].square().sum(), leaves)]
    return [output, *found]


def _tangent(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    return list(torch.func.jvp(function, leaves, tuple(leaf.cos() for leaf in leaves)))


def _compiled(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    torch._dynamo.reset()
    return _gradients(torch.compile(function, backend="aot_eager", fullgraph=True), *leaves)


def _checkpointed(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Statistics move twice, as torch's."""
    return _gradients(lambda *t: checkpoint(function, *t, use_reentrant=False), *leaves)


WAYS: dict[str, Callable[..., Any]] = {
    "backward": _gradients,
    "double backward": lambda *arguments: _gradients(*arguments, again=True),
    "forward AD": _tangent,
    "compiled": _compiled,
    "checkpoint": _checkpointed,
    "vmap of weights": lambda f, x, w: [vmap(f, (None, 0))(x, torch.stack([w, -w]))],
    "inference": lambda f, x, w: [torch.inference_mode()(f)(x, w)],
}


@pytest.mark.parametrize("way", WAYS)
def test_running_statistics_whoever_looks_on(way: str) -> None:
    results = []
    for backend in ("triton", "torch"):
        with fastops.backend(backend):
            results.append(sums_with_statistics(WAYS[way]))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][-1], torch.ones_like(results[0][-1]))


def test_vmap_of_inputs_is_torchs_error() -> None:
    """Statistics without a batch dimension cannot be changed for each of many inputs."""
    statistics = torch.zeros(3), torch.ones(3)
    with fastops.backend("triton"), pytest.raises(RuntimeError, match="running_mean"):
        vmap(lambda x: FF.batch_norm_relu(x, *statistics, training=True))(torch.randn(2, 4, 3))


def test_functional_call_and_copies(backend: str) -> None:
    """The buffers that are given are those that change."""
    layer, _, shape = pair("2d")
    x, state = torch.randn(shape, dtype=torch.float64), copy.deepcopy(layer.state_dict())
    before = copy.deepcopy(layer.state_dict())
    result = functional_call(layer, state, (x,))
    assert_same_buffers = torch.testing.assert_close
    assert_same_buffers(layer.state_dict(), before)
    torch.testing.assert_close(result, layer(x))
    assert_same_buffers(layer.state_dict(), state)


def test_nothing_else_is_modified_and_a_backward_pass_repeats(backend: str) -> None:
    x, other = torch.randn(2, 4, 8, 2)
    variables = [tensor.clone().requires_grad_() for tensor in (x, other)]
    output = FF.batch_norm_add_relu(*variables, None, None, training=True)
    kept = output.clone()
    first, second = (torch.autograd.grad(output, variables, torch.ones_like(output), retain_graph=True) for _ in "12")
    assert all(map(torch.equal, first, second))
    assert torch.equal(variables[0], x) and torch.equal(variables[1], other) and torch.equal(output, kept)


def test_a_sum_of_two_dtypes_has_torchs() -> None:
    """No kernel takes them: what is added in place to the norm's output would keep its dtype."""
    input, other = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16), torch.randn(4, 3, 2, 2)
    output = FF.batch_norm_add_relu(input, other, None, None, training=True)
    expected = torch.relu(F.batch_norm(input, None, None, training=True) + other)
    assert output.dtype is torch.float32 and torch.equal(output, expected)


def test_what_has_no_kernel_takes_the_torch_expression() -> None:
    x, c = torch.randn(4, 3, 2), torch.ones(3)
    with fastops.backend("triton"):
        reasons = [
            fastops.explain("batch_norm_relu", x[:1, :, :1], None, None, training=True).reason,
            fastops.explain("batch_norm_relu", x, c, torch.ones(6)[::2]).reason,
            fastops.explain("batch_norm_relu", x, c.double(), c.double()).reason,
            fastops.explain("batch_norm_add_relu", x, x[..., :1], c, c).reason,
        ]
    words = ["one value per channel", "not contiguous", "neither the input's dtype", "shapes differ"]
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "launches", "passes"), [(28, 6, (8.1, 10.3)), (16, 2, (5.1, 7.2))])
def test_passes_over_memory_and_launches(
    size: int,
    launches: int,
    passes: tuple[float, float],
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward in float32, where eager takes 10 and 13 passes; of few positions in one launch each way."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    traffic = importlib.import_module("traffic")
    options = {"running_mean": torch.zeros(16), "running_var": torch.ones(16), "training": True}
    x, other = (torch.randn(8, 16, size, size).to(memory_format=memory_format).requires_grad_() for _ in range(2))
    w, b = (torch.randn(16, requires_grad=True) for _ in range(2))
    for tensors, function, most in zip(
        ((x, w, b), (x, other, w, b)),
        (
            lambda x, w, b: FF.batch_norm_relu(x, weight=w, bias=b, **options),
            lambda x, other, w, b: FF.batch_norm_add_relu(x, other, weight=w, bias=b, **options),
        ),
        passes,
        strict=True,
    ):
        found = traffic.count(traffic.training(function, *tensors))
        assert len(found.launches) <= launches and found.bytes <= most * x.numel() * 4


@pytest.mark.parametrize("other", [None, 1.5, "x", [1.0]])
def test_what_is_no_tensor_is_added_as_torch_adds_it(other: Any, backend: str) -> None:
    x = torch.randn(2, 4, 3)

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return function(x, other, None, None, None, None, True)
        except TypeError as error:
            return str(error)

    expected = outcome(_torchs)
    found = outcome(FF.batch_norm_add_relu)
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)
