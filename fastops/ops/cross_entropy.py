"""Raw ops of the cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.launch import reshaped
from .registry import loop_over_batch, or_empty, register, run_kernel


def class_dim(input: Tensor) -> int:
    """Dimension of the classes: 1, or 0 for an input without a batch dimension."""
    return 0 if input.dim() == 1 else 1


def _row_shape(input: Tensor) -> torch.Size:
    """Shape of one loss per sample (and position): the input's without the class dimension."""
    dim = class_dim(input)
    return input.shape[:dim] + input.shape[dim + 1 :]


def _rows_of_classes(tensor: Tensor) -> Tensor:
    """[C], [N, C] or [N, C, d1, ...] -> [N, C, D]."""
    return tensor.reshape(1, -1, 1) if tensor.dim() == 1 else tensor.reshape(*tensor.shape[:2], -1)


def _rows(tensor: Tensor, input: Tensor) -> Tensor:
    """Something per loss, in the shape of `_row_shape` -> [N, D]."""
    return tensor.reshape(1 if input.dim() == 1 else input.shape[0], -1)


def _kernel_layout(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    is_index = target.dtype is torch.int64
    return _rows_of_classes(input), _rows(target, input) if is_index else _rows_of_classes(target)


def target_distribution(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor | float]:
    """``(t, a)``: the weighted target distribution in the input's shape, and d t_c / d target_c (probabilities only).

    ``t_c = w_c ((1 - s) q_c + s / C)`` with q one-hot for class indices; zero where the target is ignored.
    """
    dim = class_dim(input)
    classes = input.shape[dim]
    if target.dtype is torch.int64:
        kept = (target != ignore_index).unsqueeze(dim)
        index = target.unsqueeze(dim).where(kept, 0)
        hot = torch.zeros_like(input).scatter(dim, index, 1)
        distribution = (hot * (1 - label_smoothing) + label_smoothing / classes) * kept
    else:
        distribution = target * (1 - label_smoothing) + label_smoothing / classes
    if weight is None:
        return distribution, 1 - label_smoothing
    per_class = weight.reshape(-1, *[1] * (input.dim() - dim - 1))
    return distribution * per_class, per_class * (1 - label_smoothing)


def unscaled_gradients(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of each row's loss for its logits and for its target probabilities, in the input's shape."""
    dim = class_dim(input)
    distribution, slope = target_distribution(input, target, weight, ignore_index, label_smoothing)
    log_softmax = torch.log_softmax(input, dim)
    return log_softmax.exp() * distribution.sum(dim, keepdim=True) - distribution, -log_softmax * slope


def row_scale(grad_output: Tensor, input: Tensor, denominator: Tensor, reduction: str) -> Tensor:
    """What the loss's gradient multiplies each row with, broadcastable to the input's shape."""
    if reduction == "none":
        return grad_output.unsqueeze(class_dim(input))
    return (grad_output / denominator).to(grad_output.dtype) if reduction == "mean" else grad_output


def _expression(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    exact = torch.promote_types(input.dtype, torch.float32)
    log_sum_exp = torch.logsumexp(input.to(exact), class_dim(input))
    denominator = log_sum_exp.new_ones(())
    if reduction == "mean":
        kept = target != ignore_index
        if target.dtype is not torch.int64:
            denominator.fill_(log_sum_exp.numel())
        elif weight is None:
            denominator = kept.sum().to(exact)
        else:
            denominator = (weight.to(exact)[target.where(kept, 0)] * kept).sum()
    return loss, log_sum_exp, denominator


def _backward_expression(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    denominator: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    for_input, for_target = unscaled_gradients(input, target, weight, ignore_index, label_smoothing)
    scale = row_scale(grad_output, input, denominator, reduction)
    return scale * for_input if need_input else None, scale * for_target if need_target else None


def _on_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import cross_entropy

    loss, log_sum_exp, denominator = cross_entropy.cross_entropy(
        *_kernel_layout(input, target), weight, reduction, ignore_index, label_smoothing
    )
    shape = _row_shape(input)
    return reshaped(loss, shape) if reduction == "none" else loss, reshaped(log_sum_exp, shape), denominator


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (input, target, weight, reduction, ignore_index, label_smoothing)
    return run_kernel("cross_entropy", _on_rows, _expression, *arguments)


def _cross_entropy_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _row_shape(input)
    exact = torch.promote_types(input.dtype, torch.float32)
    return (
        input.new_empty(shape if reduction == "none" else ()),
        input.new_empty(shape, dtype=exact),
        input.new_empty((), dtype=exact),
    )


def _backward_on_rows(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    denominator: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    from ..kernels import cross_entropy

    gradients = cross_entropy.cross_entropy_backward(
        _rows(grad_output, input) if reduction == "none" else grad_output,
        *_kernel_layout(input, target),
        weight,
        _rows(log_sum_exp, input),
        denominator,
        reduction,
        ignore_index,
        label_smoothing,
        need_input,
        need_target,
    )
    grad_input, grad_target = (None if gradient is None else reshaped(gradient, input.shape) for gradient in gradients)
    return grad_input, grad_target


def _cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    denominator: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (grad_output, input, target, weight, log_sum_exp, denominator, reduction, ignore_index)
    options = (label_smoothing, need_input, need_target)
    gradients = run_kernel("cross_entropy_backward", _backward_on_rows, _backward_expression, *arguments, *options)
    grad_input, grad_target = (or_empty(input, gradient) for gradient in gradients)
    return grad_input, grad_target


def _cross_entropy_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    denominator: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        reshaped(torch.empty_like(_rows_of_classes(input)), input.shape) if need_input else input.new_empty(0),
        reshaped(torch.empty_like(_rows_of_classes(target)), input.shape) if need_target else input.new_empty(0),
    )


cross_entropy = register(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index,"
    " float label_smoothing, str backend) -> (Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
    loop_over_batch,
)
cross_entropy_backward = register(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor log_sum_exp,"
    " Tensor denominator, str reduction, int ignore_index, float label_smoothing, bool need_input, bool need_target,"
    " str backend) -> (Tensor, Tensor)",
    _cross_entropy_backward,
    _cross_entropy_backward_fake,
    loop_over_batch,
)
