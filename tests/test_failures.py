"""A kernel that cannot be compiled or launched: torch runs instead, with one warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, no_fallback, one_case_per_op
from interpreter.launches import replace_launch
from torch import Tensor

import fastops
import fastops.functional as FF
from fastops.kernels import batch_norm as batch_norm_kernels
from fastops.kernels import geometry
from fastops.kernels import linear as linear_kernels
from fastops.ops import op as ops

x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], None]]:
    """Make every launch fail with an error."""

    def set_error(error: BaseException) -> None:
        def launch(*_: Any, **__: Any) -> None:
            raise error

        replace_launch(monkeypatch, launch)

    with fastops.backend("triton"):
        yield set_error


def failures() -> dict[str, BaseException]:
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "RuntimeError": RuntimeError("no kernel image"),
        "OutOfResources": OutOfResources(200_000, 100_000, "shared memory"),
        "PTXASError": PTXASError("ptxas died"),
    }


@one_case_per_op
@pytest.mark.parametrize("failure", failures())
def test_a_failing_kernel_warns_once_and_torch_runs(
    case: Case, failure: str, broken: Callable[[BaseException], None]
) -> None:
    broken(failures()[failure])
    tensors = case.tensors()
    expected = case.torchs(*tensors)
    gradients = torch.autograd.grad(expected.sum(), tensors)
    with pytest.warns(fastops.FallbackWarning) as caught:
        result = case.ours(*tensors)
        found = torch.autograd.grad(result.sum(), tensors)
        case.ours(*tensors)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    for message, name in zip(messages, (case.op, f"{case.op}_backward"), strict=True):
        assert f"kernel of {name} failed for shapes" in message
        assert str(tuple(tensors[0].shape)) in message
        assert "on cpu; torch runs instead" in message
        assert str(failures()[failure]) in message
    torch.testing.assert_close([result, *found], [expected, *gradients])


def test_failures_are_raised_in_the_thread_that_asks(broken: Callable[[BaseException], None]) -> None:
    """Another thread that trains meanwhile gets the torch expression."""
    broken(RuntimeError("no code for this GPU"))
    with ops.failures_raised():
        with ThreadPoolExecutor(1) as pool, pytest.warns(fastops.FallbackWarning):
            other = pool.submit(FF.linear, x, w, b).result()
        for _ in range(2):  # and is tried each time
            with pytest.raises(fastops.FallbackWarning, match="no code for this GPU"):
                FF.linear(x, w, b)
    torch.testing.assert_close(other, F.linear(x, w, b))


def test_a_kernel_that_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this dtype: it would be compiled again at each call. Its backward pass alone may fail too."""
    tried: list[tuple[str, torch.dtype]] = []

    def failing(name: str) -> Callable[..., Any]:
        def launch(first: Tensor, *_: Any, **__: Any) -> None:
            tried.append((name, first.dtype))
            raise RuntimeError("no code for this GPU")

        return launch

    launchers = ops.OPS["linear"].launchers
    for forward, names in ((failing("forward"), ("forward", "backward")), (launchers[0], ("backward",))):
        monkeypatch.setitem(vars(ops.OPS["linear"]), "launchers", (forward, failing("backward")))
        tried.clear()
        ops.failed.clear()
        with fastops.backend("triton"), pytest.warns(fastops.FallbackWarning) as caught:
            for dtype in (torch.float32, torch.float64) * 2:
                a, w = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.randn(2, 4, dtype=dtype)
                FF.linear(a, w).sum().backward()
                torch.ops.fastops.linear(a, w, None, "triton").sum().backward()
            assert fastops.explain("linear", a, w).backend == ("triton" if forward is launchers[0] else "torch")
        assert tried == [(name, dtype) for dtype in (torch.float32, torch.float64) for name in names]
        assert len(caught) == len(tried)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("lost"), KeyError("bug")]
)
def test_other_errors_are_raised(error: Exception, broken: Callable[[BaseException], None]) -> None:
    """Exhausted memory would be exhausted for torch too, a lost device is lost, and a bug is to be seen."""
    broken(error)
    with pytest.raises(type(error)):
        FF.linear(x, w)


def test_an_index_out_of_range_is_no_kernel_failure(backend: str) -> None:
    with pytest.raises(IndexError, match=r"Target 3 is out of bounds\."):
        FF.cross_entropy(x, torch.tensor([0, 1, 3, 0]))


@no_fallback
def test_kernels_run_here() -> None:
    """The tests above mean something only if the launcher really runs kernels when it is not broken."""
    launches = []
    original = linear_kernels.launch
    linear_kernels.launch = lambda *a, **k: (launches.append(1), original(*a, **k))[1]
    try:
        with fastops.backend("triton"):
            torch.testing.assert_close(FF.linear(x, w), F.linear(x, w))
    finally:
        linear_kernels.launch = original
    assert launches


@pytest.mark.parametrize(("started", "launches"), [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_running_statistics_move_once_whichever_kernel_fails(
    started: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches before the one that fails have run; torch then starts from what was there before the call."""
    if launches == 3:
        monkeypatch.setattr(geometry, "WHOLE", 0)
    original, left = batch_norm_kernels.launch, [None] * started

    def launch(plan: Any, *tensors: Tensor) -> None:
        if not left:
            raise RuntimeError("no kernel image")
        left.pop()
        original(plan, *tensors)

    image = torch.randn(4, 3, 5)
    found, expected = ((torch.zeros(3), torch.ones(3)) for _ in "12")
    F.batch_norm(image, *expected, training=True)
    monkeypatch.setattr(batch_norm_kernels, "launch", launch)
    with fastops.backend("triton"), pytest.warns(fastops.FallbackWarning):
        FF.batch_norm_relu(image, *found, training=True)
    assert not left
    torch.testing.assert_close(found, expected)
