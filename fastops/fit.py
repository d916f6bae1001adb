"""Which arguments kernels take: for every op, why none takes these, or None.

Nothing here depends on the backend that is selected, nor on the device: `dispatch` asks where kernels run.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import LinearCrossEntropyOptions

from .kernels.geometry import conv_output_size

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Plain tensors, and what stands for one while a compiler traces. Other subclasses may mean something else by an op.
PLAIN: Final = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def tensors(first: Tensor, *others: Tensor | None, indices: Tensor | None = None) -> str | None:
    """Why no kernel takes these tensors together, or None. All but ``indices`` are to have one dtype."""
    dtype, device = first.dtype, first.device
    for tensor in (first, *others):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return f"no kernel for arguments of type {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"no kernel for layout {tensor.layout}"
        if tensor.device != device:
            return "tensors are on different devices"
        if tensor.numel() == 0:
            return "a tensor is empty"
        if tensor.dtype is not dtype and tensor is not indices:
            return "dtypes differ"
    return None if dtype in DTYPES else f"no kernel for {dtype}"


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if _is_usual(input, weight, bias):
        return None
    unfit = tensors(input, weight, bias)
    if unfit is not None:
        return unfit
    size = weight.shape
    if len(size) != 2 or input.dim() == 0 or input.shape[-1] != size[1]:
        return "input and weight shapes do not make a linear layer"
    if bias is not None and (len(bias_size := bias.shape) != 1 or bias_size[0] != size[0]):
        return "bias does not have one element per output feature"
    return None


def _is_usual(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all is as almost always, at half the price of looking for a reason why not."""
    dtype, device, size = input.dtype, input.device, weight.shape
    return (
        dtype in DTYPES
        and type(input) in PLAIN
        and type(weight) in PLAIN
        and input.layout is weight.layout is torch.strided
        and weight.dtype is dtype
        and weight.device == device
        and len(size) == 2
        and input.dim() > 0
        and input.shape[-1] == size[1]
        and input.numel() > 0
        and size[0] > 0
        and (
            bias is None
            or (
                type(bias) in PLAIN
                and bias.layout is torch.strided
                and bias.dtype is dtype
                and bias.device == device
                and len(bias_size := bias.shape) == 1
                and bias_size[0] == size[0]
            )
        )
    )


class ConvNumbers(NamedTuple):
    """A convolution's options as one number for each spatial dimension; ``extra`` is padding at the end alone."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: tuple[int, ...]


def conv_numbers(kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> ConvNumbers | None:
    """The options of `torch.nn.functional.conv2d` and its like, for a kernel of this size; None if not valid."""

    def each(value: Any, least: int) -> tuple[int, ...] | None:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if len(values) == 1:
            values *= len(kernel)
        valid = len(values) == len(kernel) and all(type(number) is int and number >= least for number in values)
        return values if valid else None

    strides, dilations = each(stride, 1), each(dilation, 1)
    if strides is None or dilations is None:
        return None
    extra = (0,) * len(kernel)
    if padding == "same":
        if any(number != 1 for number in strides):
            return None
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        paddings: tuple[int, ...] | None = tuple(total // 2 for total in totals)
        extra = tuple(total % 2 for total in totals)
    else:
        paddings = extra if padding == "valid" else each(padding, 0)
    return None if paddings is None else ConvNumbers(strides, paddings, dilations, extra)


def conv(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> str | None:
    unfit = tensors(input, weight, bias)
    if unfit is not None:
        return unfit
    if input.dim() not in (dimensions + 1, dimensions + 2) or weight.dim() != dimensions + 2:
        return f"input and weight shapes do not make a convolution in {dimensions} dimensions"
    if type(groups) is not int or groups < 1 or weight.shape[0] % groups != 0:
        return "groups do not divide the channels"
    if input.shape[-1 - dimensions] != weight.shape[1] * groups:
        return "input and weight do not have the same channels"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "bias does not have one element per output channel"
    kernel = tuple(weight.shape[2:])
    numbers = conv_numbers(kernel, stride, padding, dilation)
    if numbers is None:
        return "stride, padding or dilation is not valid"
    size = [n + end for n, end in zip(input.shape[-dimensions:], numbers.extra, strict=True)]
    if any(n < 1 for n in conv_output_size(size, kernel, *numbers[:3])):
        return "the kernel is larger than the input"
    return None


def loss_options(reduction: Any, label_smoothing: Any = 0.0) -> str | None:
    """Why no loss has these options, or None."""
    if reduction not in ("none", "mean", "sum"):
        return f"{reduction!r} is no reduction"
    if not (isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing <= 1):
        return "label_smoothing is not a number from 0 to 1"
    return None


def add_relu(input: Tensor, other: Tensor) -> str | None:
    if input.shape != other.shape:
        return "the shapes differ"
    return tensors(input, other)


def mse_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: Any) -> str | None:
    if weight is not None:
        return "no kernel for element weights"
    if input.shape != target.shape:
        return "input and target shapes differ"
    return loss_options(reduction) or tensors(input, target)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: Any,
    ignore_index: Any,
    label_smoothing: Any,
) -> str | None:
    unfit = tensors(input, target, weight, indices=target)
    if unfit is not None:
        return unfit
    if input.dim() == 0:
        return "input has no class dimension"
    if not (type(ignore_index) is int and -(2**63) <= ignore_index < 2**63):
        return "ignore_index is not a 64-bit integer"
    class_dim = 0 if input.dim() == 1 else 1
    if target.shape == input.shape:
        if target.dtype is not input.dtype or ignore_index >= 0:
            return "class probabilities need the dtype of the input and a negative ignore_index"
    elif target.dtype is not torch.int64:
        return f"no kernel for {target.dtype} class indices"
    elif target.shape != input.shape[:class_dim] + input.shape[class_dim + 1 :]:
        return "target shape does not match the input"
    if weight is not None:
        if weight.shape != (input.shape[class_dim],):
            return "weight does not have one element per class"
        if weight.requires_grad or forward_ad._current_level >= 0:
            return "weight may be differentiated"
    return loss_options(reduction, label_smoothing)


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: Any
) -> str | None:
    if input.shape != target.shape:
        return "input and target shapes differ"
    unfit = loss_options(reduction) or tensors(input, target, weight, pos_weight)
    if unfit is not None:
        return unfit
    for factor in (weight, pos_weight):
        if factor is None:
            continue
        sizes = (1,) * (input.dim() - factor.dim()) + tuple(factor.shape)
        if len(sizes) != input.dim() or any(own not in (1, size) for own, size in zip(sizes, input.shape, strict=True)):
            return "a weight does not broadcast to the input's shape"
        if factor.requires_grad or forward_ad._current_level >= 0:
            return "a weight may be differentiated"
    return None


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: Any,
    ignore_index: Any,
    label_smoothing: Any,
    options: Any,
) -> str | None:
    unfit = (
        tensors(input, linear_weight, linear_bias)
        or tensors(input, target, indices=target)
        or tensors(input, weight, indices=weight)
    )
    if unfit is not None:
        return unfit
    positions = linear_weight.shape[1:-1]
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        return "input and weight shapes do not make a linear layer"
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        return "bias does not have one element per output feature"
    if positions and input.dim() == 1:
        return "positions need a batched input"
    if target.shape == (*input.shape[:-1], *linear_weight.shape[:-1]):
        if target.dtype not in (input.dtype, torch.float32) or ignore_index is not None:
            return "class probabilities need the dtype of the input and no ignore_index"
    elif target.dtype is not torch.int64:
        return f"no kernel for {target.dtype} class indices"
    elif target.shape != (*input.shape[:-1], *positions):
        return "target shape does not match the input"
    if not (ignore_index is None or (type(ignore_index) is int and -(2**63) <= ignore_index < 2**63)):
        return "ignore_index is not a 64-bit integer"
    if weight is not None:
        if weight.shape != linear_weight.shape[:1] or weight.dtype not in (input.dtype, torch.float32):
            return "weight does not have one element of the input's dtype per class"
        if weight.requires_grad or forward_ad._current_level >= 0:
            return "weight may be differentiated"
    if (unfit := loss_options(reduction, label_smoothing)) is not None:
        return unfit
    if not (options is None or isinstance(options, LinearCrossEntropyOptions)):
        return "options are not of torch's class"
    return None
