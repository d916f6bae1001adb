"""Raw ops of the convolution in one, two and three dimensions, with and without ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..kernels import onednn
from ..kernels.geometry import conv_output_size
from .registry import loop_over_batch, or_empty, register, run_kernel


def is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """torch's rule: the output and both gradients are channels-last if input or weight is, else contiguous."""
    return any(suggest_memory_format(tensor) is not torch.contiguous_format for tensor in (input, weight))


def _memory_format(dimensions: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dimensions == 2 else torch.channels_last_3d


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    backend: str,
) -> Tensor:
    memory_format = _memory_format(len(stride), is_channels_last(input, weight))
    arguments = (input, weight, bias, stride, padding, dilation, groups, relu, memory_format)
    if backend == "triton":
        from ..kernels import conv

        output: Tensor = run_kernel("conv", conv.conv, onednn.conv, *arguments)
        return output
    return onednn.conv(*arguments)


def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    backend: str,
) -> Tensor:
    size = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    memory_format = _memory_format(len(stride), is_channels_last(input, weight))
    return _empty(input, (input.shape[0], weight.shape[0], *size), memory_format)


def _empty(like: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def _conv_vmap(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], input: Tensor, *others: Any) -> Any:
    if in_dims[0] is not None and in_dims[1] is None and in_dims[2] is None and info.batch_size > 0:
        output = op(input.movedim(in_dims[0], 0).flatten(0, 1), *others)
        return output.unflatten(0, (info.batch_size, -1)), 0
    return loop_over_batch(op, info, in_dims, input, *others)


def _conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_bias: bool,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes, options = (input_shape, weight_shape), (stride, padding, dilation, groups)
    memory_format = _memory_format(len(stride), channels_last)
    arguments = (grad_output, input, weight, output, *shapes, *options, need_bias, memory_format)
    if backend == "triton":
        from ..kernels import conv

        gradients = run_kernel("conv_backward", conv.conv_backward, onednn.conv_backward, *arguments)
    else:
        gradients = onednn.conv_backward(*arguments)
    grad_input, grad_weight, grad_bias = (or_empty(grad_output, gradient) for gradient in gradients)
    return grad_input, grad_weight, grad_bias


def _conv_backward_fake(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_bias: bool,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    memory_format = _memory_format(len(stride), channels_last)
    empty = grad_output.new_empty(0)
    return (
        empty if weight is None else _empty(grad_output, input_shape, memory_format),
        empty.clone() if input is None else _empty(grad_output, weight_shape, memory_format),
        grad_output.new_empty(weight_shape[0] if need_bias else 0),
    )


conv = register(
    "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
    " bool relu, str backend) -> Tensor",
    _conv,
    _conv_fake,
    _conv_vmap,
)
conv_backward = register(
    "conv_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, SymInt[] input_shape,"
    " SymInt[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, bool need_bias,"
    " bool channels_last, str backend) -> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
    loop_over_batch,
)
