"""The gradient before an activation, and the sums of its columns, the gradient of the bias, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import NONE, RELU, Activation
from .configs import planned, register_limit
from .epilogue import gradient_before
from .launch import Plan, accumulator_dtype, launch, units_of
from .tiles import tile_positions


@triton.jit(
    do_not_specialize=["M", "N", "ROWS_PER_PROGRAM"],
    do_not_specialize_on_alignment=["grad_row_stride", "grad_column_stride"],
)
def activation_backward_kernel(
    grad_ptr,  # [M, N]
    saved_ptr,  # [M, N], contiguous: output or input of the activation
    masked_ptr,  # [M, N], contiguous
    sum_ptr,  # [programs along M, N], contiguous
    M,
    N,
    grad_row_stride,
    grad_column_stride,
    ROWS_PER_PROGRAM,
    UNITS: tl.constexpr,  # of N and the strides
    ACTIVATION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per ROWS_PER_PROGRAM x BLOCK_N strip: the gradient before the activation, and its column sums."""
    ACCUMULATOR: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    NAME: tl.constexpr = ACTIVATION[0]

    N, grad_row_stride, grad_column_stride = N * UNITS[0], grad_row_stride * UNITS[1], grad_column_stride * UNITS[2]
    strip = tl.program_id(1).to(tl.int64)
    columns, own_columns = tile_positions(tl.program_id(0), N, BLOCK_N, UNITS[0])
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for step in range(0, ROWS_PER_PROGRAM, BLOCK_M):
        rows = strip * ROWS_PER_PROGRAM + step + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None]
        safe_rows = tl.where(rows < M, rows, 0)[:, None]
        grad_ptrs = grad_ptr + safe_rows * grad_row_stride + columns[None, :] * grad_column_stride
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        if NAME != "":
            offsets = safe_rows * N + columns[None, :]
            saved = tl.load(saved_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)
            grad = gradient_before(grad.to(ACCUMULATOR), saved, ACTIVATION).to(grad_ptr.dtype.element_ty)
            tl.store(masked_ptr + offsets, grad, mask=inside & own_columns[None, :])
        if SUM:
            total += grad.to(ACCUMULATOR)
    if SUM:
        tl.store(sum_ptr + strip * N + columns, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=own_columns)


class MaskPlan(NamedTuple):
    """The launches that mask a gradient and sum its columns: over strips of rows, then over the strips' sums, until one
    row of sums is left."""

    stages: tuple[Plan, ...]
    strips: tuple[int, ...]  # of each stage
    needs_sum: bool
    sum_dtype: torch.dtype


def activation_backward(
    grad: Tensor, saved: Tensor | None, need_sum: bool, activation: Activation = RELU
) -> tuple[Tensor, Tensor | None]:
    """``(gz, gb)`` of the module's formulas, [M, N] and [N]. Without ``saved``, what the slope is had from, ``gz`` is
    ``grad``: there is no activation.

    The stages of the sum are added up in a fixed order: no atomics.
    """
    if saved is None:
        activation = NONE
    if activation == NONE and not need_sum:
        return grad, None
    plan = mask_plan((grad.device, grad.dtype), grad.shape, grad.stride(), activation, need_sum)
    masked = grad if saved is None else grad.new_empty(grad.shape)
    return masked, mask_and_sum(plan, grad, saved, masked)


def mask_and_sum(plan: MaskPlan, grad: Tensor, saved: Tensor | None, masked: Tensor) -> Tensor | None:
    """`activation_backward` into ``masked``, which is ``grad`` if there is no activation; the sum of the columns."""
    dtype, sums = grad.dtype, masked
    other = grad if saved is None else saved.contiguous()
    for stage, strips in zip(plan.stages, plan.strips, strict=True):
        if plan.needs_sum:
            sums = grad.new_empty((strips, grad.shape[1]), dtype=plan.sum_dtype)
        launch(stage, grad, other, masked, sums)
        grad = other = masked = sums
    return sums[0].to(dtype) if plan.needs_sum else None


@planned
def mask_plan(
    kind: tuple[torch.device, torch.dtype],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    activation: Activation,
    need_sum: bool,
) -> MaskPlan:
    """`activation_backward` of a gradient with this shape and these strides."""
    device, dtype = kind
    if activation == NONE and not need_sum:
        return MaskPlan((), (), False, dtype)
    first = column_sum_plan(kind, shape, strides, activation, need_sum)
    exact = accumulator_dtype(dtype)
    more, all_strips = column_sum_stages((device, exact), first.grid[1] if need_sum else 1, shape[1])
    return MaskPlan((first, *more), (first.grid[1], *all_strips), need_sum, exact if more else dtype)


def column_sum_stages(
    kind: tuple[torch.device, torch.dtype], strips: int, columns: int
) -> tuple[tuple[Plan, ...], tuple[int, ...]]:
    """The stages that add up the sums of so many ``strips``, and how many each of them leaves."""
    stages: list[Plan] = []
    while strips > 1:
        stages.append(column_sum_plan(kind, (strips, columns), (columns, 1), NONE, True))
        strips = stages[-1].grid[1]
    return tuple(stages), tuple(stage.grid[1] for stage in stages)


def column_sum_plan(
    kind: tuple[torch.device, torch.dtype],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    activation: Activation,
    need_sum: bool,
) -> Plan:
    """One stage: the second axis of its grid are the strips."""
    (device, dtype), (M, N) = kind, shape
    block_m, block_n = 16, 128  # short chains of additions: as exact as torch's own sum
    if dtype is torch.float64 and activation not in (NONE, RELU):
        block_n = 32
    if device.type == "cpu":  # the interpreter: few large tiles, none much larger than the tensor
        block_n = min(1024, triton.next_power_of_2(N))
    units = units_of(dtype, N, *strides)
    steps = min(max(4, triton.cdiv(triton.cdiv(M, 128), block_m)), triton.cdiv(M, block_m))
    rows_per_program = steps * block_m
    return Plan(
        activation_backward_kernel,
        (triton.cdiv(N, block_n), triton.cdiv(M, rows_per_program)),
        M,
        *(number // unit for number, unit in zip((N, *strides), units, strict=True)),
        rows_per_program,
        UNITS=units,
        ACTIVATION=activation,
        SUM=need_sum,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        **register_limit(device),
    )
