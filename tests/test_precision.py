"""Autocast, gradient scaling, and the switches that say how exactly and how repeatably torch computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, every_case, gradients, no_fallback, one_case_per_op
from torch import Tensor, nn

import fastops
from fastops.kernels import configs, launch

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@every_case
@HALF
def test_autocast(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The dtypes of results and gradients are torch's; values agree to the rounding of the lower dtype."""
    with torch.autocast("cpu", dtype):
        found, expected = (gradients(f, *case.tensors(torch.float32)) for f in (case.ours, case.torchs))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@one_case_per_op
@HALF
def test_autocast_of_tensors_in_low_precision(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Losses of bfloat16 logits are float32 under autocast, the gradients bfloat16 again."""
    with torch.autocast("cpu", dtype):
        found, expected = (gradients(f, *case.tensors(dtype)) for f in (case.ours, case.torchs))
    assert [t.dtype for t in found] == [t.dtype for t in expected]


@one_case_per_op
def test_autocast_nested_and_disabled(case: Case, backend: str) -> None:
    """No tensor requires a gradient: torch would give nested regions the outer one's cached casts of parameters."""

    def dtypes(function: Callable[..., Tensor]) -> list[torch.dtype]:
        tensors = case.tensors(torch.float32, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16):
            inside = function(*tensors)
            with torch.autocast("cpu", enabled=False):
                disabled = function(*tensors)
            with torch.autocast("cpu", torch.float16):
                nested = function(*tensors)
            after = function(*tensors)
        return [t.dtype for t in (inside, disabled, nested, after)]

    assert dtypes(case.ours) == dtypes(case.torchs)


@one_case_per_op
def test_autocast_leaves_float64_alone(case: Case, backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.ours(*case.tensors()), case.torchs(*case.tensors())
    assert found.dtype is expected.dtype is torch.float64
    torch.testing.assert_close(found, expected)


@one_case_per_op
@pytest.mark.parametrize("way", ["triton", "onednn"])
def test_backward_inside_autocast_of_a_forward_outside(case: Case, way: str) -> None:
    """The gradient kernels compute in the dtype of what was saved, wherever backward is called."""
    tensors = case.tensors(torch.float32)
    with fastops.backend(way):
        result = case.ours(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(result.sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(case.torchs(*tensors).sum(), tensors))


def test_grad_scaler(backend: str) -> None:
    """Scaled losses, unscaled gradients, and a step left out where they overflow, as with plain torch."""

    def trained(model: nn.Module, criterion: nn.Module) -> list[Tensor]:
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for scale in (1.0, 1e30, 1.0):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = criterion(model(torch.linspace(-1, 1, 12).view(4, 3)), torch.tensor([0, 1, 1, 0])) * scale
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [torch.tensor(scaler.get_scale()), *(parameter.detach() for parameter in model.parameters())]

    results = []
    for change in (fastops.swap, fastops.unswap):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        results.append(trained(change(model), change(nn.CrossEntropyLoss())))
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


@pytest.fixture(params=["highest", "high", "medium"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("gpu", "reduced"),
    [
        ("sm75", "ieee"),
        ("sm80", "tf32"),
        ("sm89", "tf32"),
        ("sm90", "tf32"),
        ("sm103", "tf32"),
        ("sm120", "tf32"),
        ("gfx90a", "ieee"),
        ("gfx942", "tf32"),
        ("gfx950", "bf16x3"),
        ("gfx1201", "ieee"),
    ],
)
def test_float32_products_on_a_gpu(
    gpu: str, reduced: str, matmul_precision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch's setting is "highest", float32; else what the matrix units have that is as exact as tf32.

    Convolutions have a setting of their own, which is "tf32" from the start and which AMD's do not follow.
    """
    tensor: Any = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=None)
    monkeypatch.setattr(launch, "architecture", lambda _: configs.listed(gpu))
    monkeypatch.setattr(torch.version, "hip", "7.0" if gpu.startswith("gfx") else None)
    exact = torch.get_float32_matmul_precision() == "highest"
    assert launch.input_precision(tensor) == ("ieee" if exact else reduced)
    assert launch.input_precision(tensor, "conv") == (reduced if gpu.startswith("sm") else "ieee")


@one_case_per_op
def test_float32_matmul_precision(case: Case, backend: str, matmul_precision: None) -> None:
    """Nothing is less exact than products in bfloat16, the least that may be asked for."""
    found, expected = (gradients(f, *case.tensors(torch.float32)) for f in (case.ours, case.torchs))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@every_case
def test_deterministic_algorithms(case: Case, backend: str) -> None:
    """Every op runs, forward and backward, where torch is told to refuse what is not deterministic."""
    expected = gradients(case.ours, *case.tensors(torch.float32))
    torch.use_deterministic_algorithms(True)
    try:
        found = gradients(case.ours, *case.tensors(torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
