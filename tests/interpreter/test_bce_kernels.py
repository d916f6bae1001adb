"""The kernels of the binary cross-entropy in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from guard import call_plainly, run_guarded, same_bits
from torch import Tensor

from fastops.kernels import bce, elementwise

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@pytest.fixture
def tile_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 elements, so that there are several."""
    monkeypatch.setattr(elementwise, "elementwise_config", lambda size, *_: (min(16, 1 << (size - 1).bit_length()), 1))


def check(make: Callable[[], Tensors], reduction: str, grad_output: Tensor | None = None) -> None:
    """Loss and both gradients against torch's: of a run under guard, and where there is but one number of 15 more."""

    def torchs(input: Tensor, target: Tensor, weight: Any, pos_weight: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        input, target = input.detach().requires_grad_(), target.detach().requires_grad_()
        options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
        loss = F.binary_cross_entropy_with_logits(input, target, **options)
        return loss.detach(), *torch.autograd.grad(loss, (input, target), grad_output)

    def run(call: Callable[..., Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        tensors = make()
        loss = call(bce.bce, *tensors, reduction)
        grad = torch.randn_like(loss) if grad_output is None else grad_output
        gradients = call(bce.bce_backward, grad, *tensors, reduction, True, True)
        return (loss, *gradients), (*tensors, grad)

    guarded = run(run_guarded)
    more = 0 if guarded[0][0].numel() > 1 or guarded[0][0].dtype.itemsize == 2 else 15
    assert_as_accurate_as_torch(torchs, guarded, *(run(call_plainly) for _ in range(more)))


@pytest.mark.usefixtures("tile_of_16")
@pytest.mark.parametrize("size", [1, 15, 16, 37])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype: torch.dtype, reduction: str, size: int) -> None:
    def make() -> Tensors:
        weights = torch.rand(2, size).to(dtype)
        return torch.randn(size).to(dtype), torch.rand(size).to(dtype), weights[0], weights[1, :1]

    check(make, reduction)


WEIGHTS: dict[str, Callable[[], tuple[Tensor | None, Tensor | None]]] = {
    "none": lambda: (None, None),
    "0d": lambda: (torch.rand(()), torch.rand(())),
    "all": lambda: (torch.rand(3, 4, 5), torch.rand(3, 4, 5)),
    "last": lambda: (torch.rand(5), torch.rand(10)[::2]),
    "middle": lambda: (torch.rand(4, 1), torch.rand(1, 4, 1)),
    "first": lambda: (torch.rand(3, 1, 1), torch.rand(3, 1, 1)),
    "last two": lambda: (torch.rand(4, 5), torch.rand(5, 4).t()),
    "first two": lambda: (torch.rand(3, 4, 1), torch.rand(4, 3, 1).transpose(0, 1)),
    "not side by side": lambda: (torch.rand(3, 1, 5), torch.rand(3, 1, 1).expand(3, 4, 5)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "strided": lambda x: F.pad(x, (0, 5))[..., ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.usefixtures("tile_of_16")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_and_layouts(weights: str, layout: str) -> None:
    def make() -> Tensors:
        return LAYOUTS[layout](torch.randn(3, 4, 5)), LAYOUTS[layout](torch.rand(3, 4, 5)), *WEIGHTS[weights]()

    check(make, "none")


def test_layouts_that_differ() -> None:
    check(lambda: (torch.randn(5, 7), torch.rand(7, 5).t(), torch.rand(7), torch.rand(5, 1)), "none")


@pytest.mark.parametrize("column", [True, False])
def test_none_takes_every_gradient(column: bool) -> None:
    grad_output = torch.arange(5.0)[:, None].expand(5, 7) if column else torch.arange(35.0).view(7, 5).t()
    check(lambda: (torch.randn(5, 7), torch.rand(5, 7), None, torch.rand(7)), "none", grad_output)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("scale", [20, 1e4])
def test_large_logits(scale: float, dtype: torch.dtype) -> None:
    """Neither overflow nor lost digits: the loss of a well classified element is exp(-|x|), not 0."""
    signs, labels = torch.tensor([1, 1, -1, -1]).to(dtype), torch.tensor([1.0, 0.0, 1.0, 0.0]).to(dtype)
    for sign, label in zip(signs, labels, strict=True):  # one by one: errors are judged beside torch's own largest
        check(lambda s=sign, y=label: (scale * s.view(1), y.view(1), None, torch.full((1,), 3.0).to(s)), "none")


@pytest.mark.parametrize("logit", [0.0, -0.0, 6e-39, -6e-39, 1e-9])
def test_gradients_around_zero(logit: float) -> None:
    """The sigmoid is 1/2 there, and what is subtracted from it near to that: torch's difference is exact."""
    input, target = torch.full((50,), logit), torch.linspace(0.25, 0.99, 50)
    found, _ = run_guarded(bce.bce_backward, torch.ones(50), input, target, None, None, "none", True, False)
    assert torch.equal(found, 0.5 - target)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_spread_as_in_torch(value: float, label: float) -> None:
    input, target = torch.tensor([0.5, value, -2.0]), torch.tensor([0.1, label, 0.9])
    loss = run_guarded(bce.bce, input, target, None, None, "none")
    expected = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)


def test_only_needed_gradients() -> None:
    arguments = torch.tensor(2.0), torch.randn(40), torch.rand(40), None, torch.rand(40), "sum"
    both = bce.bce_backward(*arguments, True, True)
    for_input, for_target = (run_guarded(bce.bce_backward, *arguments, need, not need) for need in (True, False))
    assert for_input[1] is None and torch.equal(for_input[0], both[0])
    assert for_target[0] is None and torch.equal(for_target[1], both[1])


@pytest.mark.usefixtures("tile_of_16")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_are_equal(reduction: str) -> None:
    arguments = torch.randn(100), torch.rand(100), torch.rand(100), None, reduction
    assert same_bits(*(bce.bce(*arguments) for _ in range(2)))
