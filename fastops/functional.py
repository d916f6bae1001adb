"""The stateless API: drop-in replacements for functions of `torch.nn.functional`.

Signatures, shapes, dtypes, gradients and errors are torch's. Each function asks `fastops.dispatch` which way to go and
goes it: through a hand-written `torch.autograd.Function`, or through the torch expression under ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd, dispatch, fit
from .dispatch import autocast_dtype, autocast_to, under_autocast


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
    output: Tensor = autograd.function.apply(autograd.linear.Linear, input, weight, bias, way)
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
        output: Tensor = F.linear(input, weight, bias)
        return output.relu() if output.requires_grad else output.relu_()  # in place, autograd has a history to rewrite
    output = autograd.function.apply(autograd.linear.LinearReLU, input, weight, bias, way)
    return output


_Numbers = int | Sequence[int]


def _conv(
    function: Callable[..., Tensor],
    dimensions: int,
    relu: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Numbers,
    padding: _Numbers | str,
    dilation: _Numbers,
    groups: int,
) -> Tensor:
    """What all convolutions are; ``function`` is the public one."""
    options = (stride, padding, dilation, groups)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(function, (input, weight, bias), input, weight, bias, *options)
    if (dtype := autocast_dtype(function.__name__, input)) is not None:
        return under_autocast(function, dtype, input, weight, bias, *options)
    way = dispatch.conv(dimensions, input, weight, bias, *options).backend
    if way == "torch":
        output: Tensor = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1](input, weight, bias, *options)  # type: ignore[arg-type]
        return output.relu_() if relu else output
    numbers = fit.conv_numbers(tuple(weight.shape[2:]), stride, padding, dilation)
    assert numbers is not None
    *symmetric, extra = numbers
    if any(extra):  # padding="same" and an even kernel: torch too pads the end first
        input = F.pad(input, [number for end in reversed(extra) for number in (0, end)])
    batch = input if input.dim() == dimensions + 2 else input.unsqueeze(0)
    flat = (number for numbers in symmetric for number in numbers)
    output = autograd.function.apply(
        autograd.conv.ConvReLU if relu else autograd.conv.Conv, batch, weight, bias, way, groups, *flat
    )
    return output if batch is input else output.squeeze(0)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution in one dimension, as `torch.nn.functional.conv1d`.

    Args:
        input: [N, C, L] or [C, L].
        weight: [O, C / groups, K].
        bias: [O] or None.
        stride, dilation: a number, or one for each dimension.
        padding: the same, or ``"valid"`` (none) or ``"same"`` (the output has the input's size; stride 1 only).
        groups: divides C and O.

    Returns:
        [N, O, L'] or [O, L'], in the inputs' dtype (autocast's where that is on).

    Raises:
        RuntimeError, TypeError, ValueError: torch's own, for shapes, dtypes and options that do not fit.
    """
    return _conv(conv1d, 1, False, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution in two dimensions, as `torch.nn.functional.conv2d`.

    Args:
        input: [N, C, H, W] or [C, H, W].
        weight: [O, C / groups, KH, KW].
        bias: [O] or None.
        stride, dilation: a number, or one for each dimension.
        padding: the same, or ``"valid"`` (none) or ``"same"`` (the output has the input's size; stride 1 only).
        groups: divides C and O.

    Returns:
        [N, O, H', W'] or [O, H', W'], in the inputs' dtype (autocast's where that is on).
        It is channels-last if input or weight is.

    Raises:
        RuntimeError, TypeError, ValueError: torch's own, for shapes, dtypes and options that do not fit.
    """
    return _conv(conv2d, 2, False, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution in three dimensions, as `torch.nn.functional.conv3d`.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W].
        weight: [O, C / groups, KD, KH, KW].
        bias: [O] or None.
        stride, dilation: a number, or one for each dimension.
        padding: the same, or ``"valid"`` (none) or ``"same"`` (the output has the input's size; stride 1 only).
        groups: divides C and O.

    Returns:
        [N, O, D', H', W'] or [O, D', H', W'], in the inputs' dtype (autocast's where that is on).
        It is channels-last if input or weight is.

    Raises:
        RuntimeError, TypeError, ValueError: torch's own, for shapes, dtypes and options that do not fit.
    """
    return _conv(conv3d, 3, False, input, weight, bias, stride, padding, dilation, groups)


def conv_relu1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv1d(..))`` in one kernel: see `conv1d`. NaN stays NaN, as in torch's ReLU."""
    return _conv(conv_relu1d, 1, True, input, weight, bias, stride, padding, dilation, groups)


def conv_relu2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(..))`` in one kernel: see `conv2d`. NaN stays NaN, as in torch's ReLU."""
    return _conv(conv_relu2d, 2, True, input, weight, bias, stride, padding, dilation, groups)


def conv_relu3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv3d(..))`` in one kernel: see `conv3d`. NaN stays NaN, as in torch's ReLU."""
    return _conv(conv_relu3d, 3, True, input, weight, bias, stride, padding, dilation, groups)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """``relu(input + other)`` in one pass, as at the end of a residual block. NaN stays NaN, as in torch's ReLU.

    Args:
        input: any shape.
        other: the same shape (another one is broadcast, and another dtype promoted, as torch does).
    """
    if has_torch_function_variadic(input, other):
        return handle_torch_function(add_relu, (input, other), input, other)
    way = dispatch.add_relu(input, other).backend
    if way == "torch":
        return torch.add(input, other).relu_()
    output: Tensor = autograd.function.apply(autograd.add_relu.AddReLU, input, other, way)
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
    loss: Tensor = autograd.function.apply(autograd.mse.MSELoss, input, target, reduction, way)
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
    loss: Tensor = autograd.function.apply(
        autograd.cross_entropy.CrossEntropy, input, target, weight, reduction, ignore_index, label_smoothing, way
    )[0]
    return loss


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of logits, as `torch.nn.functional.binary_cross_entropy_with_logits`.

    Input and target get gradients; the weights are constants, as in torch.

    Args:
        input: logits of any shape.
        target: probabilities in the same shape.
        weight: factor of each element's loss, broadcast to that shape, or None.
        size_average, reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"`` (one value per element), ``"mean"`` or ``"sum"`` (0-d).
        pos_weight: factor of the positive part of each element's loss, broadcast to that shape, or None.

    Raises:
        ValueError: if the shapes of input and target differ or ``reduction`` is none of the three.
        RuntimeError: torch's own, for weights that do not broadcast or require gradients.
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    options = (None, None, reduction, pos_weight)
    if (dtype := autocast_dtype("binary_cross_entropy_with_logits", input)) is not None:
        return under_autocast(binary_cross_entropy_with_logits, dtype, input, target, weight, *options)
    way = dispatch.binary_cross_entropy_with_logits(input, target, weight, *options).backend
    if way == "torch":
        return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)
    function = autograd.bce.BCEWithLogits
    loss: Tensor = autograd.function.apply(function, input, target, weight, pos_weight, reduction, way)
    return loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Tensor:
    """Cross-entropy of ``linear(input, linear_weight, linear_bias)``, as `torch.nn.functional.linear_cross_entropy`.

    The logits are never all in memory, forward or backward; gradients of higher order and tangents take them all.

    Args:
        input: [K] or [N, K].
        linear_weight: [C, K], or [C, d1, ..., dk, K] for a loss at each position, of a batched input.
        target: int64 class indices [], [N] or [N, d1, ..., dk]; or class probabilities [C], [N, C] or
            [N, C, d1, ..., dk], which get a gradient too.
        linear_bias: the linear weight's shape without K, or None.
        weight: [C] factor per class, or None.
        reduction: ``"none"`` (one value per target), ``"mean"`` (over the weights of the targets that count) or
            ``"sum"``.
        ignore_index: class index whose rows count nothing; any integer. None: -100 for class indices.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over the classes.
        options: `fastops.nn.LinearCrossEntropyOptions` say how many bytes of logits may exist at a time; of torch's own
            options the chunk size counts. None: 32 MiB.

    Raises:
        IndexError: on the CPU, if a class index is out of range (a GPU asserts on the device, as torch does).
        RuntimeError, ValueError: torch's own, for mismatched shapes, dtypes, devices and options.
    """
    keywords: dict[str, Any] = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        tensors = (input, linear_weight, target, linear_bias, weight)
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, **keywords, options=options
        )
    x, w, b, q, factors = input, linear_weight, linear_bias, target, weight
    lowered = autocast_dtype("linear_cross_entropy", input)
    if lowered is not None:  # the product in the lower dtype, the loss in float32
        x, w, b = (autocast_to(lowered, tensor) for tensor in (x, w, b))
        q, factors = (autocast_to(torch.float32, tensor) for tensor in (q, factors))
    way = dispatch.linear_cross_entropy(x, w, q, **{**keywords, "linear_bias": b, "weight": factors}, options=options)
    if way.backend == "torch":
        torchs = None if hasattr(options, "memory_budget") else options
        return F.linear_cross_entropy(input, linear_weight, target, **keywords, options=torchs)
    classes, positions = w.shape[0], w.shape[1:-1].numel()
    budget = dispatch.logits_budget(x, w, options)
    rows = 1 if x.dim() == 1 else x.shape[0]
    shape = target.shape if target.dtype is torch.int64 else (*x.shape[:-1], *w.shape[1:-1])
    q = q.reshape(rows, positions) if target.dtype is torch.int64 else q.reshape(rows, classes, positions)
    flat = (x.reshape(rows, -1), w.reshape(classes * positions, -1), None if b is None else b.reshape(-1), q, factors)
    ignored = -100 if ignore_index is None else ignore_index
    needs = tuple(
        torch.is_grad_enabled() and not target.requires_grad and tensor is not None and tensor.requires_grad
        for tensor in (x, w, b)
    )
    numbers = (reduction, ignored, label_smoothing, lowered is not None, budget, *needs, way.backend)
    function = autograd.linear_cross_entropy.LinearCrossEntropy
    loss: Tensor = autograd.function.apply(function, *flat, *numbers)[0]
    return loss.reshape(shape) if reduction == "none" else loss
