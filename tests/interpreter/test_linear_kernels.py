"""The linear kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from guard import run_guarded, same_bits
from torch import Tensor

from fastops.kernels import linear
from fastops.kernels.configs import MatmulConfig

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = MatmulConfig(32, 16, 16, 1, 1)  # so that there are several tiles in each direction
SIZES = {
    "one": (1, 1, 1),
    "prime": (37, 23, 29),
    "tile-1": (31, 15, 15),
    "tile": (32, 16, 16),
    "tile+1": (33, 17, 17),
    "inner smaller than a tile": (40, 5, 20),
    "several groups of rows": (300, 16, 20),
}
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "strided": lambda rows, columns: torch.randn(2 * rows, 3 * columns)[::2, ::3],
    "expanded rows": lambda rows, columns: torch.randn(1, columns).expand(rows, columns),
    "expanded columns": lambda rows, columns: torch.randn(rows, 1).expand(rows, columns),
}


def torch_linear_relu(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (torch.relu(a @ b + bias),)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_sizes(dtype: torch.dtype, sizes: str) -> None:
    M, K, N = SIZES[sizes]
    tensors = tuple(torch.randn(shape).to(dtype) for shape in ((M, K), (K, N), (N,)))
    result = run_guarded(linear.matmul, *tensors, True, SMALL)
    assert_as_accurate_as_torch(torch_linear_relu, ((result,), tensors))


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_matmul_layouts(a_layout: str, b_layout: str) -> None:
    tensors = LAYOUTS[a_layout](40, 24), LAYOUTS[b_layout](24, 20), torch.randn(20, 1)[:, 0]
    result = run_guarded(linear.matmul, *tensors, True, SMALL)
    assert_as_accurate_as_torch(torch_linear_relu, ((result,), tensors))
    assert result.is_contiguous()


@pytest.mark.parametrize("need_sum", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (130, 40), (3, 1025)])
def test_relu_mask_and_column_sum(shape: tuple[int, int], layout: str, need_sum: bool) -> None:
    grad, output = LAYOUTS[layout](*shape), torch.randn(shape)
    output.flatten()[0] = float("nan")  # torch's ReLU keeps NaN, and lets its gradient through
    masked, total = run_guarded(linear.relu_mask_and_column_sum, grad, output, need_sum)
    expected = torch.ops.aten.threshold_backward(grad, output, 0)
    assert torch.equal(masked, expected)
    assert (total is not None) == need_sum
    if total is not None:
        assert_as_accurate_as_torch(lambda grad: (grad.sum(0),), ((total,), (expected,)))


def test_column_sum_of_many_rows_takes_two_stages() -> None:
    grad = torch.randn(1100, 40)
    _, total = linear.relu_mask_and_column_sum(grad, None, True)
    assert_as_accurate_as_torch(lambda grad: (grad.sum(0),), ((total,), (grad,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_linear_backward(relu: bool, dtype: torch.dtype) -> None:
    grad_output, input, weight = (torch.randn(shape).to(dtype) for shape in ((5, 8, 20), (5, 8, 33), (20, 33)))
    output = torch.randn(5, 8, 20).to(dtype) if relu else None

    def torchs(grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor | None) -> tuple[Tensor, ...]:
        gz = grad_output if output is None else torch.where(output <= 0, 0, grad_output)
        gz = gz.reshape(-1, 20)
        return (gz @ weight).reshape(5, 8, 33), gz.t() @ input.reshape(-1, 33), gz.sum(0)

    tensors = grad_output, input, weight, output
    results = run_guarded(linear.linear_backward, *tensors, True)
    assert_as_accurate_as_torch(torchs, (results, tensors))
    assert same_bits(results, linear.linear_backward(*tensors, True)), "not deterministic"


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed(needed: tuple[bool, bool, bool]) -> None:
    grad_output, input, weight = torch.randn(4, 3), torch.randn(4, 5), torch.randn(3, 5)
    results = linear.linear_backward(
        grad_output, input if needed[1] else None, weight if needed[0] else None, None, needed[2]
    )
    assert tuple(result is not None for result in results) == needed
