"""Launches of cross-entropy with class indices or class probabilities: one or two forward, one backward.

The formulas are in `fastops.kernels.cross_entropy_device`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from .chunked_logits import check_targets
from .configs import planned
from .cross_entropy_device import cross_entropy_backward_kernel, cross_entropy_kernel, cross_entropy_total_kernel
from .launch import Plan, accumulator_dtype, launch
from .tiles import tile_alignment


class CrossEntropyConfig(NamedTuple):
    """A tile of ``BLOCK_ROWS`` positions x ``BLOCK_CLASSES`` classes."""

    BLOCK_ROWS: int
    BLOCK_CLASSES: int
    num_warps: int


def cross_entropy_config(
    width: int, inner: int, classes_adjacent: bool, dense: bool, device: torch.device
) -> CrossEntropyConfig:
    """The tile for ``inner`` positions side by side, each with up to ``width`` classes and what pads them.

    ``dense``: the kernel needs more registers per lane, as the target distribution has a value for every class (class
    probabilities or label smoothing), or as rows do not start at multiples of 16 bytes.

    Where classes are adjacent in memory, a tile has few positions and many classes: all of them up to 4096, in a loop
    beyond that. In other layouts, images for instance, a tile has many positions and few classes. Each warp gets at
    least 512 elements, so that each of AMD's 64 lanes loads 16 bytes of a 16-bit dtype.
    """
    all_classes = triton.next_power_of_2(width)
    all_rows = triton.next_power_of_2(inner)
    if device.type == "cpu":  # the interpreter pays per operation, not per element
        block_classes = min(all_classes, 1 << 16)
        return CrossEntropyConfig(min(all_rows, (1 << 20) // block_classes), block_classes, 1)
    if not classes_adjacent:
        block_rows = min(all_rows, 64)
        return CrossEntropyConfig(block_rows, min(all_classes, 1024 // block_rows), 2)
    if width <= 1024:
        return CrossEntropyConfig(min(all_rows, 1024 // all_classes), all_classes, 2)
    block_classes = min(all_classes, 4096 if width <= 32768 or dense else 8192)
    return CrossEntropyConfig(1, block_classes, min(8, block_classes // 512))


class Layout(NamedTuple):
    """Shape and strides of a tensor [outer, classes, inner], or [outer, inner] with one element for all classes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
        """Of [N, C, D] or [N, D]. Where D is 1, the N positions become the inner dimension."""
        if shape[-1] == 1:
            shape, strides = (1, *shape[1:-1], shape[0]), (0, *strides[1:-1], strides[0])
        return cls(tuple(shape), strides)

    @property
    def kernel_strides(self) -> tuple[int, int, int]:
        """Outer, of classes, inner; 0 in a dimension of size 1, which Triton knows to be a multiple of 16."""
        strides = [0 if size == 1 else stride for size, stride in zip(self.shape, self.strides, strict=True)]
        return strides[0], 0 if len(strides) == 2 else strides[1], strides[-1]


ShapeAndStrides: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
Kind: TypeAlias = tuple[torch.device, torch.dtype]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, log_sum_exp, denominator)`` of logits [N, C, D], not empty, any strides.

    ``target``: int64 class indices [N, D], or class probabilities [N, C, D] of the input's dtype. ``weight``: [C] of
    the input's dtype. ``loss``: the input's dtype, [N, D] for 'none', else 0-d. ``log_sum_exp``, [N, D], and
    ``denominator``, 0-d, 1 unless ``reduction`` is 'mean': float32, float64 for float64. A class index out of range
    raises torch's IndexError on the CPU and stops the kernel on a GPU.
    """
    N, classes, D = input.shape
    if not target.is_floating_point():
        check_targets(target, classes, ignore_index)
    layouts = (input.shape, input.stride()), (target.shape, target.stride())
    options = reduction, ignore_index, float(label_smoothing)
    plan, total, exact = forward_plans((input.device, input.dtype), layouts, weight is not None, options)
    log_sum_exp = input.new_empty((N, D), dtype=exact)
    programs = plan.grid[0]
    if reduction == "none":
        loss, denominator = input.new_empty((N, D)), torch.ones((), dtype=exact, device=input.device)
    elif programs == 1:
        loss, denominator = input.new_empty(()), input.new_empty((), dtype=exact)
    else:
        loss, denominator = input.new_empty((2, programs + -programs % 4), dtype=exact)  # both from 16 bytes on
    launch(plan, input, target, input if weight is None else weight.contiguous(), loss, denominator, log_sum_exp)
    if total is None:
        return loss, log_sum_exp, denominator
    total_loss, total_denominator = input.new_empty(()), input.new_empty((), dtype=exact)
    launch(total, loss, denominator, total_loss, total_denominator)
    return total_loss, log_sum_exp, total_denominator


@planned
def forward_plans(
    kind: Kind, layouts: tuple[ShapeAndStrides, ShapeAndStrides], has_weight: bool, options: tuple[str, int, float]
) -> tuple[Plan, Plan | None, torch.dtype]:
    """`cross_entropy`, the sum of its programs' losses if there are several, and the accumulators' dtype.

    ``layouts``: of input and target; ``options``: reduction, ignore_index and label_smoothing.
    """
    input, target = (Layout.of(*each) for each in layouts)
    reduction, ignore_index, label_smoothing = options
    outer, classes, inner = input.shape
    constants, config = shared_constants(kind, has_weight, label_smoothing, input, target)
    programs = outer * triton.cdiv(inner, config.BLOCK_ROWS)
    mean, alone = reduction == "mean", programs == 1
    plan = Plan(
        cross_entropy_kernel,
        (programs,),
        classes,
        inner,
        *input.kernel_strides,
        *target.kernel_strides,
        ignore_index,
        SUM=reduction != "none",
        MEAN=mean,
        ONE_PROGRAM=alone,
        debug=not constants["PROBABILITIES"],  # compiles `device_assert` on the targets
        sanitize_overflow=False,  # and none of the overflow checks that `debug` would add
        **constants,
    )
    several = reduction != "none" and not alone
    how = {"MEAN": mean, "LABEL_SMOOTHING": label_smoothing, "BLOCK": 1024}
    total = Plan(cross_entropy_total_kernel, (1,), programs, **how) if several else None
    return plan, total, accumulator_dtype(kind[1])


def cross_entropy_backward(
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
    """Gradients of `cross_entropy` for logits and class probabilities, those that are needed, in their own layouts.

    ``grad_output`` is 0-d for 'mean' and 'sum', else [N, D] with any strides.
    """
    weight_sum = class_weight = input  # where there are no weights the kernel does not read them
    if weight is not None:
        class_weight = weight.contiguous()
        if label_smoothing > 0 and not target.is_floating_point():
            weight_sum = weight.sum(dtype=accumulator_dtype(input.dtype))
    if reduction != "none":
        grad_output = grad_output.expand(input.shape[::2])
    grad_input = torch.empty_like(input) if need_input else None
    grad_target = torch.empty_like(target) if need_target else None
    results = input if grad_input is None else grad_input, input if grad_target is None else grad_target
    tensors, layouts = (grad_output, input, target, *results), []
    for tensor in tensors:
        layouts.append((tensor.shape, tensor.stride()))
    options = ignore_index, float(label_smoothing), need_input, need_target
    plan = backward_plan((input.device, input.dtype), tuple(layouts), weight is not None, options)
    launch(plan, *tensors[:3], class_weight, weight_sum, log_sum_exp, denominator, *results)
    return grad_input, grad_target


@planned
def backward_plan(
    kind: Kind,
    layouts: tuple[ShapeAndStrides, ...],
    has_weight: bool,
    options: tuple[int, float, bool, bool],
) -> Plan:
    """`cross_entropy_backward`.

    ``layouts``: of the gradient of the loss, input, target, and the gradients of both, the input's if not needed.
    ``options``: ignore_index, label_smoothing, and whether input and target need a gradient.
    """
    grad_output, input, target, *gradients = (Layout.of(*each) for each in layouts)
    ignore_index, label_smoothing, need_input, need_target = options
    outer, classes, inner = input.shape
    constants, config = shared_constants(kind, has_weight, label_smoothing, input, target, *gradients)
    class_tiles = triton.cdiv(classes + int(constants["UNIT"]) - 1, config.BLOCK_CLASSES)
    return Plan(
        cross_entropy_backward_kernel,
        # With class probabilities, one program does all tiles of classes, as it needs the sum over all of them first.
        # CUDA's grids are at most 65535 wide along their second axis.
        (outer * triton.cdiv(inner, config.BLOCK_ROWS), 1 if constants["PROBABILITIES"] else min(class_tiles, 65535)),
        classes,
        inner,
        *grad_output.kernel_strides[::2],
        *input.kernel_strides,
        *target.kernel_strides,
        *gradients[0].kernel_strides,
        *gradients[1].kernel_strides,
        ignore_index,
        NEED_INPUT=need_input,
        NEED_TARGET=need_target,
        **constants,
    )


def unit_of(dtype: torch.dtype, input: Layout, *others: Layout) -> int:
    """How many elements are 16 bytes, if rows of classes are packed in all tensors but their length is no multiple of
    16 bytes; else 1.
    """
    outer, classes, inner = input.shape
    unit = 16 // dtype.itemsize
    packed = (0 if outer == 1 else inner * classes, 1, 0 if inner == 1 else classes)
    return unit if classes % unit and all(layout.kernel_strides == packed for layout in (input, *others)) else 1


def shared_constants(
    kind: Kind, has_weight: bool, label_smoothing: float, input: Layout, target: Layout, *gradients: Layout
) -> tuple[dict[str, bool | int | float], CrossEntropyConfig]:
    """The constants that both kernels take, and their tile."""
    (device, dtype), (_, classes, inner) = kind, input.shape
    rows_of_classes = [layout for layout in (input, target, *gradients) if len(layout.shape) == 3]
    probabilities, unit = len(target.shape) == 3, unit_of(dtype, *rows_of_classes)
    dense = probabilities or label_smoothing > 0 or unit > 1
    config = cross_entropy_config(classes + unit - 1, inner, input.strides[1] == 1, dense, device)
    row_strides = [stride for layout in rows_of_classes for stride in layout.kernel_strides[::2]]
    constants: dict[str, bool | int | float] = {
        "PROBABILITIES": probabilities,
        "HAS_WEIGHT": has_weight,
        "LABEL_SMOOTHING": label_smoothing,
        "ONE_TILE": classes + unit - 1 <= config.BLOCK_CLASSES,
        "ROW_ALIGNMENT": math.gcd(16, *row_strides),
        "INNER_ALIGNMENT": tile_alignment(inner, config.BLOCK_ROWS),
        "CLASSES_ALIGNMENT": 1 if unit > 1 else tile_alignment(classes, config.BLOCK_CLASSES),
        "UNIT": unit,
        **config._asdict(),
    }
    return constants, config
