"""Raw ops of the linear layer, with and without ReLU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels import onednn
from .registry import loop_over_batch, or_empty, register, run_kernel


@functools.cache  # an import statement costs more than a kernel's launch
def _kernels() -> Any:
    from ..kernels import linear

    return linear


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, backend: str) -> Tensor:
    if backend == "triton":
        output: Tensor = run_kernel("linear", _kernels().linear, onednn.linear, input, weight, bias, relu)
        return output
    return onednn.linear(input, weight, bias, relu)


def _linear_fake(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, backend: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _linear_vmap(
    op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], input: Tensor, *others: Any
) -> Any:
    if in_dims[1] is None and in_dims[2] is None:
        assert in_dims[0] is not None
        return op(input.movedim(in_dims[0], 0), *others), 0
    return loop_over_batch(op, info, in_dims, input, *others)


def _linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (grad_output, input, weight, output, need_bias)
    if backend == "triton":
        gradients = run_kernel("linear_backward", _kernels().linear_backward, onednn.linear_backward, *arguments)
    else:
        gradients = onednn.linear_backward(*arguments)
    grad_input, grad_weight, grad_bias = (or_empty(grad_output, gradient) for gradient in gradients)
    return grad_input, grad_weight, grad_bias


def _linear_backward_fake(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    N = grad_output.shape[-1]
    return (
        grad_output.new_empty(0 if weight is None else (*grad_output.shape[:-1], weight.shape[1])),
        grad_output.new_empty(0 if input is None else (N, input.shape[-1])),
        grad_output.new_empty(N if need_bias else 0),
    )


linear = register(
    "linear(Tensor input, Tensor weight, Tensor? bias, bool relu, str backend) -> Tensor",
    _linear,
    _linear_fake,
    _linear_vmap,
)
linear_backward = register(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, bool need_bias, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
    loop_over_batch,
)
