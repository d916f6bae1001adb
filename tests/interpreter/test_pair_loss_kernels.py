"""The kernels of the losses of a pair in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from guard import call_plainly, run_guarded, same_bits
from torch import Tensor

from fastops.kernels import elementwise
from fastops.kernels.launch import Plan, launch
from fastops.kernels.pair_loss import pair_loss, pair_loss_backward


class Loss(NamedTuple):
    """Both launchers of a loss, torch's function, and its own option, as the launchers and as torch take it."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]]
    torchs: Callable[..., Tensor]
    numbers: tuple[float, ...] = ()


def both(function: Callable[..., Tensor], **options: float) -> Loss:
    name = function.__name__
    launchers = partial(pair_loss, name), partial(pair_loss_backward, name)
    return Loss(*launchers, partial(function, **options), tuple(options.values()))


LOSSES = {
    "mse": both(F.mse_loss),
    "l1": both(F.l1_loss),
    "smooth_l1, beta 0.3": both(F.smooth_l1_loss, beta=0.3),
    "smooth_l1, beta 0": both(F.smooth_l1_loss, beta=0.0),
    "huber, delta 0.3": both(F.huber_loss, delta=0.3),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
LAYOUTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda: (torch.randn(5, 7), torch.randn(5, 7)),
    "0d": lambda: (torch.randn(()), torch.randn(())),
    "transposed": lambda: (torch.randn(7, 5).t(), torch.randn(7, 5).t()),
    "mixed": lambda: (torch.randn(5, 7), torch.randn(7, 5).t()),
    "strided": lambda: (torch.randn(10, 21)[::2, ::3], torch.randn(5, 8)[:, 1:]),
    "expanded": lambda: (torch.randn(5, 1).expand(5, 7), torch.randn(7).expand(5, 7)),
    "channels_last": lambda: (channels_last(2, 3, 4, 5), channels_last(2, 3, 4, 5)),
    "permuted": lambda: (torch.randn(2, 3, 4).permute(2, 0, 1), torch.randn(2, 3, 4).permute(2, 0, 1)),
}


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.fixture
def tile_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 elements, so that there are several."""
    monkeypatch.setattr(elementwise, "elementwise_config", lambda size, *_: (min(16, 1 << (size - 1).bit_length()), 1))


def check(
    loss: Loss, make: Callable[[], tuple[Tensor, Tensor]], reduction: str, grad_output: Tensor | None = None
) -> None:
    """Loss and both gradients against torch's: of a run under guard, and where rounded sums count of 15 more."""

    def torchs(input: Tensor, target: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        input, target = input.detach().requires_grad_(), target.detach().requires_grad_()
        result = loss.torchs(input, target, reduction=reduction)
        return result.detach(), *torch.autograd.grad(result, (input, target), grad_output)

    def run(call: Callable[..., Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        input, target = make()
        result = call(loss.forward, input, target, reduction, *loss.numbers)
        grad = torch.randn_like(result) if grad_output is None else grad_output
        gradients = call(loss.backward, grad, input, target, reduction, *loss.numbers, True, True)
        return (result, *gradients), (input, target, grad)

    guarded = run(run_guarded)
    more = 0 if reduction == "none" or guarded[1][0].dtype.itemsize == 2 else 15
    assert_as_accurate_as_torch(torchs, guarded, *(run(call_plainly) for _ in range(more)))


@every_loss
@pytest.mark.usefixtures("tile_of_16")
@pytest.mark.parametrize("size", [1, 13, 15, 16, 17, 37])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(loss: Loss, dtype: torch.dtype, reduction: str, size: int) -> None:
    check(loss, lambda: (torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)), reduction)


@every_loss
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layouts(loss: Loss, reduction: str, layout: str) -> None:
    check(loss, LAYOUTS[layout], reduction)
    input, target = LAYOUTS[layout]()
    result = loss.forward(input, target, reduction, *loss.numbers)
    assert result.stride() == loss.torchs(input, target, reduction=reduction).stride()


@every_loss
@pytest.mark.parametrize(
    "grad_output",
    [torch.tensor(3.0).expand(5, 7), torch.arange(5.0)[:, None].expand(5, 7), torch.arange(35.0).view(7, 5).t()],
    ids=["scalar", "column", "transposed"],
)
def test_none_takes_every_gradient(loss: Loss, grad_output: Tensor) -> None:
    check(loss, LAYOUTS["contiguous"], "none", grad_output)


@every_loss
@pytest.mark.usefixtures("tile_of_16")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_spread_as_in_torch(loss: Loss, value: float, reduction: str) -> None:
    def make() -> tuple[Tensor, Tensor]:
        input, target = torch.randn(40), torch.randn(40)
        input[3] = input[20] = target[20] = value
        return input, target

    check(loss, make, reduction)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ties_and_kinks(loss: Loss, dtype: torch.dtype, reduction: str) -> None:
    """Where input and target are equal, and where they differ by just the option."""
    differences = torch.tensor([0.0, -0.0, 0.3, -0.3, 1.0, -1.0, 0.300000005], dtype=dtype)  # the last: below float32's
    check(loss, lambda: (differences, torch.zeros(7, dtype=dtype)), reduction)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinity less infinity, as in torch
@pytest.mark.parametrize("number", [1e-320, 1e30, 1e300, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("option", ["beta", "delta"])
def test_options_that_float32_cannot_hold(option: str, dtype: torch.dtype, number: float) -> None:
    """There they are 0 or infinite."""
    torchs = F.smooth_l1_loss if option == "beta" else F.huber_loss
    input = torch.tensor([1.0, -2.0, float("inf"), float("-inf"), float("nan")], dtype=dtype).requires_grad_()
    target, ones = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    expected = torchs(input, target, reduction="none", **{option: number})
    arguments = input.detach(), target, "none", number
    loss = pair_loss(torchs.__name__, *arguments)
    gradient, _ = pair_loss_backward(torchs.__name__, ones, *arguments, True, False)
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, input, ones), equal_nan=True)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_needed_gradients(loss: Loss, reduction: str) -> None:
    input, target = torch.randn(40), torch.randn(40)
    grad_output = torch.randn_like(loss.forward(input, target, reduction, *loss.numbers))
    arguments = grad_output, input, target, reduction, *loss.numbers
    both = loss.backward(*arguments, True, True)
    for_input = run_guarded(loss.backward, *arguments, True, False)
    for_target = run_guarded(loss.backward, *arguments, False, True)
    assert for_input[1] is None and torch.equal(for_input[0], both[0])
    assert for_target[0] is None and torch.equal(for_target[1], both[1])


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mean_accumulates_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    """A sum of 3000 ones stops growing at 256 in bfloat16 and at 2048 in float16."""
    ones, zeros = torch.ones(3000, dtype=dtype), torch.zeros(3000, dtype=dtype)
    assert loss.forward(ones, zeros, "mean", *loss.numbers) == loss.torchs(ones[0].double(), zeros[0].double()).to(
        dtype
    )


@every_loss
@pytest.mark.usefixtures("tile_of_16")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_are_equal(loss: Loss, reduction: str) -> None:
    input, target = torch.randn(100), torch.randn(100)
    first, second = (loss.forward(input, target, reduction, *loss.numbers) for _ in range(2))
    assert same_bits(first, second)


@every_loss
def test_second_backward_is_independent_of_the_first(loss: Loss) -> None:
    input, target = torch.randn(40), torch.randn(40)
    options = "mean", *loss.numbers, True, False
    first, _ = loss.backward(torch.tensor(1.0), input, target, *options)
    second, _ = loss.backward(torch.tensor(-4.0), input, target, *options)
    assert torch.equal(second, -4 * first)


def test_many_partial_sums() -> None:
    partials = torch.randint(9, (2500,)).float()
    loss = torch.empty(())
    launch(Plan(elementwise.total_kernel, (1,), 2500, 4, BLOCK=1024), partials, loss)
    assert loss == partials.sum() / 4
