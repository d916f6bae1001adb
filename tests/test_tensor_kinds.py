"""Tensors that are not plain leaves: views of complex ones, subclasses, modes, inference, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    Case,
    Logged,
    no_fallback,
    one_case_per_op,
    torch_linear_relu,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastops.functional as FF

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]


def complex_view(conjugate: bool) -> Tensor:
    z = torch.randn(4, 3, dtype=torch.complex64)
    return z.conj().imag if conjugate else z.real


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("op", ["linear", "linear_relu", "mse_loss", "cross_entropy"])
def test_views_of_complex_tensors(conjugate: bool, op: str, backend: str) -> None:
    """The imaginary part of a conjugate has its sign in a flag, not in memory."""
    input = complex_view(conjugate)
    assert input.is_neg() is conjugate
    other = {"mse_loss": torch.randn(4, 3), "cross_entropy": torch.tensor([0, 1, 2, 0])}.get(op, complex_view(True)[:2])
    torchs = torch_linear_relu if op == "linear_relu" else getattr(F, op)
    torch.testing.assert_close(getattr(FF, op)(input, other), torchs(input, other))


@one_case_per_op
def test_tensor_subclasses_see_the_call_and_keep_their_type(case: Case, backend: str) -> None:
    Logged.met.clear()
    tensors = [t.as_subclass(Logged) for t in case.tensors(requires_grad=False)]
    result = case.ours(*tensors)
    assert type(result) is Logged
    assert getattr(FF, case.op) in Logged.met
    torch.testing.assert_close(result.as_subclass(Tensor), case.torchs(*case.tensors(requires_grad=False)))


@one_case_per_op
def test_torch_function_modes_see_the_call(case: Case, backend: str) -> None:
    met = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            met.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        result = case.ours(*case.tensors())
    assert getattr(FF, case.op) in met
    torch.testing.assert_close(result, case.torchs(*case.tensors()))


@one_case_per_op
def test_inference_mode(case: Case, backend: str) -> None:
    with torch.inference_mode():
        result = case.ours(*case.tensors(torch.float32))
    assert result.is_inference()
    torch.testing.assert_close(result.clone(), case.torchs(*case.tensors(torch.float32)).detach())


@pytest.mark.parametrize("op", ["linear", "linear_relu", "mse_loss"])
def test_inference_tensors_cannot_be_trained_on(op: str, backend: str) -> None:
    errors = []
    for function in (getattr(FF, op), torch_linear_relu if op == "linear_relu" else getattr(F, op)):
        with torch.inference_mode():
            input = torch.randn(4, 3)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward") as raised:
            function(input, torch.randn(4, 3, requires_grad=True))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


@one_case_per_op
def test_nothing_is_recorded_where_nothing_is_needed(case: Case, backend: str) -> None:
    with torch.no_grad():
        assert not case.ours(*case.tensors(torch.float32)).requires_grad
    assert not case.ours(*case.tensors(torch.float32, requires_grad=False)).requires_grad


@one_case_per_op
def test_graphs_of_non_leaf_tensors(case: Case, backend: str) -> None:
    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = case.tensors(torch.float32)
        return list(torch.autograd.grad(function(*(t * 2 + 1 for t in leaves)).sum(), leaves))

    torch.testing.assert_close(run(case.ours), run(case.torchs))
