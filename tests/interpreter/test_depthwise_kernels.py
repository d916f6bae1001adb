"""The depthwise kernels in the interpreter, through `conv` and `conv_backward`, which take them by themselves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from guard import call_plainly, run_guarded, same_bits
from launches import replace_launch
from torch import Tensor

from fastops.kernels import configs, conv, depthwise
from fastops.kernels.activation import NONE, RELU, Activation
from fastops.kernels.geometry import conv_output_size
from fastops.kernels.launch import launch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TORCHS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Case(NamedTuple):
    """A depthwise convolution; one number stands for all dimensions."""

    batch: int
    channels: int
    multiplier: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1

    @property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """Stride, padding and dilation of every dimension."""
        n = len(self.size)
        each = self.stride, self.padding, self.dilation
        return tuple((value,) * n if isinstance(value, int) else value for value in each)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of input, weight, bias and output."""
        outputs = self.channels * self.multiplier
        size = conv_output_size(self.size, self.kernel, *self.options)
        shapes = (self.batch, self.channels, *self.size), (outputs, 1, *self.kernel), (outputs,)
        return *shapes, (self.batch, outputs, *size)


CASES = {
    "3x3": Case(2, 8, 1, (7, 9), (3, 3), 1, 1),
    "width 11": Case(1, 3, 1, (3, 11), (3, 3), 1, 1),  # no patch of the gradient of the weight divides it
    "stride 2": Case(1, 13, 1, (7, 10), (3, 3), 2, 1),
    "strides": Case(2, 3, 1, (9, 11), (3, 2), (3, 2), (0, 1)),
    "stride beyond kernel": Case(2, 8, 1, (9, 8), (2, 1), 3),
    "stride beyond a patch": Case(1, 3, 1, (21, 23), (3, 4), 10, 2),
    "padding beyond kernel": Case(1, 8, 1, (3, 2), (2, 2), 1, 4),
    "dilation": Case(1, 8, 1, (9, 8), (3, 3), 1, 2, 2),
    "dilation and stride": Case(2, 3, 1, (9, 10), (3, 3), 4, 3, 2),
    "dilation and another stride": Case(1, 3, 1, (12, 13), (3, 4), 2, 3, 3),
    "5x5": Case(1, 3, 1, (6, 9), (5, 5), 1, 2),
    "row of 18 taps": Case(1, 3, 1, (1, 20), (1, 18), 2, 3),
    "1x1": Case(2, 8, 1, (3, 5), (1, 1), 2),
    "twice as many outputs": Case(2, 8, 2, (5, 6), (3, 3), 1, 1),
    "three times as many outputs": Case(1, 3, 3, (6, 5), (3, 2), 2, 1),
    "three times as many, stride beyond a patch": Case(1, 2, 3, (19, 20), (2, 3), 9, 1),
    "more channels than stand side by side": Case(1, 48, 1, (3, 4), (3, 2), 1, 1),
    "two channels": Case(1, 2, 1, (4, 4), (3, 3), 1, 1),
    "1d": Case(2, 13, 1, (19,), (5,), 2, 2),
    "3d": Case(1, 8, 1, (3, 4, 5), (3, 3, 3), 1, 1),
    "3d, stride 2": Case(2, 3, 2, (4, 5, 6), (3, 2, 3), 2, (1, 0, 1)),
}


@pytest.fixture
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Large patches in several programs, and the table's small ones in one program."""
    if request.param == "small":
        monkeypatch.setattr(depthwise, "_LEAST_LANES", 1)
        monkeypatch.setattr(depthwise, "_lanes", lambda _: {"BLOCK": 64})
    return request.param


def whole_numbers(shape: Sequence[int]) -> Tensor:
    """Values whose products and sums are exact in float32 in any order."""
    return torch.randint(-4, 5, tuple(shape)).float()


def tensors_of(case: Case, make: Callable[[Sequence[int]], Tensor] = whole_numbers) -> tuple[Tensor, ...]:
    """``(x, w, b, gy)``."""
    return tuple(make(shape) for shape in case.shapes)


def ours(
    call: Callable[..., Any], case: Case, tensors: Sequence[Tensor | None], relu: bool, last: bool = False
) -> tuple[Tensor, ...]:
    """``(y, gx, gw, gb)`` of the kernels."""
    input, weight, bias, grad_output = tensors
    assert input is not None and weight is not None
    n = len(case.size)
    words = *case.options, case.channels
    layout = CHANNELS_LAST[n] if last and n > 1 else torch.contiguous_format
    output = call(conv.conv, input, weight, bias, *words, RELU if relu else NONE, layout)
    mask = output if relu else None
    return output, *call(conv.conv_backward, grad_output, input, weight, mask, *case.shapes[:2], *words, True, layout)


def torchs(case: Case, relu: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``(y, gx, gw, gb)`` of torch."""
    *leaves, grad_output = (tensor.detach().requires_grad_() for tensor in tensors)
    output = TORCHS[len(case.size)](*leaves, *case.options, case.channels)
    output = torch.relu(output) if relu else output
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("programs", "last"), [("small", False), ("table", True)], indirect=["programs"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_touch_nothing_else(name: str, last: bool, programs: str) -> None:
    """Poisoned memory, checked addresses, and exact results; channels last with tensors that have gaps."""
    tensors = tensors_of(CASES[name])
    spread = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in tensors] if last else tensors
    found = ours(run_guarded, CASES[name], spread, not last, last)
    for result, expected in zip(found, torchs(CASES[name], not last, *tensors), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["3x3", "three times as many outputs", "3d"])
def test_expanded_gradient(name: str) -> None:
    *tensors, grad_output = tensors_of(CASES[name])
    grad_output = grad_output.flatten()[:1].view((1,) * grad_output.dim()).expand(grad_output.shape)
    found = ours(run_guarded, CASES[name], (*tensors, grad_output), True)
    assert all(map(torch.equal, found, torchs(CASES[name], True, *tensors, grad_output)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3", "strides", "twice as many outputs", "row of 18 taps", "3d"])
def test_as_accurate_as_torch(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "_LEAST_LANES", 1)

    def make(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape)).to(dtype)

    runs = []
    for _ in range(2):
        input, weight, bias, grad_output = tensors_of(CASES[name], make)
        grad_output = grad_output.mul(8).round().clamp(-16, 16).div(8)  # the sums of the bias are exact
        tensors = input, weight, bias, grad_output
        runs.append((ours(call_plainly, CASES[name], tensors, True), tensors))
    assert_as_accurate_as_torch(functools.partial(torchs, CASES[name], True), *runs)


@pytest.mark.parametrize("name", ["3x3", "stride 2", "three times as many, stride beyond a patch", "3d"])
def test_positions_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU's memory can hold runs with 64-bit positions: here they must change nothing."""
    tensors = tensors_of(CASES[name], torch.randn)
    narrow = ours(call_plainly, CASES[name], tensors, True)
    monkeypatch.setattr(depthwise, "is_large", lambda *_: True)
    configs.forget_plans()
    assert same_bits(ours(run_guarded, CASES[name], tensors, True), narrow)


# Values that are no numbers -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["width 11", "strides", "dilation and stride", "twice as many outputs", "3d"])
def test_nan_and_inf_of_the_input_spread_as_in_torch(name: str, place: str, value: float) -> None:
    """At the edges too: a patch that reaches beyond multiplies nothing by it."""
    tensors = tensors_of(CASES[name], lambda shape: torch.randn(tuple(shape)).abs() + 0.5)
    at = {"first": lambda _: 0, "middle": lambda size: (size - 1) // 2, "last": lambda size: size - 1}[place]
    tensors[0][0, 0][tuple(at(size) for size in CASES[name].size)] = value
    found = ours(call_plainly, CASES[name], tensors, True)
    for result, expected in zip(found, torchs(CASES[name], True, *tensors), strict=True):
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["width 11", "strides", "stride beyond a patch", "twice as many outputs", "3d"])
def test_nan_of_the_gradient_spreads_to_the_input_as_in_torch(name: str) -> None:
    input, weight, bias, grad_output = tensors_of(CASES[name], lambda shape: torch.randn(tuple(shape)).abs() + 0.5)
    grad_output[0, 0][tuple(size // 2 for size in grad_output.shape[2:])] = float("nan")
    found = ours(call_plainly, CASES[name], (input, weight, bias, grad_output), False)[1]
    torch.testing.assert_close(found, torchs(CASES[name], False, input, weight, bias, grad_output)[1], equal_nan=True)


# What runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["width 11", "twice as many outputs", "3d"])
def test_any_number_of_parts_has_one_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bits each time: also where some parts would be empty."""
    tensors = tensors_of(CASES[name])
    expected = torchs(CASES[name], False, *tensors)[2]
    monkeypatch.setattr(depthwise, "_lanes", lambda _: {"BLOCK": 64})
    for parts in (1, 3, 100):
        monkeypatch.setattr(depthwise, "parts_of", lambda *_, parts=parts: parts)
        configs.forget_plans()
        call = run_guarded if parts == 3 else call_plainly
        assert torch.equal(ours(call, CASES[name], tensors, False)[2], expected)
    rounded = [tensor + torch.randn(tensor.shape) for tensor in tensors]
    first, second = (ours(call_plainly, CASES[name], rounded, False)[2] for _ in range(2))
    assert same_bits(first, second), "not deterministic"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would be launched: none runs."""
    names: list[str] = []
    replace_launch(monkeypatch, lambda plan, *_: names.append(plan.kernel.__name__))
    return names


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3)), ids=str)
def test_only_what_is_needed_is_computed(
    needed: tuple[bool, bool, bool], parts: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch forward; backward one for each gradient, and a sum only where there are parts."""
    monkeypatch.setattr(depthwise, "parts_of", lambda *_: parts)
    monkeypatch.setattr(depthwise, "_lanes", lambda _: {"BLOCK": 64})
    case, layout = CASES["3x3"], torch.channels_last
    input, weight, bias, grad_output = (
        t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors_of(case)
    )
    words = *case.options, case.channels
    conv.conv(input, weight, bias, *words, RELU, layout)
    assert launched == ["depthwise_kernel"]
    launched.clear()
    for_input, for_weight, for_bias = needed
    given = input if for_weight else None, weight if for_input else None, None
    results = conv.conv_backward(grad_output, *given, *case.shapes[:2], *words, for_bias, layout)
    assert tuple(result is not None for result in results) == needed
    sums = ["depthwise_grad_weight_kernel", "depthwise_sum_kernel"][:parts]
    expected = ["depthwise_grad_input_kernel"] * for_input + sums * for_weight
    assert [name for name in launched if name != "activation_backward_kernel"] == expected
    assert ("activation_backward_kernel" in launched) == for_bias


def test_one_input_channel_for_all_outputs_is_no_depthwise_convolution(launched: list[str]) -> None:
    conv.conv(
        torch.ones(1, 1, 4, 4), torch.ones(3, 1, 2, 2), None, (1, 1), (0, 0), (1, 1), 1, RELU, torch.channels_last
    )
    assert launched == ["conv_kernel"]


@pytest.mark.parametrize("activation", [NONE, RELU, ("gelu",), ("leaky_relu", 0.25)], ids=str)
def test_any_activation(activation: Activation) -> None:
    """In the epilogue, with and without the results before it beside the output."""
    case = CASES["3x3"]
    input, weight, bias, _ = tensors_of(case, torch.randn)
    before = TORCHS[2](input, weight, bias, *case.options, case.channels)
    after: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda z: z,
        "relu": torch.relu,
        "gelu": F.gelu,
        "leaky_relu": lambda z: F.leaky_relu(z, 0.25),
    }
    kind = input.device, input.dtype, "ieee"
    sizes = conv.Sizes.of(kind, case.shapes[:2], (*case.options, case.channels))
    for saves in (True, False):
        output, saved = (torch.full_like(before.movedim(1, -1).contiguous(), 7.0) for _ in range(2))
        plan = depthwise.forward_plan(kind, sizes, (True, activation, saves))
        launch(plan, conv.channels_last(input, case.channels), weight, bias, output, saved)
        torch.testing.assert_close(output.movedim(-1, 1), after[activation[0]](before))
        torch.testing.assert_close(saved.movedim(-1, 1), before if saves else torch.full_like(before, 7.0))


@pytest.mark.parametrize(
    ("kernel", "stride", "width", "lanes", "back", "patch"),
    [
        (3, 1, 112, 1 << 20, False, 8),
        (3, 1, 28, 1 << 20, False, 7),  # four of them
        (3, 1, 7, 1 << 20, True, 7),
        (3, 1, 112, 1 << 15, False, 4),  # there would be too few
        (3, 1, 112, 100, False, 1),
        (3, 2, 112, 1 << 20, True, 8),
        (3, 2, 7, 1 << 20, True, 8),  # a multiple of the stride, also beyond the row
        (3, 3, 112, 1 << 20, True, 6),
        (16, 1, 112, 1 << 20, False, 8),
        (17, 1, 112, 1 << 20, False, 0),
        (3, 9, 112, 1 << 20, True, 0),
        (3, 9, 112, 1 << 20, False, 8),
    ],
)
def test_patches(kernel: int, stride: int, width: int, lanes: int, back: bool, patch: int) -> None:
    assert depthwise.patch_of(kernel, stride, width, lanes, back) == patch
