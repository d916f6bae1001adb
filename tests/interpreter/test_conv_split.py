"""Sums of convolutions that are split into parts."""

from __future__ import annotations

import pytest
import torch
from convolutions import GUARDED, Call, numbers, torchs, use_small_tiles, whole_tensors
from guard import call_plainly, run_guarded, same_bits
from torch import Tensor

from fastops.kernels import configs, conv


@pytest.mark.parametrize("name", ["3 to 8 channels", "depthwise", "groups", "1d", "3d"])
def test_splits_of_the_gradient_of_the_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of parts has one sum, and the same bits each time: also where some parts would be empty."""
    use_small_tiles(monkeypatch)
    options = GUARDED[name][2]

    def grad_weight(call: Call, input: Tensor, weight: Tensor, grad_output: Tensor) -> Tensor:
        shapes = tuple(input.shape), tuple(weight.shape)
        options_of_all = (*numbers(weight.shape, options), False, torch.contiguous_format)
        return call(conv.conv_backward, grad_output, input, None, None, *shapes, *options_of_all)[1]

    input, weight, bias, grad_output = whole_tensors(name)
    expected = torchs(options, False, input, weight, bias, grad_output)[2]
    for splits in (1, 2, 3, 100):
        monkeypatch.setattr(conv, "inner_splits", lambda *_, splits=splits: splits)
        configs.forget_plans()
        call = run_guarded if splits == 3 else call_plainly
        assert torch.equal(grad_weight(call, input, weight, grad_output), expected)
    rounded = input + torch.randn(input.shape), weight, grad_output + torch.randn(grad_output.shape)
    first, second = (grad_weight(call_plainly, *rounded) for _ in range(2))
    assert same_bits(first, second), "not deterministic"
