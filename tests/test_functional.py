"""The stateless API: signatures are torch's, and so are values for everyday calls, on every backend."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import Case, every_case, no_fallback, onednn_in_float64

import fastops
import fastops.functional as FF

pytestmark = no_fallback


@every_case
def test_values(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    tensors = case.tensors()
    found, expected = case.ours(*tensors), case.torchs(*tensors)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    "op", ["mse_loss", "cross_entropy", "binary_cross_entropy_with_logits", "linear_cross_entropy"]
)
def test_signature_is_torchs(op: str) -> None:
    def parameters(function: object) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]  # type: ignore[arg-type]

    assert parameters(getattr(FF, op)) == parameters(getattr(F, op))


@pytest.mark.parametrize("op", ["linear", "linear_relu"])
def test_signature_of_linear(op: str) -> None:
    """torch's own is built in and has none to read: positions and keywords must both work."""
    input, weight, bias = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    function = getattr(FF, op)
    expected = F.linear(input=input, weight=weight, bias=bias)
    expected = expected.relu() if op == "linear_relu" else expected
    torch.testing.assert_close(function(input=input, weight=weight, bias=bias), expected)
    torch.testing.assert_close(function(input, weight, bias), expected)


@pytest.mark.parametrize(
    "op", ["linear", "linear_relu", "mse_loss", "cross_entropy", "binary_cross_entropy_with_logits"]
)
def test_every_public_function_explains_itself(op: str) -> None:
    arguments = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]) if op == "cross_entropy" else torch.randn(4, 3)
    with fastops.backend("triton"):
        assert fastops.explain(op, *arguments).backend == "triton"
