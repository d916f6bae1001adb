"""Convolutions as PyTorch's users write them: every form of every option, functions and modules, on every backend."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Logged, gradients, no_fallback
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops import nn as fnn

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore:Using padding='same'")]
DIMENSIONS = pytest.mark.parametrize("n", [1, 2, 3])
RELU = pytest.mark.parametrize("relu", [False, True], ids=["conv", "conv_relu"])
MODULES: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (fnn.Conv1d, nn.Conv1d),
    (fnn.Conv2d, nn.Conv2d),
    (fnn.Conv3d, nn.Conv3d),
    (fnn.ConvReLU1d, nn.Conv1d),
    (fnn.ConvReLU2d, nn.Conv2d),
    (fnn.ConvReLU3d, nn.Conv3d),
]
every_module = pytest.mark.parametrize(("ours", "torchs"), MODULES, ids=lambda module: module.__name__)


def pair(n: int, relu: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Our function and torch's."""
    torchs = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    if not relu:
        return getattr(FF, f"conv{n}d"), torchs
    return getattr(FF, f"conv_relu{n}d"), lambda *arguments, **options: F.relu(torchs(*arguments, **options))


def tensors(n: int, groups: int = 1, batch: tuple[int, ...] = (2,)) -> tuple[Tensor, ...]:
    shapes = (*batch, 4, *(6, 5, 4)[:n]), (6, 4 // groups, *(3, 2, 2)[:n]), (6,)
    return tuple(torch.randn(shape).requires_grad_() for shape in shapes)


def assert_same(ours: list[Tensor], torchs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, torchs)
    assert [tensor.stride() for tensor in ours] == [tensor.stride() for tensor in torchs]


# Options --------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing": lambda n: {},
    "numbers": lambda n: {"stride": 2, "padding": 1, "dilation": 2},
    "single tuples": lambda n: {"stride": (2,), "padding": (1,), "dilation": (1,)},
    "single lists": lambda n: {"stride": [2], "padding": [1], "dilation": [1]},
    "tuples": lambda n: {"stride": (2, 1, 1)[:n], "padding": (0, 1, 1)[:n], "dilation": (1, 2, 1)[:n]},
    "lists": lambda n: {"stride": [1, 2, 1][:n], "padding": [1, 0, 1][:n], "dilation": [1, 1, 2][:n]},
    "sizes": lambda n: {"stride": torch.Size((2, 1, 1)[:n]), "padding": torch.Size((0, 1, 1)[:n])},
    "same": lambda n: {"padding": "same"},
    "same, dilated": lambda n: {"padding": "same", "dilation": (2, 1, 3)[:n]},
    "same, in tuples": lambda n: {"padding": "same", "stride": (1,) * n},
    "valid": lambda n: {"padding": "valid", "stride": 2},
    "wide padding": lambda n: {"padding": 4, "stride": 3},
    "groups": lambda n: {"groups": 2, "padding": 1},
}


@DIMENSIONS
@RELU
@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_of_the_options(n: int, relu: bool, name: str, backend: str) -> None:
    ours, torchs = pair(n, relu)
    options = OPTIONS[name](n)
    given = tensors(n, options.get("groups", 1))
    assert_same(gradients(lambda *t: ours(*t, **options), *given), gradients(lambda *t: torchs(*t, **options), *given))
    if backend == "triton":
        assert fastops.explain(f"conv_relu{n}d" if relu else f"conv{n}d", *given, **options).backend == "triton"


@RELU
def test_options_by_position_and_all_by_name(relu: bool, backend: str) -> None:
    ours, torchs = pair(2, relu)
    input, weight, bias = tensors(2, groups=2)
    expected = torchs(input, weight, bias, (2, 1), 1, 1, 2)
    torch.testing.assert_close(ours(input, weight, bias, (2, 1), 1, 1, 2), expected)
    names = {"stride": (2, 1), "padding": 1, "dilation": 1, "groups": 2}
    torch.testing.assert_close(ours(bias=bias, weight=weight, input=input, **names), expected)


UNUSUAL: dict[str, dict[str, Any]] = {
    "NumPy stride": {"stride": np.int64(2)},
    "NumPy padding": {"padding": (np.int64(1), 0)},
    "NumPy groups": {"groups": np.int64(2)},
    "truth as stride": {"stride": True},
    "truth as groups": {"groups": True},
    "tensor": {"stride": torch.tensor(2)},
    "array": {"stride": np.array([2, 1])},
    "range": {"stride": range(1, 3)},
    "generator": {"stride": iter((1, 2))},
    "dictionary": {"stride": {1: 2}},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_options_that_no_kernel_takes_are_torchs(name: str, backend: str) -> None:
    """Whether torch takes such an option or refuses it."""
    options = UNUSUAL[name]
    given = tensors(2, int(options.get("groups", 1)))

    def outcome(function: Callable[..., Tensor]) -> Any:
        try:
            return function(*given, **options).detach()
        except TypeError:
            return TypeError

    found, expected = outcome(FF.conv2d), outcome(F.conv2d)
    if expected is TypeError:
        assert found is TypeError
    else:
        torch.testing.assert_close(found, expected)


# Shapes ---------------------------------------------------------------------------------------------------------------


@DIMENSIONS
@RELU
@pytest.mark.parametrize("padding", [1, "same"])
def test_unbatched(n: int, relu: bool, padding: int | str, backend: str) -> None:
    given = tensors(n, batch=())
    found, expected = (gradients(lambda *t: f(*t, padding=padding), *given) for f in pair(n, relu))  # noqa: B023
    assert_same(found, expected)
    assert found[0].dim() == n + 1


@DIMENSIONS
@RELU
def test_empty_batch(n: int, relu: bool, backend: str) -> None:
    found, expected = (gradients(f, *tensors(n, batch=(0,))) for f in pair(n, relu))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@RELU
def test_groups(groups: int, relu: bool, backend: str) -> None:
    input, weight = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(8, 4 // groups, 3, 3, requires_grad=True)
    found, expected = (
        gradients(lambda *t: f(*t, stride=2, padding=1, groups=groups), input, weight)  # noqa: B023
        for f in pair(2, relu)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("weight_last", [True, False])
@pytest.mark.parametrize("input_last", [True, False])
@RELU
def test_memory_format_is_kept(relu: bool, input_last: bool, weight_last: bool, backend: str) -> None:
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    input, weight, bias = tensors(2)
    given = (
        input.detach().contiguous(memory_format=formats[input_last]).requires_grad_(),
        weight.detach().contiguous(memory_format=formats[weight_last]).requires_grad_(),
        bias,
    )
    found, expected = (gradients(f, *given) for f in pair(2, relu))
    assert_same(found, expected)
    assert found[0].is_contiguous(memory_format=formats[input_last or weight_last])


# Modules --------------------------------------------------------------------------------------------------------------


def expected_of(ours: nn.Module, torchs: nn.Module) -> Callable[[Tensor], Tensor]:
    return (lambda input: F.relu(torchs(input))) if "ReLU" in type(ours).__name__ else torchs


@every_module
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_modules(ours: type, torchs: type, mode: str, padding: int | str, backend: str) -> None:
    n = int(torchs.__name__[4])
    options: dict[str, Any] = {"padding": padding, "padding_mode": mode, "groups": 2, "bias": mode != "reflect"}
    options["stride"] = 1 if padding == "same" else (2, 1, 1)[:n]
    our, their = ours(4, 6, (3, 2, 3)[:n], **options), torchs(4, 6, (3, 2, 3)[:n], **options)
    our.load_state_dict(their.state_dict())
    input = torch.randn(1, 4, *(6, 5, 4)[:n], requires_grad=True)
    results = []
    for module, call in ((our, our), (their, expected_of(our, their))):
        results.append(gradients(lambda *_: call(input), input, *module.parameters()))  # noqa: B023
    torch.testing.assert_close(*results)


@every_module
@pytest.mark.parametrize("bias", [True, False])
def test_modules_exchange_state_with_torchs(ours: type, torchs: type, bias: bool) -> None:
    n = int(torchs.__name__[4])
    torch.manual_seed(1)
    our = ours(4, 6, (3, 2, 1)[:n], dilation=2, bias=bias)
    torch.manual_seed(1)
    their = torchs(4, 6, (3, 2, 1)[:n], dilation=2, bias=bias)
    assert isinstance(our, torchs)
    assert list(our.state_dict()) == list(their.state_dict()) == ["weight", "bias"][: 1 + bias]
    torch.testing.assert_close(dict(our.state_dict()), dict(their.state_dict()), rtol=0, atol=0)
    their.load_state_dict(our.state_dict())
    our.load_state_dict(their.state_dict())
    assert our.extra_repr() == their.extra_repr()


def test_a_module_in_channels_last(backend: str) -> None:
    """As users convert whole models: parameters and inputs."""
    our = fnn.ConvReLU2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    input = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    output = our(input)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert our.weight.grad is not None and our.weight.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, F.relu(F.conv2d(input, our.weight, our.bias, padding=1)))


# Autocast, memory and subclasses --------------------------------------------------------------------------------------


@DIMENSIONS
@RELU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(n: int, relu: bool, dtype: torch.dtype, backend: str) -> None:
    """The result has autocast's dtype, the gradients that of the tensors they belong to."""
    given = tensors(n)
    with torch.autocast("cpu", dtype):
        found, expected = (gradients(f, *given) for f in pair(n, relu))
    assert [t.dtype for t in found] == [t.dtype for t in expected] == [dtype, *(torch.float32,) * 3]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("others_frozen")
@RELU
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1)], ids=["3x3", "1x1"])
@pytest.mark.parametrize("frozen", ["input", "weight"])
@pytest.mark.parametrize("way", ["triton", "onednn"])
def test_what_no_gradient_needs_is_not_kept(relu: bool, frozen: str, shape: tuple[int, ...], way: str) -> None:
    """grad_weight needs the input, grad_input the weight: if one is frozen the other's memory is free after forward.

    torch's own convolution keeps both.
    """
    input, weight = torch.randn(2, 4, 5, 5) * 1, torch.randn(shape) * 1
    (weight if frozen == "input" else input).requires_grad_()
    kept = input * 1 if frozen == "weight" else weight * 1
    watched = weakref.ref(kept)
    with fastops.backend(way):
        output = pair(2, relu)[0](*((kept, weight) if frozen == "weight" else (input, kept)))
    del kept
    gc.collect()
    assert output.requires_grad
    assert watched() is None


@pytest.mark.usefixtures("others_frozen")
@RELU
def test_only_the_bias_is_trained(relu: bool, backend: str) -> None:
    """Neither input nor weight is kept."""
    bias = torch.randn(6, requires_grad=True)
    kept = [torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)]
    watched = [weakref.ref(tensor) for tensor in kept]
    expected = gradients(lambda b: pair(2, relu)[1](*kept, b), bias)
    output = pair(2, relu)[0](*kept, bias)
    kept.clear()
    gc.collect()
    if backend != "torch":
        assert [reference() for reference in watched] == [None, None]
    torch.testing.assert_close(torch.autograd.grad(output, bias, torch.ones_like(output))[0], expected[1])


@DIMENSIONS
@RELU
@pytest.mark.parametrize("position", [0, 1, 2], ids=["input", "weight", "bias"])
def test_a_subclass_sees_the_call_with_its_options(n: int, relu: bool, position: int, backend: str) -> None:
    ours, torchs = pair(n, relu)
    given = [tensor.detach() for tensor in tensors(n)]
    marked = [t.as_subclass(Logged) if i == position else t for i, t in enumerate(given)]
    Logged.met.clear()
    result = ours(*marked, stride=2, padding=(1,))
    assert type(result) is Logged
    assert Logged.met[0] is ours
    torch.testing.assert_close(result.as_subclass(Tensor), torchs(*given, stride=2, padding=(1,)))
