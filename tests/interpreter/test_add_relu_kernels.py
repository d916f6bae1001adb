"""The kernels of the sum with ReLU in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from guard import run_guarded
from torch import Tensor

from fastops.kernels import add_relu as kernels
from fastops.kernels import elementwise

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.fixture(params=["table", "16"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one program of the table, or programs of 16 elements."""
    if request.param == "16":
        monkeypatch.setattr(
            elementwise, "elementwise_config", lambda size, *_: (min(16, 1 << (size - 1).bit_length()), 1)
        )


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts(first: str, second: str) -> None:
    """Bit for bit torch's: there is one rounding in each element."""
    input, other = LAYOUTS[first](torch.randn(3, 5, 4, 3)), LAYOUTS[second](torch.randn(3, 5, 4, 3))
    output = run_guarded(kernels.add_relu, input, other)
    assert torch.equal(output, torch.relu(input + other))
    assert output.stride() == (input + other).stride()
    grad = LAYOUTS[second](torch.randn(3, 5, 4, 3))
    masked = run_guarded(kernels.add_relu_backward, grad, output)
    assert torch.equal(masked, torch.ops.aten.threshold_backward(grad, output, 0))
    assert masked.stride() == output.stride()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype: torch.dtype, size: int) -> None:
    input, other, grad = torch.randn(3, size).to(dtype)
    input[0] = float("nan")
    output = run_guarded(kernels.add_relu, input, other)
    torch.testing.assert_close(output, torch.relu(input + other), rtol=0, atol=0, equal_nan=True)
    masked = run_guarded(kernels.add_relu_backward, grad, output)
    torch.testing.assert_close(masked, torch.ops.aten.threshold_backward(grad, output, 0), rtol=0, atol=0)
