"""The stateless API: signatures are torch's, and so are values for everyday calls, on every backend."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import Case, every_case, no_fallback, onednn_in_float64

import fastops
import fastops.functional as FF
from fastops.ops import OPS
from fastops.ops.examples import TINY

pytestmark = no_fallback


@every_case
def test_values(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    tensors = case.tensors()
    found, expected = case.ours(*tensors), case.torchs(*tensors)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("op", [op.name for op in OPS.values() if any(map(inspect.isfunction, op.replaces))])
def test_signature_is_torchs(op: str) -> None:
    def parameters(function: object) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]  # type: ignore[arg-type]

    assert parameters(getattr(FF, op)) == parameters(OPS[op].replaces[0])


@pytest.mark.parametrize("op", ["linear", "linear_relu"])
def test_signature_of_linear(op: str) -> None:
    """torch's own is built in and has none to read: positions and keywords must both work."""
    input, weight, bias = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    function = getattr(FF, op)
    expected = F.linear(input=input, weight=weight, bias=bias)
    expected = expected.relu() if op == "linear_relu" else expected
    torch.testing.assert_close(function(input=input, weight=weight, bias=bias), expected)
    torch.testing.assert_close(function(input, weight, bias), expected)


@pytest.mark.parametrize("op", OPS)
def test_every_public_function_explains_itself(op: str) -> None:
    example = OPS[op].examples[0]
    variables, constants = example.draw(TINY, torch.Generator())
    with fastops.backend("triton"):
        assert fastops.explain(op, **variables, **constants, **example.options).backend == "triton"
