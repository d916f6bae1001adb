"""The stateless API: drop-in replacements for functions of `torch.nn.functional`.

Signatures, shapes, dtypes, gradients and errors are torch's. Each function asks `fastops.dispatch` which way to go and
goes it: through a hand-written `torch.autograd.Function`, or through the torch expression under ordinary autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import dispatch
from .dispatch import autocast_dtype, under_autocast

# The Functions are imported where they are used: they register with TorchDynamo, whose import takes seconds and Triton.


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, as `torch.nn.functional.linear`.

    Args:
        input: [..., in_features], any number of leading dimensions, none too.
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features], in the inputs' dtype (autocast's where that is on).
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias=bias)
    if (dtype := autocast_dtype("linear", input)) is not None:
        return under_autocast(linear, dtype, input, weight, bias)
    way = dispatch.linear(input, weight, bias).backend
    if way == "torch":
        return F.linear(input, weight, bias)
    from .autograd.function import apply
    from .autograd.linear import Linear

    output: Tensor = apply(Linear, input, weight, bias, way)
    return output


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input @ weight.T + bias)`` in one kernel. NaN stays NaN, as in torch's ReLU.

    Args:
        input: [..., in_features], any number of leading dimensions, none too.
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features], in the inputs' dtype (autocast's where that is on).
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias=bias)
    if (dtype := autocast_dtype("linear_relu", input)) is not None:
        return under_autocast(linear_relu, dtype, input, weight, bias)
    way = dispatch.linear(input, weight, bias).backend
    if way == "torch":
        return F.linear(input, weight, bias).relu_()
    from .autograd.function import apply
    from .autograd.linear import LinearReLU

    output: Tensor = apply(LinearReLU, input, weight, bias, way)
    return output


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error, as `torch.nn.functional.mse_loss`; both arguments get gradients.

    Args:
        input: any shape.
        target: the same shape (another one is broadcast with torch's warning).
        size_average, reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"`` (one value per element), ``"mean"`` or ``"sum"`` (0-d).
        weight: one factor per element, or None.

    Raises:
        ValueError: if ``reduction`` is none of the three.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            mse_loss,
            (input, target, weight),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            weight=weight,
        )
    if (dtype := autocast_dtype("mse_loss", input)) is not None:
        return under_autocast(mse_loss, dtype, input, target, size_average, reduce, reduction, weight)
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    way = dispatch.mse_loss(input, target, reduction=reduction, weight=weight).backend
    if way == "torch":
        if weight is None and target.size() == input.size():  # what F.mse_loss comes to when nothing is broadcast
            number: Any = _Reduction.get_enum(reduction)  # torch's stubs take it for a string
            return torch._C._nn.mse_loss(input, target, number)
        return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    from .autograd.function import apply
    from .autograd.mse import MSELoss

    loss: Tensor = apply(MSELoss, input, target, reduction, way)
    return loss


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits, as `torch.nn.functional.cross_entropy`. The logits are never written to.

    Args:
        input: [C], [N, C] or [N, C, d1, ..., dk] logits.
        target: int64 class indices, the input's shape without C; or class probabilities in the input's shape, which get
            a gradient too.
        weight: [C] factor per class, or None.
        size_average, reduce: deprecated in torch, see ``reduction``.
        ignore_index: class index whose rows count nothing; any integer.
        reduction: ``"none"`` (one value per target), ``"mean"`` (over the weights of the targets that count) or
            ``"sum"``.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over the classes.

    Raises:
        IndexError: on the CPU, if a class index is out of range (a GPU asserts on the device, as torch does).
        RuntimeError, ValueError: torch's own, for mismatched shapes, dtypes, devices and options.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    options = (ignore_index, None, reduction, label_smoothing)
    if (dtype := autocast_dtype("cross_entropy", input)) is not None:
        return under_autocast(cross_entropy, dtype, input, target, weight, None, *options)
    way = dispatch.cross_entropy(input, target, weight, None, *options).backend
    if way == "torch":
        number: Any = _Reduction.get_enum(reduction)  # torch's stubs take it for a string
        return torch._C._nn.cross_entropy_loss(input, target, weight, number, ignore_index, label_smoothing)
    from .autograd.cross_entropy import CrossEntropy
    from .autograd.function import apply

    loss: Tensor = apply(CrossEntropy, input, target, weight, reduction, ignore_index, label_smoothing, way)[0]
    return loss
