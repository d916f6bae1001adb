"""Linear layers and convolutions on the CPU: through oneDNN's own primitives where they apply, else through ATen.

``torch.ops.mkldnn._linear_pointwise`` is what Inductor calls for ``linear`` on a CPU; it takes transposed views as they
are. ATen sends float32 products to MKL instead, which on some processors reaches half the speed. It is a private op, so
its presence is probed and every other case goes through ATen. It could fuse the ReLU too, but its ReLU turns NaN into
0; torch's keeps NaN, so that one is applied in place. Convolutions in float32 are oneDNN's in ATen already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import reshaped


def available() -> bool:
    """Whether this build of torch has the oneDNN product and oneDNN is not switched off."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """``relu(input @ weight.T + bias)``: [M, K], [N, K], [N] -> [M, N], any strides, any device and dtype."""
    if input.is_cpu and input.dtype is torch.float32 and available():
        dense_bias = None if bias is None else bias.contiguous()  # the primitive does not look at its stride
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, dense_bias, "none", [], "")
    else:
        output = torch.nn.functional.linear(input, weight, bias)
    return output.relu_() if relu else output


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``relu(input @ weight.T + bias)``: [..., K], [N, K], [N] -> [..., N]."""
    output = product(input.reshape(-1, input.shape[-1]), weight, bias, relu)
    return reshaped(output, (*input.shape[:-1], weight.shape[0]))


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``output`` is the forward's result if it had a ReLU, else None. Formulas: see the Triton twin in ``linear.py``.
    """
    grad = grad_output
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
    grad = grad.reshape(-1, grad.shape[-1])
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = reshaped(product(grad, weight.t()), (*grad_output.shape[:-1], weight.shape[1]))
    if input is not None:
        grad_weight = product(grad.t(), input.reshape(-1, input.shape[-1]).t())
    return grad_input, grad_weight, grad.sum(0) if need_bias else None


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    memory_format: torch.memory_format,
) -> Tensor:
    """``relu(conv(input, weight) + bias)``: [N, C, ...], [O, C / groups, ...], [O] -> [N, O, ...]."""
    no_padding = (0,) * len(stride)
    output = torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, False, no_padding, groups
    ).contiguous(memory_format=memory_format)
    return output.relu_() if relu else output


def conv_backward(
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
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``output`` is the forward's result if it had a ReLU, else None. Formulas: see the Triton twin in ``conv.py``.
    """
    grad = grad_output
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        grad.new_empty(input_shape) if input is None else input,  # of what is not needed the shape alone is read
        grad.new_empty(weight_shape) if weight is None else weight,
        weight_shape[:1],
        stride,
        padding,
        dilation,
        False,
        (0,) * len(stride),
        groups,
        (weight is not None, input is not None, need_bias),
    )
    grad_input, grad_weight = (
        None if gradient is None else gradient.contiguous(memory_format=memory_format)
        for gradient in (grad_input, grad_weight)
    )
    return grad_input, grad_weight, grad_bias
