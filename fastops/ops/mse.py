"""Raw ops of the mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import loop_over_batch, or_empty, register, run_kernel

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # ATen's numbers


def _expression(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return torch.ops.aten.mse_loss(input, target, REDUCTIONS[reduction])


def _backward_expression(
    grad_output: Tensor, input: Tensor, target: Tensor, reduction: str, need_input: bool, need_target: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad = torch.ops.aten.mse_loss_backward(grad_output, input, target, REDUCTIONS[reduction])
    return grad if need_input else None, -grad if need_target else None


def _mse_loss(input: Tensor, target: Tensor, reduction: str, backend: str) -> Tensor:
    from ..kernels import mse

    return run_kernel("mse_loss", mse.mse_loss, _expression, input, target, reduction)


def _mse_loss_fake(input: Tensor, target: Tensor, reduction: str, backend: str) -> Tensor:
    return input + target if reduction == "none" else input.new_empty(())  # the layout of an elementwise result


def _mse_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str,
    need_input: bool,
    need_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from ..kernels import mse

    arguments = (grad_output, input, target, reduction, need_input, need_target)
    grad_input, grad_target = run_kernel("mse_loss_backward", mse.mse_loss_backward, _backward_expression, *arguments)
    return or_empty(input, grad_input), or_empty(input, grad_target)


def _mse_loss_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str,
    need_input: bool,
    need_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        input + target if need_input else input.new_empty(0),
        input + target if need_target else input.new_empty(0),
    )


mse_loss = register(
    "mse_loss(Tensor input, Tensor target, str reduction, str backend) -> Tensor",
    _mse_loss,
    _mse_loss_fake,
    loop_over_batch,
)
mse_loss_backward = register(
    "mse_loss_backward(Tensor grad_output, Tensor input, Tensor target, str reduction, bool need_input,"
    " bool need_target, str backend) -> (Tensor, Tensor)",
    _mse_loss_backward,
    _mse_loss_backward_fake,
    loop_over_batch,
)
