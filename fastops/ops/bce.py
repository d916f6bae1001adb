"""Raw ops of the binary cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .mse import REDUCTIONS
from .registry import loop_over_batch, or_empty, register, run_kernel


def _expression(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    return torch.binary_cross_entropy_with_logits(input, target, weight, pos_weight, REDUCTIONS[reduction])


def unscaled_gradients(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of each element's loss for input and target."""
    log_sigmoid = torch.nn.functional.logsigmoid
    v = 1 if pos_weight is None else pos_weight
    for_input = (1 - target) * torch.sigmoid(input) - v * target * torch.sigmoid(-input)
    for_target = -input if pos_weight is None else log_sigmoid(-input) - v * log_sigmoid(input)
    return (for_input, for_target) if weight is None else (weight * for_input, weight * for_target)


def _backward_expression(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    for_input, for_target = unscaled_gradients(input, target, weight, pos_weight)
    scale = grad_output / input.numel() if reduction == "mean" else grad_output
    return scale * for_input if need_input else None, scale * for_target if need_target else None


def _bce(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, backend: str
) -> Tensor:
    from ..kernels import bce

    arguments = (input, target, weight, pos_weight, reduction)
    return run_kernel("binary_cross_entropy_with_logits", bce.bce, _expression, *arguments)


def _bce_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, backend: str
) -> Tensor:
    return target + target if reduction == "none" else input.new_empty(())  # the layout of an elementwise result


def _bce_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    need_input: bool,
    need_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from ..kernels import bce

    arguments = (grad_output, input, target, weight, pos_weight, reduction, need_input, need_target)
    name = "binary_cross_entropy_with_logits_backward"
    grad_input, grad_target = run_kernel(name, bce.bce_backward, _backward_expression, *arguments)
    return or_empty(input, grad_input), or_empty(input, grad_target)


def _bce_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    need_input: bool,
    need_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        target + target if need_input else input.new_empty(0),
        target + target if need_target else input.new_empty(0),
    )


binary_cross_entropy_with_logits = register(
    "binary_cross_entropy_with_logits(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str reduction,"
    " str backend) -> Tensor",
    _bce,
    _bce_fake,
    loop_over_batch,
)
binary_cross_entropy_with_logits_backward = register(
    "binary_cross_entropy_with_logits_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight,"
    " Tensor? pos_weight, str reduction, bool need_input, bool need_target, str backend) -> (Tensor, Tensor)",
    _bce_backward,
    _bce_backward_fake,
    loop_over_batch,
)
