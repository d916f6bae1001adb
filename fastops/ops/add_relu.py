"""Raw ops of the sum with ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import register, run_kernel


def _expression(input: Tensor, other: Tensor) -> Tensor:
    return torch.add(input, other).relu_()


def _backward_expression(grad_output: Tensor, output: Tensor) -> Tensor:
    grad: Tensor = torch.ops.aten.threshold_backward(grad_output, output, 0)
    return grad


def _add_relu(input: Tensor, other: Tensor, backend: str) -> Tensor:
    from ..kernels import add_relu

    return run_kernel("add_relu", add_relu.add_relu, _expression, input, other)


def _add_relu_fake(input: Tensor, other: Tensor, backend: str) -> Tensor:
    return input + other


def _add_relu_backward(grad_output: Tensor, output: Tensor, backend: str) -> Tensor:
    from ..kernels import add_relu

    return run_kernel("add_relu_backward", add_relu.add_relu_backward, _backward_expression, grad_output, output)


def _add_relu_backward_fake(grad_output: Tensor, output: Tensor, backend: str) -> Tensor:
    return torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device=output.device)


def _elementwise_vmap(
    op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], first: Tensor, second: Tensor, backend: str
) -> Any:
    tensors = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip((first, second), in_dims[:2], strict=True)
    ]
    if info.batch_size == 0:
        return torch.empty_like(tensors[0]), 0
    return op(*tensors, backend), 0


add_relu = register(
    "add_relu(Tensor input, Tensor other, str backend) -> Tensor", _add_relu, _add_relu_fake, _elementwise_vmap
)
add_relu_backward = register(
    "add_relu_backward(Tensor grad_output, Tensor output, str backend) -> Tensor",
    _add_relu_backward,
    _add_relu_backward_fake,
    _elementwise_vmap,
)
