"""What the launchers of convolutions start, and in which layouts the results lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from convolutions import GUARDED, LAYOUTS, TORCHS, memory_format, numbers, strides_that_count, whole_tensors
from launches import replace_launch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import fastops
import fastops.functional as FF
from fastops.kernels import conv
from fastops.kernels.activation import RELU
from fastops.kernels.configs import ConvConfig

MASK_AND_SUM = "activation_backward_kernel"
TRANSPOSE = "channels_last_kernel"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would be launched: none runs."""
    names: list[str] = []
    replace_launch(monkeypatch, lambda plan, *_: names.append(plan.kernel.__name__))
    return names


@pytest.mark.parametrize(("channels", "groups", "common"), [((6, 4), 1, 2), ((12, 8), 1, 4), ((12, 8), 4, 2)])
def test_channels_decide_on_the_precision(
    channels: tuple[int, int], groups: int, common: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the weight's numbers of channels have in common, forward and backward."""
    asked: list[int] = []

    def input_precision(tensor: Tensor, op: str, number: int) -> str:
        asked.append(number)
        return "ieee"

    monkeypatch.setattr(conv, "input_precision", input_precision)
    outputs, inputs = channels
    x, w, gy = torch.randn(1, inputs, 5, 5), torch.randn(outputs, inputs // groups, 3, 3), torch.randn(1, outputs, 3, 3)
    options = (1, 1), (0, 0), (1, 1), groups
    conv.conv(x, w, None, *options, RELU, torch.contiguous_format)
    conv.conv_backward(gy, x, w, None, tuple(x.shape), tuple(w.shape), *options, False, torch.contiguous_format)
    assert launched and asked == [common] * 2


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("name", ["3 to 8 channels", "pointwise"])
def test_only_what_is_needed_is_computed(
    name: str, needed: tuple[bool, bool, bool], relu: bool, last: bool, launched: list[str]
) -> None:
    """In NCHW the mask also transposes, and the input does before the weight's gradient, as where it is padded."""
    layout = memory_format(2, last)
    whole = whole_tensors(name)
    input, weight, grad_output = (tensor.contiguous(memory_format=layout) for tensor in whole if tensor.dim() == 4)
    needs_input, needs_weight, needs_bias = needed
    results = conv.conv_backward(
        grad_output,
        input if needs_weight else None,
        weight if needs_input else None,
        grad_output if relu else None,
        tuple(input.shape),
        tuple(weight.shape),
        *numbers(weight.shape, GUARDED[name][2]),
        needs_bias,
        layout,
    )
    assert tuple(result is not None for result in results) == needed
    products = ["matmul_kernel"], ["matmul_kernel"]
    if name != "pointwise":
        products = ["conv_grad_input_kernel"], ["conv_grad_weight_kernel"]
    if not last or name != "pointwise":
        products[1].insert(0, TRANSPOSE)
    mask = [MASK_AND_SUM] * (relu or needs_bias) if last else [TRANSPOSE] + [MASK_AND_SUM] * needs_bias
    assert launched == mask + products[0] * needs_input + products[1] * needs_weight


@pytest.mark.parametrize("name", ["3 to 8 channels", "pointwise"])
def test_gradients_are_written_where_they_belong(name: str, launched: list[str]) -> None:
    """No copy follows the kernels."""
    whole = whole_tensors(name)
    input, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in whole if t.dim() == 4)
    shapes = tuple(input.shape), tuple(weight.shape)
    of_all = numbers(weight.shape, GUARDED[name][2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        conv.conv_backward(grad, input, weight, grad, *shapes, *of_all, True, torch.channels_last)
    assert launched and "aten::copy_" not in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3)), ids=str)
def test_vendors_gradients_leave_one_launch(
    needed: tuple[bool, bool, bool], relu: bool, last: bool, launched: list[str]
) -> None:
    """Channels last the mask and the sum, else the mask; no launch where there is neither."""
    layout = memory_format(2, last)
    whole = whole_tensors("3 to 8 channels")
    input, weight, grad_output = (tensor.contiguous(memory_format=layout) for tensor in whole if tensor.dim() == 4)
    words = input if needed[1] else None, weight if needed[0] else None, grad_output if relu else None
    of_all = numbers(weight.shape, GUARDED["3 to 8 channels"][2])
    shapes = tuple(input.shape), tuple(weight.shape)
    results = conv.conv_backward(grad_output, *words, *shapes, *of_all, needed[2], layout, vendor=True)
    assert tuple(result is not None for result in results) == needed
    assert all(result._base is None for result in results[:2] if result is not None)  # autograd wants no views
    if last:
        assert launched == [MASK_AND_SUM] * (relu or needed[2])
    else:
        assert launched == ["add_relu_backward_kernel"] * relu


@pytest.mark.parametrize("name", GUARDED)
def test_forward_is_one_launch(name: str, launched: list[str]) -> None:
    """Which reads the weight and writes the output as they lie; before it the input is padded if that is needed."""
    input, weight, bias, _ = whole_tensors(name)
    input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    options = numbers(weight.shape, GUARDED[name][2])
    conv.conv(input, weight, bias, *options, RELU, torch.contiguous_format)
    pads = weight.shape[1] % 4 != 0 and options[-1] == 1 < weight.shape[1] and name != "pointwise"
    special = {"pointwise": "matmul_kernel", "depthwise": "depthwise_kernel"}
    assert launched == [TRANSPOSE] * pads + [special.get(name, "conv_kernel")]


@pytest.mark.parametrize(
    ("kernel", "padding", "channels"), [(1, 0, 64), (1, 0, 128), (3, 1, 64), (3, 1, 128), (5, 2, 64)]
)
def test_gradient_of_a_strided_input_wastes_no_products(
    kernel: int, padding: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a tenth more multiply-adds than the pairs of an input position and a tap that meet an output position.

    With a GPU's tile. Of all taps of all input positions, as many as a gather over them would multiply, a quarter meets
    an output position: it would take four times the products.
    """
    executed = 0
    dot = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *others: Any) -> Any:
        nonlocal executed
        executed += math.prod(a.data.shape) * b.data.shape[1]
        return dot(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(conv, "conv_config", lambda *_: ConvConfig(128, 64, 64, 8, 3, False))
    input_shape, weight_shape = (4, channels, 32, 32), (channels, channels, kernel, kernel)
    grad = torch.ones(4, channels, 16, 16)
    options = numbers(weight_shape, {"stride": 2, "padding": padding})
    conv.conv_backward(
        grad, None, torch.ones(weight_shape), None, input_shape, weight_shape, *options, False, torch.channels_last
    )
    pairs = torch.nn.grad.conv2d_input((4, 1, 32, 32), torch.ones(1, 1, kernel, kernel), grad[:, :1], 2, padding).sum()
    useful = int(pairs) * channels**2
    assert useful <= executed <= 1.1 * useful


# Memory formats -------------------------------------------------------------------------------------------------------

FORMATS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    **LAYOUTS,
    "expanded": lambda shape: torch.randn(1, *shape[1:]).expand(*shape),
}
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((2, 3, 6), (4, 3, 3), {}),
    "2d": ((2, 3, 6, 5), (4, 3, 3, 3), {"padding": 1}),
    "3d": ((2, 3, 4, 3, 5), (4, 3, 2, 1, 3), {"stride": 2}),
    "pointwise": ((2, 3, 6, 5), (4, 3, 1, 1), {}),
    "one channel": ((2, 1, 6, 5), (4, 1, 3, 3), {}),
    "one output": ((2, 3, 6, 5), (1, 3, 3, 3), {}),
    "one position": ((2, 3, 3, 3), (4, 3, 3, 3), {}),
    "depthwise": ((2, 4, 6, 5), (4, 1, 3, 3), {"groups": 4}),
}


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_strides_are_torchs(shapes: str, input_format: str, weight_format: str) -> None:
    """Of the output and the gradients, for each layout of the input beside each of the weight.

    Two are left out, as they depend on which of its own kernels torch takes for so many threads: a permuted weight in
    one dimension, and a single sample in three.
    """
    input_shape, weight_shape, options = SHAPES[shapes]
    n = len(input_shape) - 2
    input, weight = FORMATS[input_format](input_shape), FORMATS[weight_format](weight_shape)
    if n == 1 and weight_format == "channels_last":
        return
    for given in (input, input[0]) if n < 3 else (input,):
        found = []
        for function in (getattr(FF, f"conv{n}d"), TORCHS[n]):
            leaves = given.detach().requires_grad_(), weight.detach().requires_grad_()
            with fastops.backend("triton"):
                output = function(*leaves, **options)
            gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
            found.append([strides_that_count(tensor) for tensor in (output, *gradients)])
        assert found[0] == found[1]
