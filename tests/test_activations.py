"""`linear_act`, `conv_act2d` and their modules: activations by name, their parameters, what a user may get wrong."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback, torch_linear_act
from torch import nn

import fastops
import fastops.functional as FF
from fastops import nn as fnn
from fastops.kernels.activation import PARAMETERS
from fastops.ops.activations import FUNCTIONS

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]
x, w, b = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
every_name = pytest.mark.parametrize("name", PARAMETERS)


@every_name
def test_values_and_gradients(name: str, backend: str) -> None:
    """With torch's defaults, with gradients and without."""
    tensors = [tensor.double().requires_grad_() for tensor in (x, w, b)]
    found, expected = FF.linear_act(*tensors, name), torch_linear_act(*tensors, activation=name)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(result, tensors, upstream) for result in (found, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(FF.linear_act(*tensors, name), expected)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("leaky_relu", {"negative_slope": 1}),
        ("elu", {"alpha": 0.3}),
        ("softplus", {"beta": 2.0}),
        ("softplus", {"threshold": 0.5}),
    ],
)
def test_parameters(name: str, parameters: dict[str, Any], backend: str) -> None:
    found = FF.linear_act(x, w, b, name, **parameters)
    torch.testing.assert_close(found, torch_linear_act(x, w, b, activation=name, **parameters))
    assert not torch.allclose(found, torch_linear_act(x, w, b, activation=name))
    layer = fnn.LinearAct(3, 4, activation=name, **parameters)
    torch.testing.assert_close(layer(x), torch_linear_act(x, layer.weight, layer.bias, activation=name, **parameters))


@every_name
def test_only_training_writes_what_was_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where the slope cannot be had from the output."""
    saved: list[bool] = []
    op = fastops.ops.OPS["linear_act"]
    forward, backward = op.launchers
    monkeypatch.setitem(vars(op), "launchers", (lambda *given: (saved.append(given[-1]), forward(*given))[1], backward))
    with fastops.backend("triton", strict=True):
        FF.linear_act(x, w.clone().requires_grad_(), b, name)
        FF.linear_act(x, w, b, name)
        with torch.no_grad():
            FF.linear_act(x, w.clone().requires_grad_(), b, name)
    assert saved == [name not in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh"), False, False]


@pytest.mark.parametrize("kernel", [1, 3], ids=["a product", "a convolution"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_name
def test_convolutions(name: str, memory_format: torch.memory_format, kernel: int, backend: str) -> None:
    """Values, strides and gradients, with gradients and without."""
    shapes = (2, 3, 5, 4), (4, 3, kernel, kernel), (4,)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[0] = tensors[0].to(memory_format=memory_format)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    found = FF.conv_act2d(*tensors, padding=1, activation=name)
    expected = FUNCTIONS[name](F.conv2d(*tensors, padding=1))
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(result, tensors, upstream) for result in (found, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(FF.conv_act2d(*tensors, padding=1, activation=name), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_modules_of_convolutions(n: int, backend: str) -> None:
    """The options and keys of `torch.nn.Conv2d`, and the parameters of the activation."""
    ours, torchs = getattr(fnn, f"ConvAct{n}d"), getattr(nn, f"Conv{n}d")
    options = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "circular"}
    layer = ours(2, 4, 3, **options, activation="elu", alpha=0.5)
    plain = torchs(2, 4, 3, **options)
    plain.load_state_dict(layer.state_dict())
    assert isinstance(layer, torchs) and repr(layer).endswith("activation='elu', alpha=0.5)")
    image = torch.randn(2, 2, *(5,) * n)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(image), F.elu(plain(image), 0.5))


def test_module() -> None:
    """The parameters and keys of `torch.nn.Linear`; it can be copied and pickled."""
    layer = fnn.LinearAct(3, 4, activation="elu", alpha=0.5)
    assert isinstance(layer, nn.Linear) and layer.state_dict().keys() == nn.Linear(3, 4).state_dict().keys()
    assert repr(layer) == "LinearAct(in_features=3, out_features=4, bias=True, activation='elu', alpha=0.5)"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert fnn.LinearAct(3, 4, bias=False, dtype=torch.float64, activation="gelu").weight.dtype is torch.float64


@pytest.mark.parametrize(
    ("name", "parameters", "error", "message"),
    [
        ("geluu", {}, ValueError, "unknown activation 'geluu': expected one of 'relu', 'relu6', "),
        (None, {}, ValueError, "unknown activation None"),
        (["gelu"], {}, ValueError, r"unknown activation \['gelu'\]"),
        ("gelu", {"approximate": "tanh"}, TypeError, r"gelu\(\) got an unexpected keyword argument 'approximate'"),
        ("relu", {"alpha": 1.0}, TypeError, r"relu\(\) got an unexpected keyword argument 'alpha'"),
    ],
)
def test_errors(name: Any, parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    for call in (
        lambda: FF.linear_act(x, w, b, name, **parameters),
        lambda: FF.conv_act1d(x, w, b, activation=name, **parameters),
        lambda: fnn.LinearAct(3, 4, activation=name, **parameters),
        lambda: fnn.ConvAct3d(3, 4, 2, activation=name, **parameters),
    ):
        with pytest.raises(error, match=message):
            call()


def test_wrong_tensors_and_parameters_raise_torchs_error(backend: str) -> None:
    with pytest.raises(RuntimeError) as expected:
        F.gelu(F.linear(x, w.t()))
    with pytest.raises(RuntimeError, match=str(expected.value).replace("(", r"\(").replace(")", r"\)")):
        FF.linear_act(x, w.t(), activation="gelu")
    with pytest.raises(TypeError, match="negative_slope"):
        FF.linear_act(x, w, b, "leaky_relu", negative_slope="steep")  # type: ignore[arg-type]


def test_names_are_those_of_torch() -> None:
    for name, parameters in PARAMETERS.items():
        torch.testing.assert_close(FUNCTIONS[name](x, **parameters), FUNCTIONS[name](x))


def test_report_of_a_layer_that_has_its_activation() -> None:
    model = fastops.swap(nn.Sequential(fnn.LinearAct(3, 4, activation="gelu"), nn.ReLU()))
    assert "0 is a LinearAct, which has its activation already" in str(fastops.report(model))
