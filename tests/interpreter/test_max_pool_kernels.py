"""The kernels of maximum pooling of ReLU against torch, on memory with guards around, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter.guard import run_guarded
from torch import Tensor

from fastops.kernels import max_pool as kernels
from fastops.kernels.geometry import Window, memory_format_of
from fastops.ops import OPS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "one": (1, 1, 1, 1),
    "odd": (3, 5, 7, 9),
    "aligned": (2, 16, 8, 16),
    "columns of several tiles": (2, 2, 5, 70),
    "channels of several tiles": (2, 130, 3, 4),
}
WINDOWS = {
    "1": Window((1, 1), (1, 1), (0, 0), (1, 1), False),
    "2": Window((2, 2), (2, 2), (0, 0), (1, 1), False),
    "3, stride 2": Window((3, 3), (2, 2), (1, 1), (1, 1), False),
    "3, stride 2, ceil_mode": Window((3, 3), (2, 2), (1, 1), (1, 1), True),
    "overlapping": Window((3, 2), (1, 1), (1, 1), (1, 1), False),
    "gaps between": Window((2, 1), (3, 4), (1, 0), (1, 1), True),
    "dilation": Window((2, 3), (1, 2), (1, 1), (2, 3), False),
}


@pytest.fixture(params=["the interpreter's tiles", "a GPU's"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU are smaller."""
    if request.param == "a GPU's":
        original = kernels.tile_shape
        monkeypatch.setattr(
            kernels, "tile_shape", lambda _, *sizes: tuple(min(n, 32) for n in original(torch.device("meta"), *sizes))
        )


def cases() -> list[Any]:
    """Every shape with every window that fits, in both layouts."""
    return [
        pytest.param(shape, window, last, id=f"{shape_name}-{name}{'-channels_last' if last else ''}")
        for shape_name, shape in SHAPES.items()
        for name, window in WINDOWS.items()
        if min(window.output_size(shape[2:])) > 0
        and all(n >= d for n, d in zip(shape[2:], window.dilation, strict=True))
        for last in ((False, True) if shape[1] > 1 else (False,))
        if min(shape) > 1 or name in ("1", "3, stride 2")
    ]


def draw(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> Tensor:
    """Few whole numbers, so that many elements are equal; infinity, NaN and zeros of both signs."""
    x = torch.randint(-2, 3, shape).to(dtype)
    for value in (float("nan"), float("inf"), float("-inf"), -0.0):
        x[torch.rand(shape) < 0.05] = value
    return x.to(memory_format=torch.channels_last) if last else x


def ours(x: Tensor, window: Window, grad: Tensor) -> tuple[Tensor, Tensor]:
    output, taps = run_guarded(kernels.relu_max_pool, x, *window, True)
    last = memory_format_of(x) is torch.channels_last
    return output, run_guarded(kernels.relu_max_pool_backward, grad, taps, x.shape, *window, last)


def torchs(x: Tensor, window: Window, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    output = F.max_pool2d(F.relu(leaf), *window)
    return output.detach(), *torch.autograd.grad(output, leaf, grad)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, torchs_result in zip(found, expected, strict=True):
        torch.testing.assert_close(result, torchs_result, rtol=0, atol=0, equal_nan=True)
        assert result.stride() == torchs_result.stride()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("shape", "window", "last"), cases())
def test_layouts(shape: tuple[int, ...], window: Window, last: bool) -> None:
    """Sums of gradients too: they are added up in torch's order."""
    x = draw(shape, last, torch.float32)
    output = window.output_size(shape[2:])
    grad = torch.randn(*shape[:2], *reversed(output)).mT if last else torch.randn(*shape[:2], *output)
    assert_same(ours(x, window, grad), torchs(x, window, grad))


@pytest.mark.parametrize("last", [False, True])
def test_64_bit_positions(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_large", lambda *_: True)
    x, window, grad = draw((2, 3, 7, 9), last, torch.float32), WINDOWS["3, stride 2"], torch.randn(2, 3, 4, 5)
    assert_same(ours(x, window, grad), torchs(x, window, grad))


@pytest.mark.parametrize(("samples", "large"), [(2**29 - 2**10 - 1, False), (2**29 - 2**10, True)])
@pytest.mark.parametrize("height", [1, 2])
def test_positions_take_64_bits_where_they_must(height: int, samples: int, large: bool) -> None:
    """Those of the larger one: of the output with padding, else of the input."""
    window = (
        Window((2, 2), (1, 1), (1, 1), (1, 1), False) if height == 1 else Window((2, 2), (2, 2), (0, 0), (1, 1), False)
    )
    call = kernels.Call(torch.device("cpu"), torch.float32, (samples, 1, height, height), False, window)
    plans = kernels.forward_plan(call, True)[0], kernels.backward_plan(call)
    assert [plan.constants["LARGE"] for plan in plans] == [large] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("unit", [1, 8])
def test_tiles_of_a_gpu(unit: int, dtype: torch.dtype) -> None:
    """Powers of two, and of three widths the largest with as little behind the last column as any of them has."""
    for columns in range(1, 1000):
        rows, wide = kernels.tile_shape(torch.device("meta"), dtype, 1 << 20, columns, unit)
        assert rows.bit_count() == wide.bit_count() == 1
        assert rows * wide == (1024 if unit == 1 or dtype is torch.float64 else 2048)
        if columns > 64:
            assert wide == min((128, 64, 32), key=lambda block: (-columns % block, -block))
        else:
            assert wide // 2 < columns <= wide


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("window", ["2", "3, stride 2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, window: str, last: bool) -> None:
    """With whole numbers for gradients, whose sums are exact."""
    x, chosen = draw((2, 5, 7, 9), last, dtype), WINDOWS[window]
    grad = torch.randint(-8, 9, (2, 5, *chosen.output_size((7, 9)))).to(dtype)
    assert_same(ours(x, chosen, grad), torchs(x, chosen, grad))


@pytest.mark.parametrize("row", [[1, 2, 2], [0, 0, -1], [-0.0, 0, -1], [3, float("nan"), 4], [float("nan")] * 3])
def test_which_of_a_window_gets_the_gradient(row: list[float]) -> None:
    """The first maximum, the last NaN, and none that is not above 0."""
    x, window = torch.tensor(row, dtype=torch.float32).view(1, 1, 1, 3), Window((1, 3), (1, 1), (0, 0), (1, 1), False)
    assert_same(ours(x, window, torch.ones(1, 1, 1, 1)), torchs(x, window, torch.ones(1, 1, 1, 1)))


def test_sums_of_16_bits_are_rounded_once() -> None:
    """Nine windows meet in one element; 1 + 2^-8 is no number of bfloat16, 9 times 2^-8 with 1 is."""
    window = Window((3, 3), (1, 1), (0, 0), (1, 1), False)
    x = torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)
    x[0, 0, 2, 2] = 1
    grad = torch.full((1, 1, 3, 3), 2.0**-8, dtype=torch.bfloat16)
    grad[0, 0, 0, 0] = 1
    _, found = ours(x, window, grad)
    assert found[0, 0, 2, 2] == 1 + 2.0**-5


def test_without_taps() -> None:
    """Where no gradient was wanted no taps are kept; a gradient that is wanted all the same finds them again."""
    x, window = draw((3, 5, 7, 9), False, torch.float32), WINDOWS["2"]
    output, taps = run_guarded(kernels.relu_max_pool, x, *window, False)
    assert_same((output,), (F.max_pool2d(F.relu(x), 2),))
    assert taps.numel() == 0
    grad = torch.randn_like(output)
    expected = torchs(x, window, grad)[1]
    record = OPS["relu_max_pool2d"]
    for backward in (record.gradients, record.load()[1]):
        assert torch.equal(backward(grad, x, taps, *window, False, False)[0], expected)
