"""Raw ops of linear + cross-entropy.

Everything is seen in one shape: input [N, K], linear weight [C P, K] and bias [C P] for C classes at P positions,
target [N, P] class indices or [N, C, P] probabilities. The positions do not depend on each other and run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels import chunked_logits, onednn
from ..kernels.chunked_logits import Target
from ..kernels.launch import accumulator_dtype
from .registry import loop_over_batch, or_empty, register, run_kernel


def _positions(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Iterator[tuple[Tensor, Tensor | None, Target]]:
    """Weight [C, K], bias [C] and target of each position."""
    count = target.shape[-1]
    classes = linear_weight.shape[0] // count
    for p in range(count):
        bias = None if linear_bias is None else linear_bias[p::count]
        yield linear_weight[p::count], bias, Target(target[..., p], weight, ignore_index, label_smoothing, classes)


def _forward(
    statistics: Callable[..., chunked_logits.Statistics],
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    float32_loss: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact = accumulator_dtype(input.dtype)
    indices = not target.is_floating_point()
    results, denominator = [], torch.zeros((), dtype=exact, device=input.device)
    for w, b, goal in _positions(linear_weight, linear_bias, target, weight, ignore_index, label_smoothing):
        if indices:
            chunked_logits.check_targets(goal.target, goal.classes, ignore_index)
        results.append(chunked_logits.losses(statistics(input, w, b, goal, budget), goal))
        if reduction == "mean":
            denominator += goal.own_weight(exact).sum() if indices else len(input)
    loss, maximum, exponentials, mass = (torch.stack(parts, 1) for parts in zip(*results, strict=True))
    if reduction != "mean":
        denominator.fill_(1)
    if reduction != "none":
        loss = loss.sum() / denominator
    return loss.to(exact if float32_loss else input.dtype), maximum, exponentials, mass, denominator


ROWS_AT_ONCE = 64  # if so many rows of logits fit the budget, products of them are as fast as of tiles


def _forward_with_gradients(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    float32_loss: bool,
    budget: int,
    needs: tuple[bool, bool, bool],
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """As `_forward` for one position, and the gradients of the reduced loss."""
    goal = Target(target[..., 0], weight, ignore_index, label_smoothing, len(linear_weight))
    scale = torch.ones_like(input[:, 0])
    if not goal.probabilities:
        chunked_logits.check_targets(goal.target, goal.classes, ignore_index)
        scale = goal.kept().to(input.dtype)
    denominator = scale.new_ones(())
    if reduction == "mean":
        denominator = scale.sum() if goal.probabilities else goal.own_weight(scale.dtype).sum()
        scale = (scale / denominator).where(scale != 0, 0)  # and not 0 / 0, where nothing counts
    arguments = (input, linear_weight, linear_bias, goal, scale, needs, budget)
    (loss, *saved), gradients = onednn.linear_cross_entropy_with_gradients(*arguments)
    return (loss.sum() / denominator, *(part.unsqueeze(1) for part in saved), denominator), gradients


def _backward(
    gradients: Callable[..., tuple[Tensor | None, ...]],
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    maximum: Tensor,
    exponentials: Tensor,
    mass: Tensor,
    denominator: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_target: bool,
    budget: int,
) -> tuple[Tensor | None, ...]:
    scale = grad_output.to(mass.dtype) / denominator
    scale = scale if reduction == "none" else scale.expand_as(mass)
    if not target.is_floating_point():
        scale = scale.where(target != ignore_index, 0)  # and not 0 * scale: the mean of no target has scale inf
    needs = (need_input, need_weight, need_bias, need_target)
    count, parts = target.shape[-1], []
    positions = _positions(linear_weight, linear_bias, target, weight, ignore_index, label_smoothing)
    for p, (w, b, goal) in enumerate(positions):
        saved = (saved[:, p].contiguous() for saved in (maximum, exponentials, mass))
        parts.append(gradients(scale[:, p].contiguous(), input, w, b, goal, *saved, needs, budget))
    if count == 1:
        grad_input, grad_weight, grad_bias, grad_target = parts[0]
        return grad_input, grad_weight, grad_bias, None if grad_target is None else grad_target.unsqueeze(-1)
    inputs, weights, biases, targets = zip(*parts, strict=True)
    return (
        torch.stack(inputs).sum(0) if needs[0] else None,
        torch.stack(weights, 1).reshape(linear_weight.shape) if needs[1] else None,
        torch.stack(biases, 1).reshape(-1) if needs[2] else None,
        torch.stack(targets, -1) if needs[3] else None,
    )


def _on_tiles_of_products(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(onednn.linear_cross_entropy, *arguments)


def _backward_on_tiles_of_products(*arguments: Any) -> tuple[Tensor | None, ...]:
    return _backward(onednn.linear_cross_entropy_backward, *arguments)


def _on_kernels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import linear_cross_entropy

    return _forward(linear_cross_entropy.linear_cross_entropy, *arguments)


def _backward_on_kernels(*arguments: Any) -> tuple[Tensor | None, ...]:
    from ..kernels import linear_cross_entropy

    return _backward(linear_cross_entropy.linear_cross_entropy_backward, *arguments)


def _makes_gradients(
    input: Tensor, linear_weight: Tensor, target: Tensor, reduction: str, budget: int, needs: Any, backend: str
) -> bool:
    """Whether the forward pass makes the gradients too: on a CPU, if the rows are one sum and enough of them fit."""
    if backend != "onednn" or not any(needs) or reduction == "none" or target.shape[-1] != 1:
        return False
    return min(len(input), ROWS_AT_ONCE) * len(linear_weight) * input.element_size() <= budget


def has_made(made: tuple[Tensor, ...], needs: tuple[bool, ...]) -> bool:
    """Whether all gradients that are needed are those of input, weight and bias that the forward pass made."""
    return not needs[3] and all(part.numel() for part, need in zip(made, needs[:3], strict=True) if need)


def _linear_cross_entropy(*arguments: Any) -> tuple[Tensor, ...]:
    *common, need_input, need_weight, need_bias, backend = arguments
    input, linear_weight, _, target, _, reduction, *_, budget = common
    needs = (need_input, need_weight, need_bias)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if backend == "triton":
        results = run_kernel("linear_cross_entropy", _on_kernels, _on_tiles_of_products, *common)
    elif _makes_gradients(input, linear_weight, target, reduction, budget, needs, backend):
        results, gradients = _forward_with_gradients(*(*common, needs))
    else:
        results = _on_tiles_of_products(*common)
    return (*results, *(or_empty(input, gradient) for gradient in gradients))


def _linear_cross_entropy_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    float32_loss: bool,
    budget: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    needs = (need_input, need_weight, need_bias)
    if not _makes_gradients(input, linear_weight, target, reduction, budget, needs, backend):
        needs = (False, False, False)
    exact = torch.promote_types(input.dtype, torch.float32)
    shape = (input.shape[0], target.shape[-1])
    return (
        input.new_empty(shape if reduction == "none" else (), dtype=exact if float32_loss else input.dtype),
        input.new_empty(shape, dtype=exact),
        input.new_empty(shape, dtype=exact),
        input.new_empty(shape, dtype=exact),
        input.new_empty((), dtype=exact),
        input.new_empty(input.shape if needs[0] else 0),
        input.new_empty(linear_weight.shape if needs[1] else 0),
        input.new_empty(linear_weight.shape[:1] if needs[2] else 0),
    )


def _linear_cross_entropy_backward(*arguments: Any) -> tuple[Tensor, ...]:
    (grad_output, input), made, needs, backend = arguments[:2], arguments[10:13], arguments[-6:-2], arguments[-1]
    others = (*arguments[:10], *arguments[13:-1])
    gradients: tuple[Tensor | None, ...]
    if has_made(made, needs):
        gradients = *(grad_output * part if need else None for part, need in zip(made, needs[:3], strict=True)), None
    elif backend == "triton":
        name = "linear_cross_entropy_backward"
        gradients = run_kernel(name, _backward_on_kernels, _backward_on_tiles_of_products, *others)
    else:
        gradients = _backward_on_tiles_of_products(*others)
    return tuple(or_empty(input, gradient) for gradient in gradients)


def _linear_cross_entropy_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = others[-6:-2]
    return (
        input.new_empty(input.shape if needs[0] else 0),
        input.new_empty(linear_weight.shape if needs[1] else 0),
        input.new_empty(linear_weight.shape[:1] if needs[2] else 0),
        target.new_empty(target.shape) if needs[3] else input.new_empty(0),
    )


linear_cross_entropy = register(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " str reduction, int ignore_index, float label_smoothing, bool float32_loss, int budget,"
    " bool need_input, bool need_weight, bool need_bias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
    loop_over_batch,
)
linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor maximum, Tensor exponentials, Tensor mass, Tensor denominator,"
    " Tensor made_input, Tensor made_weight, Tensor made_bias,"
    " str reduction, int ignore_index, float label_smoothing, bool need_input, bool need_weight, bool need_bias,"
    " bool need_target, int budget, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy_backward,
    _linear_cross_entropy_backward_fake,
    loop_over_batch,
)
