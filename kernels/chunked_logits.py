"""What both ways of linear + cross-entropy share: tiles of logits within a budget, and sums over tiles of classes.

Of the logits ``z = x w^T + b`` [rows, classes], only one tile exists at a time. A range of classes contributes to a
row's loss through its `Statistics` alone; those of several ranges (tiles, splits of a launch, shards of a weight) are
merged. ``t_c`` is the target distribution of ``kernels/cross_entropy_device.py`` without its part at the true class::

    m = max z_c,   e = sum exp(z_c - m),   d = sum t_c (z_c - m),   T = sum t_c,   y = z at the true class
    loss = T log e - d + w_y (1 - s) (log e - (y - m))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import accumulator_dtype

BUDGET = 32 << 20  # bytes of logits that exist at a time


class Target(NamedTuple):
    """What each row is compared with: [rows] class indices, or [rows, classes] probabilities, and how.

    ``weight`` is one factor per class or None; ``classes`` counts all of them where the tensors hold a range alone, and
    a class index is relative to that range.
    """

    target: Tensor
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    classes: int

    @property
    def probabilities(self) -> bool:
        return self.target.is_floating_point()

    @property
    def dense(self) -> bool:
        return self.probabilities or self.label_smoothing > 0

    def kept(self) -> Tensor:
        """[rows]: whether the row counts."""
        return self.target != self.ignore_index

    def own_weight(self, dtype: torch.dtype) -> Tensor:
        """[rows]: the weight of the true class, one if there are no weights, zero of an ignored row."""
        kept = self.kept()
        if self.weight is None:
            return kept.to(dtype)
        safe = self.target.where((self.target >= 0) & (self.target < len(self.weight)), 0)
        return self.weight.to(dtype)[safe].where(kept, 0)

    def distribution(self, rows: slice, classes: slice, dtype: torch.dtype) -> Tensor:
        """The dense part of t for a tile: [rows, classes], or [classes] if it is the same for all rows."""
        uniform = self.label_smoothing / self.classes
        weight = None if self.weight is None else self.weight[classes].to(dtype)
        if self.probabilities:
            t = self.target[rows, classes].to(dtype) * (1 - self.label_smoothing) + uniform
            return t if weight is None else t.mul_(weight)
        if weight is None:
            return torch.full((classes.stop - classes.start,), uniform, dtype=dtype, device=self.target.device)
        return weight * uniform


class Statistics(NamedTuple):
    """``m``, ``e``, ``d``, ``T`` and ``y`` of the module's formulas, each [rows] or, before a merge, [ranges, rows]."""

    maximum: Tensor
    exponentials: Tensor
    products: Tensor
    mass: Tensor
    target_logit: Tensor

    def merged(self) -> Statistics:
        """Of all ranges together."""
        maximum = self.maximum.amax(0)
        moved = reference(self.maximum) - reference(maximum)
        scale = (self.maximum - reference(maximum)).exp()
        products = (self.products + moved * self.mass).sum(0)
        sums = (self.exponentials * scale).sum(0), products, self.mass.sum(0), self.target_logit.sum(0)
        return Statistics(maximum, *sums)


def reference(maximum: Tensor) -> Tensor:
    """What is subtracted from logits before exp: their maximum, or 0 where all of them are -inf."""
    return maximum.masked_fill(maximum == -math.inf, 0)


def losses(statistics: Statistics, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, m, e, sum of t)`` of each row, all [rows], from the statistics of all classes; m is 0 for -inf.

    The backward pass divides ``exp(z - m)`` by e. With m and e in one number, the log-sum-exp, a large m would cost e
    its digits.
    """
    shift, log_sum = reference(statistics.maximum), statistics.exponentials.log()
    mass, loss = statistics.mass, torch.zeros_like(log_sum)
    if target.dense:
        loss = mass * log_sum - statistics.products
    if not target.probabilities:
        share = target.own_weight(log_sum.dtype) * (1 - target.label_smoothing)
        loss = (loss + share * (log_sum - (statistics.target_logit - shift))).where(target.kept(), 0)
        mass = mass + share
    return loss, shift, statistics.exponentials, mass


def tile_shape(rows: int, classes: int, itemsize: int, budget: int) -> tuple[int, int]:
    """Rows and classes of a tile of logits within ``budget`` bytes: all rows, if that leaves it not too narrow."""
    elements = max(1, budget // itemsize)
    if rows * classes <= elements:
        return rows, classes
    most = min(rows, elements, 2 * math.isqrt(elements))
    block = -(-rows // -(-rows // most))
    wide = max(1, min(classes, elements // block))
    return block, wide - wide % 128 if wide > 128 else wide


def slices(size: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))


def accumulated_gradients(
    input: Tensor,
    weight: Tensor,
    logit_gradients: Callable[[slice, slice], Tensor],
    multiply: Callable[[Tensor, Tensor, Tensor, bool], None],
    needs: tuple[bool, bool, bool],
    budget: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input [N, K], weight [C, K] and bias [C], if needed, from those of the logits, a tile at a time.

    ``logit_gradients(rows, classes)`` computes the gradient of a tile of logits. ``multiply(a, b, out, add)`` writes
    the product of [M, K] and [K, N] into ``out``, contiguous in the accumulators' dtype, or adds it to what is there.
    Sums are rounded once, at the end. Classes are the outer loop, so that only one block of the weight's gradient has
    an accumulator at a time.
    """
    rows, classes = input.shape[0], weight.shape[0]
    need_input, need_weight, need_bias = needs
    exact = accumulator_dtype(input.dtype)
    grad_input = input.new_empty(input.shape, dtype=exact) if need_input else None
    grad_weight = input.new_empty(weight.shape) if need_weight else None
    grad_bias = input.new_empty(classes) if need_bias else None
    block, width = tile_shape(rows, classes, input.element_size(), budget)
    for_bias: Tensor | None
    for own_classes in slices(classes, width):
        own, for_bias = weight[own_classes], None
        for_weight = None if grad_weight is None else grad_weight[own_classes]
        if for_weight is not None and for_weight.dtype is not exact:
            for_weight = torch.empty_like(for_weight, dtype=exact)
        for own_rows in slices(rows, block):
            grad = logit_gradients(own_rows, own_classes)
            if grad_input is not None:
                multiply(grad, own, grad_input[own_rows], own_classes.start > 0)
            if for_weight is not None:
                multiply(grad.t(), input[own_rows], for_weight, own_rows.start > 0)
            if need_bias:
                part = grad.sum(0, dtype=exact)
                for_bias = part if for_bias is None else for_bias.add_(part)
            del grad
        if grad_weight is not None and for_weight is not None and for_weight.dtype is not grad_weight.dtype:
            grad_weight[own_classes] = for_weight
        if grad_bias is not None and for_bias is not None:
            grad_bias[own_classes] = for_bias
    return None if grad_input is None else grad_input.to(input.dtype), grad_weight, grad_bias


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """torch's IndexError for a class index out of range; on a GPU the forward kernel asserts, so that nothing waits."""
    if target.device.type == "cpu" and (outside := out_of_bounds(target, classes, ignore_index)).any():
        raise IndexError(f"Target {target[outside][0].item()} is out of bounds.")


def out_of_bounds(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which class indices are out of range."""
    return (target != ignore_index) & ((target < 0) | (target >= classes))
