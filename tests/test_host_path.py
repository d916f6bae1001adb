"""How many of our own Python functions a repeated call enters: the host must be faster than small kernels are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from interpreter.launches import replace_launch
from torch import Tensor

import fastops
from fastops.kernels import add_relu, batch_norm, bce, conv, cross_entropy, elementwise, linear, max_pool
from fastops.kernels.activation import RELU
from fastops.kernels.launch import Plan
from fastops.kernels.pair_loss import pair_loss, pair_loss_backward

OWN = str(Path(fastops.__file__).parent)  # with the kernels, which are linked there


def own_calls(call: Callable[[], object]) -> list[str]:
    """The functions of the package, and launches, that ``call`` enters when it is called for the second time."""
    entered: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename.startswith(OWN) or code is launch.__code__):
            entered.append(code.co_name)

    call()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def launch(plan: Plan, *tensors: Tensor) -> None:
    """In the place of the one that starts a kernel."""


@pytest.fixture
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    replace_launch(monkeypatch, launch)
    monkeypatch.setattr(elementwise, "elementwise_config", lambda *_: (16, 1))  # several programs, whose sums are added


x, w, b, y = torch.ones(100, 64), torch.ones(32, 64), torch.ones(32), torch.ones(100, 32)
channel = torch.ones(8)
image, kernel, output = torch.ones(2, 8, 9, 9), torch.ones(32, 8, 3, 3), torch.ones(2, 32, 7, 7)
options = (1, 1), (0, 0), (1, 1), 1
backward = output, image, kernel, output, image.shape, kernel.shape, *options, True
logits, classes = torch.ones(2048, 1024, 1), torch.zeros(2048, 1, dtype=torch.int64)
row, one = torch.ones(2048, 1), torch.ones(())
window, pooled = ((2, 2), (2, 2), (0, 0), (1, 1), False), torch.ones(2, 8, 4, 4)
contiguous, last = torch.contiguous_format, torch.channels_last
backward_last = *(tensor.to(memory_format=last) for tensor in backward[:4]), *backward[4:]
LIMITS: dict[str, tuple[Callable[[], object], int]] = {
    "linear": (lambda: linear.linear(x, w, b, RELU), 4),
    "linear, activation": (lambda: linear.linear(x, w, b, ("gelu",), y), 5),
    "linear_backward": (lambda: linear.linear_backward(y, x, w, y, True), 10),
    "linear_backward, vendor": (lambda: linear.linear_backward(y, x, w, y, True, vendor=True), 7),
    "conv": (lambda: conv.conv(image, kernel, b, *options, RELU, contiguous), 8),
    "conv, channels last": (lambda: conv.conv(image, kernel, b, *options, RELU, last), 8),
    "conv_backward": (lambda: conv.conv_backward(*backward, contiguous), 13),
    "conv_backward, channels last": (lambda: conv.conv_backward(*backward_last, last), 15),
    "conv_backward, vendor": (lambda: conv.conv_backward(*backward_last, last, vendor=True), 11),
    "add_relu": (lambda: add_relu.add_relu(x, x), 4),
    "add_relu_backward": (lambda: add_relu.add_relu_backward(x, x), 4),
    "batch_norm_act": (lambda: batch_norm.batch_norm_act(image, *(None,) * 7, 0.1, 1e-5, "relu", [], False), 10),
    "batch_norm_act_backward": (
        lambda: batch_norm.batch_norm_act_backward(
            *(image, image, None, None, None, channel, channel, image, channel, True, 1e-5, False, False, "relu", []),
            *(True, False, False, False),
        ),
        10,
    ),
    "relu_max_pool": (lambda: max_pool.relu_max_pool(image, *window, True), 7),
    "relu_max_pool_backward": (
        lambda: max_pool.relu_max_pool_backward(pooled, pooled.byte(), image.shape, *window, False),
        6,
    ),
    "pair_loss": (lambda: pair_loss("huber_loss", x, x, "mean", 0.3), 6),
    "pair_loss_backward": (lambda: pair_loss_backward("huber_loss", one, x, x, "mean", 0.3, True, True), 6),
    "bce": (lambda: bce.bce(x, x, None, None, "mean"), 6),
    "bce_backward": (lambda: bce.bce_backward(one, x, x, None, None, "mean", True, False), 6),
    "cross_entropy": (lambda: cross_entropy.cross_entropy(logits, classes, None, "mean", -100, 0.0), 6),
    "cross_entropy_backward": (
        lambda: cross_entropy.cross_entropy_backward(
            one, logits, classes, None, row, one, "mean", -100, 0.0, True, False
        ),
        6,
    ),
}


@pytest.mark.usefixtures("nothing_is_launched")
@pytest.mark.parametrize("launcher", LIMITS)
def test_launchers(launcher: str) -> None:
    call, limit = LIMITS[launcher]
    entered = own_calls(call)
    assert "launch" in entered and len(entered) <= limit, entered
