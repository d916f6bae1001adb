"""The convolution kernels in the interpreter."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from convolutions import (
    DTYPES,
    GUARDED,
    LAYOUTS,
    TORCHS,
    forward_and_backward,
    memory_format,
    numbers,
    strides_that_count,
    torchs,
    use_small_tiles,
    whole_numbers,
    whole_tensors,
)
from guard import call_plainly, run_guarded, same_bits
from torch import Tensor

import fastops
import fastops.functional as FF
from fastops.kernels import configs, conv
from fastops.kernels.activation import NONE, RELU
from fastops.kernels.channels_last import channels_last_plan


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.fixture(params=["small", "table"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small tiles, and those of the table, which hold all of a small convolution."""
    if request.param == "small":
        use_small_tiles(monkeypatch)
    return request.param


# Every option against torch -------------------------------------------------------------------------------------------


DIMENSIONS = (1, 2, 3)
KERNELS: dict[int, tuple[int | tuple[int, ...], ...]] = {
    1: (1, 2, 3, 5, 7),
    2: (1, 2, 3, 5, 7, (3, 2)),
    3: (1, 2, 3, (3, 2, 1)),
}
STRIDES = (1, 2, 3)
PADDINGS = (0, 1, "same", "valid")
DILATIONS = (1, 2)
GROUPS = ("1", "2", "channels")
# Channels of a group, and output channels of a group; for as many groups as channels the second alone counts.
CHANNELS = ((2, 3), (8, 4), (5, 1), (3, 8), (32, 4), (4, 33), (48, 17))


MOST_STEPS = 24  # of small tiles: the interpreter takes a second for a few hundred


class Setting(NamedTuple):
    """One convolution of the sampled product."""

    dimensions: int
    kernel: int | tuple[int, ...]
    stride: int
    padding: int | str
    dilation: int
    groups: str
    layout: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        kernel = self.kernel if isinstance(self.kernel, int) else "x".join(map(str, self.kernel))
        numbers = f"k{kernel}-s{self.stride}-p{self.padding}-d{self.dilation}-g{self.groups}"
        return f"{self.dimensions}d-{numbers}-{self.layout}-{str(self.dtype)[6:]}"


def all_settings() -> Iterator[Setting]:
    for dimensions in DIMENSIONS:
        axes = (KERNELS[dimensions], STRIDES, PADDINGS, DILATIONS, GROUPS, LAYOUTS, DTYPES)
        for values in itertools.product(*axes):
            setting = Setting(dimensions, *values)
            if setting.padding != "same" or setting.stride == 1:  # as torch has it
                yield setting


SETTINGS = tuple(all_settings())
SAMPLE = random.Random(0).sample(SETTINGS, 64)


def check_setting(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients against torch. The setting itself draws what is left to choose."""
    draw = random.Random(setting.name)
    n = setting.dimensions
    kernel = (setting.kernel,) * n if isinstance(setting.kernel, int) else setting.kernel
    per_group, out_per_group = draw.choice(CHANNELS)
    groups = int(setting.groups) if setting.groups != "channels" else draw.choice((3, 5))
    if setting.groups == "channels":
        per_group, out_per_group = 1, min(out_per_group, 3)
    batch, relu, has_bias = draw.choice((1, 2)), draw.random() < 0.5, draw.random() < 0.75
    padding = setting.padding if isinstance(setting.padding, int) else 0
    least = (setting.dilation * (k - 1) + 1 - 2 * padding for k in kernel)
    size = tuple(max(1, number) + draw.choice(((3, 4, 6), (1, 2, 3), (0, 1, 2))[n - 1]) for number in least)
    draws = max(1, 32 // (groups * out_per_group * per_group * math.prod(kernel)))
    numbers = batch * math.prod(size), max(per_group, out_per_group), per_group * math.prod(kernel)
    if draws * groups * math.prod(-(-number // 16) for number in numbers) <= MOST_STEPS:
        use_small_tiles(monkeypatch)

    make = LAYOUTS[setting.layout]
    out_channels = groups * out_per_group
    shapes = (batch, groups * per_group, *size), (out_channels, per_group, *kernel)
    options = {"stride": setting.stride, "padding": setting.padding, "dilation": setting.dilation, "groups": groups}

    def results(function: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *leaves, grad_output = (None if t is None else t.detach().requires_grad_() for t in tensors)
        output = function(*leaves, **options)
        output = torch.relu(output) if relu and function is TORCHS[n] else output
        return output.detach(), *torch.autograd.grad(output, [t for t in leaves if t is not None], grad_output)

    def run() -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        input, weight = (make(shape).to(setting.dtype) for shape in shapes)
        bias = torch.randn(out_channels).to(setting.dtype) if has_bias else None
        output = TORCHS[n](input, weight, None, **options)
        # Eighths: the few sums that are the gradient of the bias are exact, and no luck decides about them.
        grad_output = make(output.shape).mul(8).round().clamp(-16, 16).div(8).to(setting.dtype)
        tensors = input, weight, bias, grad_output
        with fastops.backend("triton"):
            return results(getattr(FF, f"conv_relu{n}d" if relu else f"conv{n}d"), *tensors), tensors

    reference = functools.partial(results, TORCHS[n])
    assert_as_accurate_as_torch(reference, *(run() for _ in range(draws)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("setting", SAMPLE, ids=lambda setting: setting.name)
def test_sample_of_all_options(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    check_setting(setting, monkeypatch)


def test_sample_has_every_value_of_every_option() -> None:
    for sampled, every in zip(zip(*SAMPLE, strict=True), zip(*SETTINGS, strict=True), strict=True):
        assert set(sampled) == set(every)
    assert {(s.dimensions, s.kernel) for s in SAMPLE} == {(s.dimensions, s.kernel) for s in SETTINGS}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options(dtype: torch.dtype, dimensions: int) -> None:
    for setting in SETTINGS:
        if (setting.dtype, setting.dimensions) == (dtype, dimensions):
            with pytest.MonkeyPatch.context() as monkeypatch:
                check_setting(setting, monkeypatch)


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", GUARDED)
def test_kernels_touch_nothing_else(name: str, last: bool, tiles: str) -> None:
    """Poisoned memory, checked addresses, and exact results."""
    input, weight, bias, grad_output = whole_tensors(name)
    options, relu = GUARDED[name][2], not last
    tensors = input, weight, bias, grad_output
    if last:
        spread = [torch.zeros(*t.shape[:-1], 2 * t.shape[-1]) for t in tensors]
        for wide, tensor in zip(spread, tensors, strict=True):
            wide[..., ::2] = tensor
        tensors = tuple(wide[..., ::2] for wide in spread)
    found = forward_and_backward(run_guarded, tensors, options, relu, last)
    for ours, theirs in zip(found, torchs(options, relu, input, weight, bias, grad_output), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("relu", [True, False])
def test_more_positions_than_a_program_brings_to_channels_last(relu: bool) -> None:
    """On the way it applies the ReLU's mask and sums up the bias's gradient, which then has several parts a sample."""
    shapes = (2, 3, 9000), (2, 3, 1), (2,), (2, 2, 9000)
    plan = channels_last_plan((torch.device("cpu"), torch.float32), shapes[3], (18000, 9000, 1), 2, need_sum=True)
    assert plan[1] > shapes[3][0]
    tensors = [whole_numbers(shape) for shape in shapes]
    found = forward_and_backward(run_guarded, tensors, {}, relu)
    for ours, theirs in zip(found, torchs({}, relu, *tensors), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3 to 8 channels", "pointwise", "depthwise"])
def test_activation(name: str, dtype: torch.dtype, last: bool, tiles: str) -> None:
    """Of the result before it is rounded; what is saved is the result as it is without an activation."""
    input, weight, bias, grad_output = (tensor.to(dtype) for tensor in whole_tensors(name, torch.randn))
    of_all, layout = numbers(weight.shape, GUARDED[name][2]), memory_format(2, last)
    before = torch.full_like(grad_output, torch.nan).movedim(1, -1).contiguous().movedim(-1, 1)
    options = *of_all, ("silu",), layout
    output = run_guarded(lambda *given: conv.conv(*given, *options, before), input, weight, bias)
    plain = conv.conv(input, weight, bias, *of_all, NONE, layout)
    assert same_bits(before.contiguous(), plain.contiguous())
    assert same_bits(output, conv.conv(input, weight, bias, *options))
    rest = tuple(input.shape), tuple(weight.shape), *of_all, True, layout, ("silu",)
    found = run_guarded(lambda *given: conv.conv_backward(*given, *rest), grad_output, input, weight, before)
    vendors = conv.conv_backward(grad_output, input, weight, before, *rest, vendor=True)

    def torchs(*tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, upstream = (tensor.detach().requires_grad_() for tensor in tensors)
        z = F.conv2d(*leaves, **GUARDED[name][2])
        return F.silu(z).detach(), *torch.autograd.grad(F.silu(z), leaves, upstream)

    for gradients in (found, vendors):
        assert_as_accurate_as_torch(torchs, ((output, *gradients), (input, weight, bias, grad_output)))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", ["3 to 8 channels", "24 to 13 channels", "groups", "1d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_as_they_lie_and_channels_last(
    name: str, dtype: torch.dtype, last: bool, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contiguous weight has one result whether kernels read it as it lies or a copy, and whatever layout that has."""
    tensors = tuple(tensor.to(dtype) for tensor in whole_tensors(name, torch.randn))
    as_it_lies = forward_and_backward(run_guarded, tensors, GUARDED[name][2], True, last)
    monkeypatch.setattr(conv, "_FEW_POSITIONS", 0)
    configs.forget_plans()
    assert same_bits(forward_and_backward(call_plainly, tensors, GUARDED[name][2], True, last), as_it_lies)
    input, weight, *others = tensors
    weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    found = forward_and_backward(call_plainly, (input, weight, *others), GUARDED[name][2], True, last)
    assert same_bits(found, as_it_lies)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["3 to 8 channels", "depthwise", "dilation and stride", "3d"])
def test_positions_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU's memory can hold runs with 64-bit positions: here they must change nothing."""
    tensors, options = whole_tensors(name, torch.randn), GUARDED[name][2]
    narrow = forward_and_backward(call_plainly, tensors, options, True)
    monkeypatch.setattr(conv, "is_large", lambda *_: True)
    configs.forget_plans()
    assert same_bits(forward_and_backward(run_guarded, tensors, options, True), narrow)


@pytest.mark.parametrize("stride", [1, 2], ids=["output", "input"])
@pytest.mark.parametrize(("missing", "large"), [(1, False), (0, True)])
def test_positions_take_64_bits_where_they_must(stride: int, missing: int, large: bool) -> None:
    """Those of the larger one: of the output with padding, of the input with a stride."""
    positions = 2**31 - 2**12 - missing
    size = positions if stride == 2 else positions - 2
    shapes = (1, 8, size), (8, 8, 3)
    options = (stride,), (1 if stride == 2 else 2,), (1,), 1
    kind = torch.device("cpu"), torch.float32, "ieee"
    layouts = True, True
    forward = conv.conv_plan(kind, shapes, options, layouts, (False, NONE, False))
    assert max(size, forward.shape[2]) == positions
    backward = conv.conv_backward_plan(kind, shapes, options, NONE, (True, True, False), layouts)
    plans = [plan for plan in (forward.product, backward.for_input, backward.for_weight) if plan is not None]
    assert [plan.product.constants["LARGE"] for plan in plans] == [large] * 3


# The vendor's gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", ["24 to 13 channels", "pointwise", "groups", "depthwise", "1d", "3d"])
def test_vendors_gradients(name: str, relu: bool, last: bool) -> None:
    """Exact, and in the layouts that those of the kernels have, whatever the layouts of the operands are."""
    *tensors, grad_output = whole_tensors(name)
    _, *expected = torchs(GUARDED[name][2], relu, *tensors, grad_output)
    layout, of_all = memory_format(tensors[0].dim() - 2, last), numbers(tensors[1].shape, GUARDED[name][2])
    shapes = tuple(tensors[0].shape), tuple(tensors[1].shape)
    output = conv.conv(*tensors, *of_all, RELU if relu else NONE, layout) if relu else None
    for spread in (False, True):
        given = [grad_output, *tensors[:2], output]
        if spread:
            given = [None if t is None else torch.stack((t, t), -1)[..., 0] for t in given]
        words = *given, *shapes, *of_all, True, layout
        found = run_guarded(functools.partial(conv.conv_backward, vendor=True), *words)
        assert all(map(torch.equal, found, expected))
        assert list(map(strides_that_count, found)) == list(map(strides_that_count, conv.conv_backward(*words)))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vendors_gradients_in_every_dtype(dtype: torch.dtype, last: bool) -> None:
    def reference(input: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor, output: Tensor) -> Sequence[Tensor]:
        masked = torch.where(output <= 0, 0, grad_output)
        return torchs({"padding": 1}, False, input, weight, bias, masked)[1:]

    shapes = (2, 8, 6, 5), (16, 8, 3, 3), (16,), (2, 16, 6, 5), (2, 16, 6, 5)
    runs = []
    for _ in range(8):
        input, weight, _, grad_output, output = tensors = tuple(torch.randn(shape).to(dtype) for shape in shapes)
        words = grad_output, input, weight, output, input.shape, weight.shape, *numbers(weight.shape, {"padding": 1})
        runs.append((conv.conv_backward(*words, True, memory_format(2, last), vendor=True), tensors))
    assert_as_accurate_as_torch(reference, *runs)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["24 to 13 channels", "3 to 8 channels", "depthwise", "groups", "1d", "3d"])
def test_the_only_part_is_the_gradient_of_the_weight(name: str, dtype: torch.dtype, last: bool, tiles: str) -> None:
    """In the layout and the dtype of the result, rounded once, and nothing written beside it."""
    *whole, grad_output = whole_tensors(name)
    options = GUARDED[name][2]
    expected = torchs(options, False, *whole, grad_output)[2].to(dtype)
    input, grad_output, weight = (tensor.to(dtype) for tensor in (whole[0], grad_output, whole[1]))
    words = grad_output, input, None, None, tuple(input.shape), tuple(weight.shape), *numbers(weight.shape, options)
    layout = memory_format(weight.dim() - 2, last)
    _, found, _ = run_guarded(conv.conv_backward, *words, False, layout)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=layout)


# Values that are no numbers -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3 to 8 channels", "groups", "stride beyond kernel", "dilation and stride", "3d"])
def test_nan_and_inf_of_the_input_spread_as_in_torch(name: str, value: float, tiles: str) -> None:
    tensors, options = whole_tensors(name, lambda shape: torch.randn(shape).abs() + 0.5), GUARDED[name][2]
    tensors[0][0, 0][tuple((size - 1) // 2 for size in tensors[0].shape[2:])] = value
    found = forward_and_backward(call_plainly, tensors, options, True)
    for ours, theirs in zip(found, torchs(options, True, *tensors), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["3 to 8 channels", "groups", "stride beyond kernel", "dilation and stride", "3d"])
def test_nan_of_the_gradient_spreads_to_the_input_as_in_torch(name: str, tiles: str) -> None:
    input, weight, bias, grad_output = whole_tensors(name, lambda shape: torch.randn(shape).abs() + 0.5)
    options = GUARDED[name][2]
    grad_output[0, 0][tuple(size // 2 for size in grad_output.shape[2:])] = float("nan")
    shapes, of_all = (tuple(input.shape), tuple(weight.shape)), numbers(weight.shape, options)
    found, _, _ = conv.conv_backward(grad_output, None, weight, None, *shapes, *of_all, False, torch.contiguous_format)
    _, expected, _, _ = torchs(options, False, input, weight, bias, grad_output)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["3 to 8 channels", "pointwise", "groups"])
def test_gradient_through_relu_at_zero_and_nan_is_torchs(name: str) -> None:
    """NaN lets its gradient through; neither zero does."""
    input, weight, _, grad_output = whole_tensors(name)
    output = whole_numbers(grad_output.shape)
    output.view(-1)[:3] = torch.tensor([float("nan"), -0.0, 0.0])
    of_all, options = numbers(weight.shape, GUARDED[name][2]), GUARDED[name][2]
    shapes = tuple(input.shape), tuple(weight.shape)
    found = run_guarded(
        conv.conv_backward, grad_output, input, weight, output, *shapes, *of_all, True, torch.contiguous_format
    )
    masked = torch.ops.aten.threshold_backward(grad_output, output, 0)
    _, *expected = torchs(options, False, input, weight, torch.zeros(weight.shape[0]), masked)
    assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_relu_keeps_nan_and_drops_negative_zero() -> None:
    input = torch.tensor([[[float("nan"), -1.0, -0.0, 0.0, 2.0]]])
    output = conv.conv(input, torch.ones(1, 1, 1), None, (2,), (0,), (1,), 1, RELU, torch.contiguous_format)
    torch.testing.assert_close(output, torch.tensor([[[float("nan"), 0.0, 2.0]]]), rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(output[0, 0, 1])
