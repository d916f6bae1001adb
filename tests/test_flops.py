"""What torch's counter of floating-point operations sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_case, no_fallback, onednn_in_float64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastops

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]


@every_case
def test_flops_are_those_of_the_torch_expression(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and backward alone by a counter that comes later."""
    onednn_in_float64(monkeypatch)

    def counts(function: Callable[..., Tensor]) -> tuple[int, int, dict[Any, int]]:
        with FlopCounterMode(display=False) as forward:
            result = function(*(tensors := case.tensors()))
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(result, tensors, torch.ones_like(result))
        return forward.get_total_flops(), backward.get_total_flops(), forward.get_flop_counts()["Global"]

    found, expected = counts(case.ours), counts(case.torchs)
    assert found[:2] == expected[:2]
    if backend == "triton" and expected[0]:
        assert any("fastops" in str(op) for op in found[2])


def test_flops_of_a_compiled_model_and_in_inference_mode(backend: str) -> None:
    model, x = fastops.swap(nn.Sequential(nn.Linear(4, 3), nn.ReLU())), torch.randn(2, 4)
    for inference, call in ((False, torch.compile(model, backend="aot_eager")), (True, model)):
        with torch.inference_mode(inference), FlopCounterMode(display=False) as counter:
            call(x)
        assert counter.get_total_flops() == 2 * 2 * 4 * 3
