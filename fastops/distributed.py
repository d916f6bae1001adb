"""Losses of layers that are sharded across the ranks of a process group."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import explain
from .kernels import chunked_logits, onednn, private
from .kernels.chunked_logits import Statistics, Target

_IGNORED: Final = -(2**63)  # what no class index becomes, whatever shard it is relative to


class _Losses(torch.autograd.Function):
    """[N] losses from [N, K], a rank's [C, K] and [C], and the target among all classes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Target,
        group: dist.ProcessGroup | None,
        budget: int,
        kernels: ModuleType,
    ) -> Tensor:
        own = target.target - dist.get_rank(group) * len(linear_weight)
        shard = target._replace(target=own.where(target.kept(), _IGNORED))
        part = torch.stack(kernels.linear_cross_entropy(input, linear_weight, linear_bias, shard, budget))
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group)
        loss, *saved = chunked_logits.losses(Statistics(*torch.stack(parts, 1)).merged(), target)
        ctx.save_for_backward(input, linear_weight, linear_bias, shard.target, *saved)
        ctx.options, ctx.group, ctx.budget, ctx.kernels = shard[1:], group, budget, kernels
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, weight, bias, target, *saved = ctx.saved_tensors
        shard = Target(target, *ctx.options)
        scale = grad_output.where(shard.kept(), 0).contiguous()
        arguments = (scale, input, weight, bias, shard, *saved, (*ctx.needs_input_grad[:3], False), ctx.budget)
        grad_input, grad_weight, grad_bias, _ = ctx.kernels.linear_cross_entropy_backward(*arguments)
        if grad_input is not None:
            dist.all_reduce(grad_input, group=ctx.group)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    memory_budget: int = chunked_logits.BUDGET,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`fastops.functional.linear_cross_entropy` with the classes sharded across ``group``: vocabulary-parallel.

    Rank r holds the classes from r C to (r + 1) C. Input and target are the same on every rank, and so is the loss.
    Forward, the ranks exchange five numbers per row; backward, the gradient of the input. Those of weight and bias stay
    with the rank. Every rank must call backward. First derivatives only.

    Args:
        input: [N, K].
        linear_weight: [C, K], this rank's; C is the same on every rank.
        target: [N] int64 class indices among all classes.
        linear_bias: [C] or None, this rank's.
        reduction: ``"none"`` ([N]), ``"mean"`` (over the targets that count) or ``"sum"``.
        ignore_index: class index whose rows count nothing.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes.
        memory_budget: how many bytes of logits may exist at a time.
        group: the ranks; None for all.

    Raises:
        ValueError: if shapes do not fit, the target holds no class indices or ``reduction`` is none of the three.
        IndexError: on the CPU, if a class index is out of range; a GPU stops with an assertion, as in torch.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(f"expected [N, K] and [C, K], got {tuple(input.shape)} and {tuple(linear_weight.shape)}")
    if target.shape != input.shape[:1] or target.dtype is not torch.int64:
        raise ValueError(f"expected [N] int64 class indices, got {tuple(target.shape)} of {target.dtype}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(f"expected a bias [C], got {tuple(linear_bias.shape)}")
    classes = dist.get_world_size(group) * len(linear_weight)
    chunked_logits.check_targets(target, classes, ignore_index)
    if not target.is_cpu:  # a kernel sees the classes of its rank alone
        inside = ~chunked_logits.out_of_bounds(target, classes, ignore_index).any()
        private.assert_async(inside, "Target is out of bounds.")
    kept = target != ignore_index
    goal = Target(target.where(kept, _IGNORED), None, _IGNORED, label_smoothing, classes)
    kernels: ModuleType = onednn
    if explain("linear_cross_entropy", input, linear_weight, target, linear_bias=linear_bias).backend == "triton":
        from .kernels import linear_cross_entropy as kernels
    losses: Tensor = _Losses.apply(input, linear_weight, linear_bias, goal, group, memory_budget, kernels)
    if reduction == "mean":
        losses = losses.sum() / kept.sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(input.dtype)
