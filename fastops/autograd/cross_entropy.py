"""Cross-entropy with class indices or class probabilities.

Per row, with logits x, p = softmax(x), l = log-sum-exp(x), the weighted target distribution t (``ops/cross_entropy.py``
builds it), T = sum of t, and the row's scale r (its loss's gradient, over the denominator for 'mean')::

    loss = sum_c t_c (l - x_c)
    gx_c = r (p_c T - t_c)
    gq_c = r a_c (l - x_c),   a_c = d t_c / d q_c            (class probabilities q only)

Second derivatives, for h the gradient of gx and k the gradient of gq::

    for r:    sum_c h_c (p_c T - t_c) + sum_c k_c a_c (l - x_c)
    for x_c:  r T p_c (h_c - sum_j h_j p_j) + r (p_c sum_j k_j a_j - k_c a_c)
    for q_c:  r a_c (sum_j h_j p_j - h_c)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import cross_entropy as ops
from ..ops.cross_entropy import class_dim, row_scale, target_distribution, unscaled_gradients
from .function import Function, gradients


def second_derivatives(
    h: Tensor | None,
    k: Tensor | None,
    options: tuple[str, int, float],  # reduction, ignore_index, label_smoothing
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The module's sums: for the gradient of the loss, the logits and the probabilities (None for class indices)."""
    reduction, dim = options[0], class_dim(input)
    distribution, slope = target_distribution(input, target, weight, *options[1:])
    scale = row_scale(grad_output, input, denominator, reduction)
    log_softmax = torch.log_softmax(input, dim)
    p = log_softmax.exp()
    for_rows, for_input, for_target = torch.zeros_like(p), torch.zeros_like(p), None
    if h is not None:
        T = distribution.sum(dim, keepdim=True)
        hp = (h * p).sum(dim, keepdim=True)
        for_rows = for_rows + h * (p * T - distribution)
        for_input = for_input + scale * T * p * (h - hp)
        if target.is_floating_point():
            for_target = scale * slope * (hp - h)
    if k is not None:
        ka = k * slope
        for_rows = for_rows - ka * log_softmax
        for_input = for_input + scale * (p * ka.sum(dim, keepdim=True) - ka)
    for_rows = for_rows.sum(dim)
    if reduction != "none":
        for_rows = for_rows.sum()
    if reduction == "mean":
        for_rows = for_rows / denominator
    return for_rows.to(grad_output.dtype), for_input, for_target


def tangents_of_gradients(
    t_grad_output: Tensor | None,
    t_input: Tensor | None,
    t_target: Tensor | None,
    options: tuple[str, int, float],  # reduction, ignore_index, label_smoothing
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor,
) -> tuple[Tensor, Tensor]:
    """How gx and gq change along tangents of the gradient of the loss, the logits and the probabilities."""
    reduction, dim = options[0], class_dim(input)
    distribution, slope = target_distribution(input, target, weight, *options[1:])
    scale = row_scale(grad_output, input, denominator, reduction)
    log_softmax = torch.log_softmax(input, dim)
    p = log_softmax.exp()
    T = distribution.sum(dim, keepdim=True)
    t_gx, t_gq = torch.zeros_like(p), torch.zeros_like(p)
    if t_grad_output is not None:
        t_scale = row_scale(t_grad_output, input, denominator, reduction)
        t_gx = t_gx + t_scale * (p * T - distribution)
        t_gq = t_gq - t_scale * slope * log_softmax
    if t_input is not None:
        p_t = (p * t_input).sum(dim, keepdim=True)
        t_gx = t_gx + scale * T * p * (t_input - p_t)
        t_gq = t_gq + scale * slope * (p_t - t_input)
    if t_target is not None:
        at = slope * t_target
        t_gx = t_gx + scale * (p * at.sum(dim, keepdim=True) - at)
    return t_gx, t_gq


@torch.compiler.allow_in_graph
class CrossEntropyBackward(Function):
    """``(gx, gq)`` as differentiable functions of ``(gradient of the loss, x, q)``; empty where not needed.

    The log-sum-exp and the denominator that come along are values, not variables: l is a function of x here.
    """

    raw = ops.cross_entropy_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, input, target, weight, _, denominator = inputs[:6]
        ctx.save_for_backward(grad_output, input, target, weight, denominator)
        ctx.save_for_forward(grad_output, input, target, weight, denominator)
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.ignore_index, ctx.label_smoothing, ctx.need_input, ctx.need_target = inputs[6:11]

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, k: Tensor | None) -> Any:
        h, k = h if ctx.need_input else None, k if ctx.need_target else None
        options = (ctx.reduction, ctx.ignore_index, ctx.label_smoothing)
        return (*second_derivatives(h, k, options, *ctx.saved_tensors), *(None,) * 9)

    @staticmethod
    def jvp(
        ctx: Any, t_grad_output: Tensor | None, t_input: Tensor | None, t_target: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        options = (ctx.reduction, ctx.ignore_index, ctx.label_smoothing)
        t_gx, t_gq = tangents_of_gradients(t_grad_output, t_input, t_target, options, *ctx.saved_tensors)
        absent = t_gx.new_zeros(0)
        return t_gx if ctx.need_input else absent, t_gq if ctx.need_target else absent


@torch.compiler.allow_in_graph
class CrossEntropy(Function):
    """``(loss, log-sum-exp per row, denominator)``; only the loss is differentiable.

    [C], [N, C] or [N, C, d1, ...] logits; the loss is 0-d, or has the input's shape without C for ``'none'``.
    """

    raw = ops.cross_entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, target, weight, ctx.reduction, ctx.ignore_index, ctx.label_smoothing, ctx.backend = inputs
        _, log_sum_exp, denominator = output
        ctx.mark_non_differentiable(log_sum_exp, denominator)
        ctx.set_materialize_grads(False)  # two launches, of zeros for these two
        ctx.save_for_backward(input, target, weight, log_sum_exp, denominator)
        ctx.save_for_forward(input, target, weight, log_sum_exp, denominator)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:2]
        options = (ctx.reduction, ctx.ignore_index, ctx.label_smoothing)
        arguments = (grad_output, *ctx.saved_tensors, *options, *needs, ctx.backend)
        return (*gradients(CrossEntropyBackward, needs, *arguments), *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, t_input: Tensor | None, t_target: Tensor | None, *_: None) -> tuple[Tensor, None, None]:
        input, target, weight, _, denominator = ctx.saved_tensors
        for_input, for_target = unscaled_gradients(input, target, weight, ctx.ignore_index, ctx.label_smoothing)
        tangent = torch.zeros_like(for_input)
        if t_input is not None:
            tangent = tangent + for_input * t_input
        if t_target is not None:
            tangent = tangent + for_target * t_target
        rows = tangent.sum(class_dim(input))
        if ctx.reduction == "none":
            return rows, None, None
        total = rows.sum()
        return (total / denominator).to(total.dtype) if ctx.reduction == "mean" else total, None, None
