"""The stateless API: drop-in replacements for functions of `torch.nn.functional`.

Signatures, shapes, dtypes, gradients and errors are torch's. `fastops.dispatch` decides which way a call goes: through
kernels with a hand-written backward pass, or through the torch expression under ordinary autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .backport import LinearCrossEntropyOptions
from .dispatch import autocast_dtype, autocast_to, call
from .kernels.private import legacy_reduction
from .ops import OPS
from .ops.activations import activation_of, applied
from .ops.conv import ConvOptions
from .ops.max_pool import PoolOptions

_P = ParamSpec("_P")
_Numbers = int | Sequence[int]


def _overridable(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Let tensor subclasses and modes see the call, as torch's own functions do."""

    @functools.wraps(function)
    def door(*arguments: _P.args, **keywords: _P.kwargs) -> Tensor:
        relevant = (*arguments, *keywords.values()) if keywords else arguments
        if has_torch_function_variadic(*relevant):
            result: Tensor = handle_torch_function(door, relevant, *arguments, **keywords)
            return result
        return function(*arguments, **keywords)

    return door


@_overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, as `torch.nn.functional.linear`.

    Args:
        input: [..., in_features], any number of leading dimensions, none too.
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features], in the inputs' dtype (autocast's where that is on).
    """
    output: Tensor = call(OPS["linear"], input, weight, bias)
    return output


@_overridable
def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input @ weight.T + bias)`` in one kernel. NaN stays NaN, as in torch's ReLU.

    Args:
        input: [..., in_features], any number of leading dimensions, none too.
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features], in the inputs' dtype (autocast's where that is on).
    """
    output: Tensor = call(OPS["linear_relu"], input, weight, bias)
    return output


@_overridable
def linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu", **parameters: float
) -> Tensor:
    """``activation(input @ weight.T + bias)`` in one kernel.

    Args:
        input: [..., in_features], any number of leading dimensions, none too.
        weight: [out_features, in_features].
        bias: [out_features] or None.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (``negative_slope``), ``"gelu"``, ``"gelu_tanh"`` (its
            approximation), ``"silu"``, ``"sigmoid"``, ``"tanh"``, ``"hardswish"``, ``"hardsigmoid"``, ``"elu"``
            (``alpha``), ``"softplus"`` (``beta``, ``threshold``) or ``"mish"``.
        parameters: of the activation, by the names in brackets; torch's defaults where they are not given.

    Returns:
        [..., out_features], in the inputs' dtype (autocast's where that is on).

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """
    output: Tensor = call(OPS["linear_act"], input, weight, bias, activation_of(activation, parameters))
    return output


@_overridable
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
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv1d"], input, weight, bias, options)
    return output


@_overridable
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
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv2d"], input, weight, bias, options)
    return output


@_overridable
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
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv3d"], input, weight, bias, options)
    return output


@_overridable
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
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv_relu1d"], input, weight, bias, options)
    return output


@_overridable
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
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv_relu2d"], input, weight, bias, options)
    return output


@_overridable
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
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv_relu3d"], input, weight, bias, options)
    return output


@_overridable
def conv_act1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """``activation(conv1d(..))`` in one kernel: see `conv1d`, and `linear_act` for the activations.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv_act1d"], input, weight, bias, options, activation_of(activation, parameters))
    return output


@_overridable
def conv_act2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """``activation(conv2d(..))`` in one kernel: see `conv2d`, and `linear_act` for the activations.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv_act2d"], input, weight, bias, options, activation_of(activation, parameters))
    return output


@_overridable
def conv_act3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """``activation(conv3d(..))`` in one kernel: see `conv3d`, and `linear_act` for the activations.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """
    options = ConvOptions.of(weight, stride, padding, dilation, groups)
    output: Tensor = call(OPS["conv_act3d"], input, weight, bias, options, activation_of(activation, parameters))
    return output


@_overridable
def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """``relu(input + other)`` in one pass, as at the end of a residual block. NaN stays NaN, as in torch's ReLU.

    Args:
        input: any shape.
        other: the same shape (another one is broadcast, and another dtype promoted, as torch does).
    """
    output: Tensor = call(OPS["add_relu"], input, other)
    return output


@_overridable
def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``relu(batch_norm(..))`` of `torch.nn.functional`, in the passes of the batch norm. NaN stays NaN.

    Args:
        input: [N, C] or [N, C, ...].
        running_mean, running_var: [C], in the input's dtype or, beside 16 bits, float32. In training they are changed
            in place, or None; else they are what to normalize with.
        weight, bias: [C] or None, of the same dtype.
        training: whether to normalize with mean and variance of the batch.
        momentum: how far the running statistics move.
        eps: is added to the variance.

    Returns:
        The input's shape and dtype. It is channels-last if the input is.

    Raises:
        RuntimeError, TypeError, ValueError: torch's own, for arguments that do not fit, and in training for one value
            per channel.
    """
    arguments = running_mean, running_var, weight, bias, training, momentum, eps
    output: Tensor = call(OPS["batch_norm_relu"], input, None, *arguments)
    return output


@_overridable
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """``activation(batch_norm(..))``: see `batch_norm_relu`, and `linear_act` for the activations.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """
    arguments = running_mean, running_var, weight, bias, training, momentum, eps
    output: Tensor = call(OPS["batch_norm_act"], input, None, *arguments, activation_of(activation, parameters))
    return output


@_overridable
def batch_norm_add_relu(
    input: Tensor,
    other: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``relu(batch_norm(input, ..) + other)``, as at the end of a residual block: see `batch_norm_relu`.

    Args:
        input: [N, C] or [N, C, ...].
        other: the same shape (another one is broadcast, and another dtype promoted, as torch does).
    """
    arguments = running_mean, running_var, weight, bias, training, momentum, eps
    if not isinstance(other, Tensor):  # in a call None stands for no sum at all
        return torch.relu(torch.nn.functional.batch_norm(input, *arguments) + other)
    output: Tensor = call(OPS["batch_norm_add_relu"], input, other, *arguments)
    return output


@_overridable
def batch_norm_add_act(
    input: Tensor,
    other: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """``activation(batch_norm(input, ..) + other)``: see `batch_norm_add_relu`, and `linear_act` for the activations.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if it has no such parameter.
    """
    arguments = running_mean, running_var, weight, bias, training, momentum, eps
    known = activation_of(activation, parameters)
    if not isinstance(other, Tensor):  # in a call None stands for no sum at all
        return applied(known, torch.nn.functional.batch_norm(input, *arguments) + other)
    output: Tensor = call(OPS["batch_norm_add_act"], input, other, *arguments, known)
    return output


@_overridable
def relu_max_pool2d(
    input: Tensor,
    kernel_size: _Numbers,
    stride: _Numbers | None = None,
    padding: _Numbers = 0,
    dilation: _Numbers = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(relu(input), ..)`` of `torch.nn.functional` in one pass. NaN stays NaN, as in torch's ReLU.

    The input is saved for the backward pass, where torch saves what its ReLU made of it: it may not be changed in place
    until then.

    Args:
        input: [N, C, H, W] or [C, H, W].
        kernel_size, stride, padding, dilation: a number, or one for each dimension; stride None is the kernel size.
        ceil_mode: whether a window counts that reaches over the end.

    Returns:
        [N, C, H', W'] or [C, H', W'], in the input's dtype. It is channels-last if the input is.

    Raises:
        RuntimeError, TypeError: torch's own, for shapes, dtypes and options that do not fit.
    """
    options = PoolOptions.of(kernel_size, stride, padding, dilation, ceil_mode)
    output: Tensor = call(OPS["relu_max_pool2d"], input, options)
    return output


@_overridable
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
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    loss: Tensor = call(OPS["mse_loss"], input, target, weight, reduction)
    return loss


@_overridable
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean absolute error, as `torch.nn.functional.l1_loss`; both arguments get gradients, 0 where they are equal.

    Args:
        input: any shape.
        target: the same shape (another one is broadcast with torch's warning).
        size_average, reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"`` (one value per element), ``"mean"`` or ``"sum"`` (0-d).
        weight: one factor per element, or None.

    Raises:
        ValueError: if ``reduction`` is none of the three.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    loss: Tensor = call(OPS["l1_loss"], input, target, weight, reduction)
    return loss


@_overridable
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Smooth L1 loss, as `torch.nn.functional.smooth_l1_loss`; both arguments get gradients.

    Args:
        input: any shape.
        target: the same shape (another one is broadcast with torch's warning).
        size_average, reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"`` (one value per element), ``"mean"`` or ``"sum"`` (0-d).
        beta: the difference from which an element's loss is linear instead of quadratic; 0 gives `l1_loss`.

    Raises:
        RuntimeError: if ``beta`` is negative.
        ValueError: if ``reduction`` is none of the three.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    loss: Tensor = call(OPS["smooth_l1_loss"], input, target, None, reduction, beta)
    return loss


@_overridable
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Huber loss, as `torch.nn.functional.huber_loss`; both arguments get gradients.

    Args:
        input: any shape.
        target: the same shape (another one is broadcast with torch's warning).
        reduction: ``"none"`` (one value per element), ``"mean"`` or ``"sum"`` (0-d).
        delta: the difference from which an element's loss is linear instead of quadratic.
        weight: one factor per element, or None.

    Raises:
        RuntimeError: if ``delta`` is not positive.
        ValueError: if ``reduction`` is none of the three.
    """
    loss: Tensor = call(OPS["huber_loss"], input, target, weight, reduction, delta)
    return loss


@_overridable
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
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    loss: Tensor = call(OPS["cross_entropy"], input, target, weight, reduction, ignore_index, label_smoothing)
    return loss


@_overridable
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
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    loss: Tensor = call(OPS["binary_cross_entropy_with_logits"], input, target, weight, pos_weight, reduction)
    return loss


@_overridable
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

    The logits are never all in memory, forward or backward, but for gradients of higher order, tangents and transforms
    of `torch.func`: torch computes these, from all logits.

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
    tensors, original = (input, linear_weight, target, linear_bias, weight), None
    losses = (reduction, ignore_index, label_smoothing)
    if (dtype := autocast_dtype("lower", input)) is not None:  # the product in the lower dtype, the loss in float32
        original = (*tensors, *losses)
        x, w, q, b, factors = tensors
        x, w, b = (autocast_to(dtype, tensor) for tensor in (x, w, b))
        q, factors = (autocast_to(torch.float32, tensor) for tensor in (q, factors))
        tensors = x, w, q, b, factors
    loss: Tensor = call(OPS["linear_cross_entropy"], *tensors, *losses, options, original)
    return loss
