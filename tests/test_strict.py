"""`fastops.backend(.., strict=True)`: no call falls back to the torch expression without an error."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import Case, gradients, no_fallback, one_case_per_op
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.kernels import onednn
from fastops.ops import OPS
from fastops.ops import op as ops

pytestmark = no_fallback
x, w = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
INTEGERS = (x.int(), w.detach().int())
STRICT = fastops.backend("triton", strict=True)
ONEDNN = fastops.backend("onednn", strict=True)


@one_case_per_op
def test_what_has_kernels_runs(case: Case) -> None:
    """The same bits as without, forward and backward."""
    tensors = case.tensors(torch.float32)
    found = []
    for strict in (False, True):
        with fastops.backend("triton", strict=strict):
            found.append(gradients(case.ours, *tensors))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def second_derivative() -> Tensor:
    first = torch.autograd.grad(FF.linear_relu(x, w).square().sum(), w, create_graph=True)[0]
    return torch.autograd.grad(first.sum(), w)[0]


FALLBACKS: dict[str, tuple[fastops.backend, Any, str]] = {
    "no kernel": (STRICT, lambda: FF.linear(*INTEGERS), "linear would fall back from triton .* torch.int32"),
    "explain wrong arguments": (STRICT, lambda: fastops.explain("linear", x, w.t()), "do not make a linear layer"),
    "option": (STRICT, lambda: FF.mse_loss(x, x, weight=x), "mse_loss .* element weights"),
    "transform": (STRICT, lambda: torch.func.grad(lambda v: FF.linear(v, w).sum())(x), "under torch.func"),
    "second derivative": (STRICT, second_derivative, "linear_relu_backward .* differentiated"),
    "batched gradients": (
        STRICT,
        lambda: torch.autograd.grad(FF.linear_relu(x, w), w, torch.ones(3, 4, 2), is_grads_batched=True),
        "linear_relu_backward .* transformed",
    ),
    "dtype of oneDNN": (ONEDNN, lambda: FF.linear(x.double(), w.double()), "linear .* from onednn .* float32"),
    "no product": (ONEDNN, lambda: FF.add_relu(x, x), "add_relu .* from onednn .* no product"),
    "explain": (STRICT, lambda: fastops.explain("linear", *INTEGERS), "torch.int32"),
    "swapped": (STRICT, lambda: fastops.swap(nn.Linear(3, 2, dtype=torch.complex64))(x.cfloat()), "complex64"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_a_fallback_is_an_error(case: str) -> None:
    selection, call, message = FALLBACKS[case]
    with selection, pytest.raises(fastops.FallbackError, match=message) as caught:
        call()
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), RuntimeError)


@pytest.mark.parametrize("selection", [STRICT, ONEDNN])
def test_wrong_arguments_raise_torchs_error(selection: fastops.backend) -> None:
    calls: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
        (FF.linear, F.linear, (x, w.t())),
        (FF.linear, F.linear, (x, "w")),
        (FF.conv2d, F.conv2d, (x, w)),
        (FF.mse_loss, F.mse_loss, (x, "x")),
        (FF.cross_entropy, F.cross_entropy, (x, x[0])),
    ]
    for ours, torchs, arguments in calls:
        with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)) as expected:
            torchs(*arguments)
        with selection, pytest.raises(expected.type, match=re.escape(str(expected.value).splitlines()[0])):
            ours(*arguments)


def test_bfloat16_in_the_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreter_has_bfloat16", False)
    with STRICT, pytest.raises(fastops.FallbackError, match="bfloat16 wrongly"):
        FF.linear(x.bfloat16(), w.bfloat16())


def test_onednn_runs_or_its_lack_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS["linear_relu"], "launchers", ())  # kernels would fail
    with ONEDNN:
        FF.linear_relu(x, w).sum().backward()
        FF.linear_relu(x, w.detach())
        monkeypatch.setattr(onednn, "available", lambda: False)
        with pytest.raises(fastops.FallbackError, match="built without oneDNN"):
            FF.linear(x, w)


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_that_fails_raises_its_own_error(
    monkeypatch: pytest.MonkeyPatch, direction: int, compiled: bool
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    launchers = list(OPS["linear_relu"].launchers)
    launchers[direction] = failing
    torch._dynamo.reset()
    function = torch.compile(FF.linear_relu, backend="aot_eager", fullgraph=True) if compiled else FF.linear_relu
    monkeypatch.setattr(OPS["linear_relu"], "launchers", tuple(launchers))
    failed = ("linear_relu" + "_backward" * direction, x.device, x.dtype)
    monkeypatch.setattr(ops, "failed", {failed})  # and is not tried again where nothing is strict
    monkeypatch.setattr(dispatch, "failed", ops.failed)
    with fastops.backend("triton"):
        FF.linear_relu(x, w).sum().backward()
    with STRICT, pytest.raises(RuntimeError, match=r"^no kernel image(\n|$)"):
        function(x, w).sum().backward()


def test_the_backward_pass_is_as_strict_as_its_forward() -> None:
    with STRICT:
        strict = FF.linear_relu(x, w).square().sum()
    plain = FF.linear_relu(x, w).square().sum()
    with pytest.raises(fastops.FallbackError):
        torch.autograd.grad(strict, w, create_graph=True)
    with STRICT:
        torch.autograd.grad(plain, w, create_graph=True)


def test_it_nests_decorates_and_holds_for_its_thread() -> None:
    integers = lambda: FF.linear(*INTEGERS)  # noqa: E731
    with STRICT:
        for inner in ("torch", "triton"):
            with fastops.backend(inner):
                integers()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(integers).result()
        with pytest.raises(fastops.FallbackError):
            integers()
    integers()
    with pytest.raises(fastops.FallbackError):
        STRICT(integers)()
    integers()


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_what_has_nothing_to_fall_back_from_cannot_be_strict(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{name}' cannot be strict: only 'triton' and 'onednn' can"):
        fastops.backend(name, strict=True)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FF.linear_relu, backend="aot_eager", fullgraph=fullgraph)
    with STRICT:
        torch.testing.assert_close(gradients(compiled, x, w), gradients(FF.linear_relu, x, w))
        with pytest.raises(Exception, match=r"linear_relu would fall back .* torch\.int32") as caught:
            compiled(*INTEGERS)
    assert fullgraph or type(caught.value) is fastops.FallbackError
    assert compiled(*INTEGERS).dtype is torch.int32


def test_compile_backend() -> None:
    """A layer that no kernel takes is an error; a ReLU or a sum without one is not."""
    torch._dynamo.reset()
    good, bad = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.Linear(3, 2, dtype=torch.complex64)
    with STRICT:
        torch.compile(good, backend="fastops")(x)
        torch.compile(nn.ReLU(), backend="fastops")(x)
        with pytest.raises(Exception, match=r"linear would fall back .* torch\.complex64"):
            torch.compile(bad, backend="fastops")(x.cfloat())
    torch.compile(bad, backend="fastops")(x.cfloat())
    with ONEDNN:
        torch.compile(lambda a: torch.relu(a + a), backend="fastops")(x)
