"""Sums of convolutions that are split into parts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from convolutions import (
    DTYPES,
    GUARDED,
    TORCHS,
    Call,
    forward_and_backward,
    memory_format,
    numbers,
    torchs,
    use_small_tiles,
    whole_tensors,
)
from guard import call_plainly, run_guarded, same_bits
from torch import Tensor

from fastops.kernels import configs, conv, matmul
from fastops.kernels.activation import NONE, RELU

NAMES = (
    *("tile", "whole channels", "64 to 33 channels", "24 to 13 channels", "3 to 8 channels", "groups", "1d", "3d"),
    *("stride beyond kernel", "padding beyond kernel", "dilation", "dilation and stride"),
)


def use_parts(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Small tiles, and so many parts of every sum that has as many steps."""
    use_small_tiles(monkeypatch)
    for module in (conv, matmul):
        monkeypatch.setattr(module, "inner_splits", lambda *_: parts)
    configs.forget_plans()


@pytest.mark.parametrize("name", ["3 to 8 channels", "depthwise", "groups", "1d", "3d"])
def test_splits_of_the_gradient_of_the_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of parts has one sum, and the same bits each time: also where some parts would be empty."""
    options = GUARDED[name][2]

    def grad_weight(call: Call, input: Tensor, weight: Tensor, grad_output: Tensor) -> Tensor:
        shapes = tuple(input.shape), tuple(weight.shape)
        options_of_all = (*numbers(weight.shape, options), False, torch.contiguous_format)
        return call(conv.conv_backward, grad_output, input, None, None, *shapes, *options_of_all)[1]

    input, weight, bias, grad_output = whole_tensors(name)
    expected = torchs(options, False, input, weight, bias, grad_output)[2]
    for splits in (1, 2, 3, 100):
        use_parts(monkeypatch, splits)
        call = run_guarded if splits == 3 else call_plainly
        assert torch.equal(grad_weight(call, input, weight, grad_output), expected)
    rounded = input + torch.randn(input.shape), weight, grad_output + torch.randn(grad_output.shape)
    first, second = (grad_weight(call_plainly, *rounded) for _ in range(2))
    assert same_bits(first, second), "not deterministic"


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_output_and_the_gradient_of_the_input(
    name: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of parts has one sum, to which bias and ReLU are applied once; nothing else is read or written.

    Of the three steps of "tile" the second of two parts has one.
    """
    tensors, options = whole_tensors(name), GUARDED[name][2]
    expected = torchs(options, True, *tensors)
    for parts in (2, 100):
        use_parts(monkeypatch, parts)
        found = forward_and_backward(run_guarded, tensors, options, True, last)
        assert all(map(torch.equal, found, expected))
        assert found[0].is_contiguous(memory_format=memory_format(tensors[0].dim() - 2, last))
        assert found[1].is_contiguous(memory_format=memory_format(tensors[0].dim() - 2, last))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["groups", "dilation and stride", "1d", "3d"])
def test_parts_in_every_dtype(name: str, dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are not rounded: only their sum is, after the activation. What is saved is what there is without one."""
    use_parts(monkeypatch, 3)
    options = GUARDED[name][2]
    tensors = input, weight, bias, grad_output = [tensor.to(dtype) for tensor in whole_tensors(name, torch.randn)]
    of_all, layout = numbers(weight.shape, options), memory_format(weight.dim() - 2, last)
    before = torch.full_like(grad_output, torch.nan).movedim(1, -1).contiguous().movedim(-1, 1)
    output = run_guarded(lambda *given: conv.conv(*given, *of_all, ("silu",), layout, before), input, weight, bias)
    assert same_bits(before.contiguous(), conv.conv(input, weight, bias, *of_all, NONE, layout).contiguous())
    words = tuple(input.shape), tuple(weight.shape), *of_all, True, layout, ("silu",)
    gradients = run_guarded(lambda *given: conv.conv_backward(*given, *words), grad_output, input, weight, before)
    assert same_bits(gradients, conv.conv_backward(grad_output, input, weight, before, *words)), "not deterministic"

    def torchs(*tensors: Tensor) -> Sequence[Tensor]:
        *leaves, upstream = (tensor.detach().requires_grad_() for tensor in tensors)
        output = F.silu(TORCHS[weight.dim() - 2](*leaves, **options))
        return output.detach(), *torch.autograd.grad(output, leaves, upstream)

    assert_as_accurate_as_torch(torchs, ((output, *gradients), tensors))


# Batch, channels, size, output channels, kernel, stride; then into how many parts sums are split for the output and for
# the gradient of the input: channels last, and in NCHW, where up to 256 positions have steps of 32 instead of 128.
LAYERS: dict[str, tuple[tuple[int, int, int, int, int, int], tuple[int, int], tuple[int, int]]] = {
    "7x7": ((1, 512, 7, 512, 3, 1), (9, 9), (21, 21)),  # 36 steps, four for each part; 144, seven for each
    "7x7 of a batch": ((8, 512, 7, 512, 3, 1), (3, 3), (3, 3)),  # four would be more bytes than the operands are
    "14x14": ((1, 256, 14, 256, 3, 1), (3, 3), (3, 3)),  # likewise
    "28x28": ((1, 128, 28, 128, 3, 1), (1, 1), (1, 1)),  # and here two
    "many tiles": ((32, 256, 14, 256, 3, 1), (1, 1), (1, 1)),
    "9 steps": ((1, 64, 7, 512, 3, 1), (2, 9), (2, 24)),  # backward 36, and a single tile
    "stride 2": ((1, 256, 14, 512, 3, 2), (4, 4), (12, 6)),  # 18 steps; 16, 8, 8 and 4 in the four classes
    "pointwise, stride 2": ((1, 256, 14, 512, 1, 2), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS)
def test_sums_are_split_where_multiprocessors_would_idle(
    layer: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with 132 multiprocessors, and nowhere else."""
    for module in (configs, conv):
        monkeypatch.setattr(module, "architecture", lambda _: "sm90")
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 132)
    (batch, channels, size, outputs, kernel, stride), *expected = LAYERS[layer]
    kind = torch.device("cuda"), torch.bfloat16, "ieee"
    shapes = (batch, channels, size, size), (outputs, channels, kernel, kernel)
    options = numbers(shapes[1], {"stride": stride, "padding": kernel // 2})
    forward = conv.conv_plan(kind, shapes, options, (not last, last), (True, RELU, False)).product
    for_input = conv.conv_backward_plan(kind, shapes, options, RELU, (True, True, True), (not last, last)).for_input
    for plan, parts in zip((forward, for_input), expected[not last], strict=True):
        assert plan is not None
        assert plan.product.grid[1] == parts
        assert (plan.addition is not None) == plan.product.constants["SPLIT"] == (parts > 1)
        if parts > 1:
            assert plan.parts[0] == parts and plan.parts_dtype is torch.float32
            assert plan.product.numbers[0] >= 4  # steps
