"""Linear + cross-entropy: the logits ``z = x w^T + b`` live in the tiles of a matrix product and nowhere else.

Forward, a program takes a block of rows and a share of the classes, loops over the tiles of their product and keeps the
`chunked_logits.Statistics` of each row; as in an online softmax, a new maximum scales down the sums so far. The shares
are merged afterwards. For a block of rows whose targets are all ignored no product is computed.

Backward, with maximum m and sum e of the logits, l = m + log e, the sum T of the target distribution t and the
gradient g of each row's loss::

    gz_c = g (exp(z_c - m) T / e - t_c)
    gx = gz w,   gw = gz^T x,   gb = sum of gz over rows,   gq_c = g w_c (1 - s) (l - z_c)

gz is computed from the recomputed logits, for a chunk of rows and classes within the memory budget at a time;
``matmul.py`` computes the products with it. Computed inside of these two products gz would take no memory, but the
logits would be computed twice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked_logits import Statistics, Target, accumulated_gradients
from .configs import MatmulConfig, architecture, class_splits, matmul_config, narrow_config, planned, register_limit
from .launch import Plan, accumulator_dtype, input_precision, launch, units_of
from .matmul import matmul, product_tile, tile_of_program
from .tiles import tile_positions

_MATRICES = ("input", "row", "k"), ("weight", "class", "k"), ("target", "row", "class"), ("grad_target", "row", "class")
_STRIDES = [f"stride_{name}_{side}" for name, *sides in _MATRICES for side in sides]


@triton.jit
def logit_tile(
    input,  # [M, K]: pointer and strides
    weight,  # [N, K]: likewise
    bias_ptr,
    rows,
    columns,
    steps,
    K,
    K_UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of ``rows`` and ``columns``: [BLOCK_M, BLOCK_N]."""
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    # As in `matmul_kernel`: offsets are added up first.
    x_ptrs = input[0] + (rows[:, None] * input[1] + inner[None, :] * input[2])
    w_ptrs = weight[0] + (inner[:, None] * weight[2] + columns[None, :] * weight[1])
    z = product_tile(x_ptrs, w_ptrs, (input[2], weight[2]), 0, steps, K, K_UNIT, INPUT_PRECISION, EVEN_K)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns).to(z.dtype)[None, :]
    return z


@triton.jit
def dense_target(
    target,  # [M, N] probabilities: pointer and strides
    class_weight_ptr,
    rows,
    columns,
    uniform,  # LABEL_SMOOTHING / all classes, of the dtype to compute in
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
):
    """The dense part of t: [BLOCK_M, BLOCK_N]."""
    t = tl.zeros((rows.shape[0], columns.shape[0]), uniform.dtype) + uniform
    if PROBABILITIES:
        q = tl.load(target[0] + rows[:, None] * target[1] + columns[None, :] * target[2])
        t += q.to(uniform.dtype) * (1.0 - LABEL_SMOOTHING)
    if HAS_WEIGHT:
        t *= tl.load(class_weight_ptr + columns).to(uniform.dtype)[None, :]
    return t


@triton.jit
def at_target(target, start, own, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N]: whether a class of the tile from ``start`` is the row's target; compared in 32 bits, which take
    half the registers."""
    place = tl.minimum(tl.maximum(target - start, -1), BLOCK_N).to(tl.int32)
    lanes = tl.where(own, tl.arange(0, BLOCK_N), -2)
    return lanes[None, :] == place[:, None]


@triton.jit(
    do_not_specialize=["M", "N", "K", "tiles_per_split"],
    do_not_specialize_on_alignment=_STRIDES,
)
def linear_cross_entropy_kernel(
    input_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    target_ptr,  # [M] class indices or [M, N] probabilities
    class_weight_ptr,  # [N]
    statistics_ptr,  # [5, splits, M], contiguous
    M,
    N,
    K,
    all_classes,
    tiles_per_split,
    ignore_index,
    stride_input_row,
    stride_input_k,
    stride_weight_class,
    stride_weight_k,
    stride_target_row,
    stride_target_class,
    UNITS: tl.constexpr,  # of N, K and the strides
    HAS_BIAS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    CHECK_TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_M rows and ``tiles_per_split`` tiles of BLOCK_N classes."""
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32
    NOTHING: tl.constexpr = float("-inf")

    N, K = N * UNITS[0], K * UNITS[1]
    input = input_ptr, stride_input_row * UNITS[2], stride_input_k * UNITS[3]
    weight = weight_ptr, stride_weight_class * UNITS[4], stride_weight_k * UNITS[5]
    probabilities = target_ptr, stride_target_row * UNITS[6], stride_target_class * UNITS[7]
    uniform = tl.full((), LABEL_SMOOTHING, ACCUMULATOR) / all_classes
    tile_m, split = tl.program_id(0), tl.program_id(1)
    rows, own_rows = tile_positions(tile_m, M, BLOCK_M, 1)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(N, BLOCK_N))
    if not PROBABILITIES:
        target = tl.load(target_ptr + rows * probabilities[1])
        if CHECK_TARGET:
            valid = (target >= 0) & (target < N) | (target == ignore_index)
            tl.device_assert(valid, "Target is out of bounds.")
        counts = tl.max((target != ignore_index).to(tl.int32), 0)
        last = tl.where(counts > 0, last, first)

    steps = tl.cdiv(K, BLOCK_K)
    maximum = tl.full((BLOCK_M,), NOTHING, ACCUMULATOR)
    exponentials = tl.zeros((BLOCK_M,), ACCUMULATOR)
    products = tl.zeros((BLOCK_M,), ACCUMULATOR)
    mass = tl.zeros((BLOCK_M,), ACCUMULATOR)
    target_logit = tl.zeros((BLOCK_M,), ACCUMULATOR)
    if CHECK_TARGET:
        target_logit = tl.where(valid, target_logit, float("nan"))  # where assertions are not compiled
    for tile in range(first, last):
        columns, own = tile_positions(tile, N, BLOCK_N, UNITS[0])
        z = logit_tile(input, weight, bias_ptr, rows, columns, steps, K, UNITS[1], HAS_BIAS, INPUT_PRECISION, EVEN_K,
                       BLOCK_K)  # fmt: skip
        if not PROBABILITIES:
            is_target = at_target(target, tile * BLOCK_N, own, BLOCK_N)
            target_logit += tl.sum(tl.where(is_target, z, 0.0), 1)
        z = tl.where(own[None, :], z, NOTHING)
        new_maximum = tl.maximum(maximum, tl.max(z, 1))
        # Where all logits so far are -inf, subtract 0: -inf - (-inf) would be NaN.
        reference = tl.where(maximum == NOTHING, 0.0, maximum)
        new_reference = tl.where(new_maximum == NOTHING, 0.0, new_maximum)
        z -= new_reference[:, None]
        exponentials = exponentials * tl.exp(maximum - new_reference) + tl.sum(tl.exp(z), 1)
        if PROBABILITIES or LABEL_SMOOTHING > 0:
            t = dense_target(
                probabilities, class_weight_ptr, rows, columns, uniform, PROBABILITIES, HAS_WEIGHT, LABEL_SMOOTHING
            )
            products += (reference - new_reference) * mass + tl.sum(tl.where(own[None, :], t * z, 0.0), 1)
            mass += tl.sum(tl.where(own[None, :], t, 0.0), 1)
        maximum = new_maximum

    if not PROBABILITIES:  # a block of ignored rows, whose logits were not computed: finite values
        maximum = tl.where(counts > 0, maximum, 0.0)
        exponentials = tl.where(counts > 0, exponentials, 1.0)
    part = statistics_ptr + split.to(tl.int64) * M + rows
    step = tl.num_programs(1).to(tl.int64) * M
    tl.store(part, maximum, mask=own_rows)
    tl.store(part + step, exponentials, mask=own_rows)
    tl.store(part + 2 * step, products, mask=own_rows)
    tl.store(part + 3 * step, mass, mask=own_rows)
    tl.store(part + 4 * step, target_logit, mask=own_rows)


@triton.jit(do_not_specialize=["M", "N", "K", "first_class"], do_not_specialize_on_alignment=_STRIDES)
def logit_gradient_kernel(
    input_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    target_ptr,  # [M] class indices or [M, N] probabilities
    class_weight_ptr,  # [N]
    scale_ptr,  # [M]
    maximum_ptr,  # [M]
    exponentials_ptr,  # [M]
    mass_ptr,  # [M]
    share_ptr,  # [M]: t at the true class, its dense part apart
    grad_ptr,  # [M, N], contiguous
    grad_target_ptr,  # [M, N]
    M,
    N,
    K,
    first_class,
    all_classes,
    ignore_index,
    stride_input_row,
    stride_input_k,
    stride_weight_class,
    stride_weight_k,
    stride_target_row,
    stride_target_class,
    stride_grad_target_row,
    stride_grad_target_class,
    UNITS: tl.constexpr,  # of N, K and the strides
    NEED_TARGET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program per tile of the gradient of a chunk of logits, whose class 0 is ``first_class`` to the targets."""
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32

    N, K = N * UNITS[0], K * UNITS[1]
    input = input_ptr, stride_input_row * UNITS[2], stride_input_k * UNITS[3]
    weight = weight_ptr, stride_weight_class * UNITS[4], stride_weight_k * UNITS[5]
    probabilities = target_ptr, stride_target_row * UNITS[6], stride_target_class * UNITS[7]
    uniform = tl.full((), LABEL_SMOOTHING, ACCUMULATOR) / all_classes
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows, own_rows = tile_positions(tile_m, M, BLOCK_M, 1)
    columns, own_columns = tile_positions(tile_n, N, BLOCK_N, UNITS[0])
    own = own_rows[:, None] & own_columns[None, :]
    grad_ptrs = grad_ptr + rows[:, None] * N + columns[None, :]

    steps = tl.cdiv(K, BLOCK_K)
    if not PROBABILITIES:
        target = tl.load(target_ptr + rows * probabilities[1])
        steps = tl.where(tl.max((target != ignore_index).to(tl.int32), 0) > 0, steps, 0)  # no product where none counts
    z = logit_tile(input, weight, bias_ptr, rows, columns, steps, K, UNITS[1], HAS_BIAS, INPUT_PRECISION, EVEN_K,
                   BLOCK_K)  # fmt: skip
    z -= tl.load(maximum_ptr + rows)[:, None]
    exponentials = tl.load(exponentials_ptr + rows)
    scale = tl.load(scale_ptr + rows)[:, None]
    # z <= 0 but for rounding. In ignored rows, whose maximum was not computed, it may be large, exp(z) inf, and the
    # product with their scale of 0 NaN.
    grad = tl.exp(tl.where(z > 0, 0.0, z)) * (tl.load(mass_ptr + rows) / exponentials)[:, None]
    if PROBABILITIES or LABEL_SMOOTHING > 0:
        grad -= dense_target(
            probabilities, class_weight_ptr, rows, columns, uniform, PROBABILITIES, HAS_WEIGHT, LABEL_SMOOTHING
        )
    if not PROBABILITIES:
        is_target = at_target(target, first_class + tile_n * BLOCK_N, own_columns, BLOCK_N)
        grad -= tl.where(is_target, tl.load(share_ptr + rows)[:, None], 0.0)
    tl.store(grad_ptrs, (grad * scale).to(grad_ptr.dtype.element_ty), mask=own)
    if NEED_TARGET:
        grad = (tl.log(exponentials)[:, None] - z) * (1.0 - LABEL_SMOOTHING) * scale
        if HAS_WEIGHT:
            grad *= tl.load(class_weight_ptr + columns).to(ACCUMULATOR)[None, :]
        pointers = grad_target_ptr + rows[:, None] * (stride_grad_target_row * UNITS[8])
        pointers += columns[None, :] * (stride_grad_target_class * UNITS[9])
        tl.store(pointers, grad.to(grad_target_ptr.dtype.element_ty), mask=own)


class Logits(NamedTuple):
    """All that the plans of both kernels depend on, except the strides of the target."""

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int, int]  # rows, classes, inner dimension
    strides: tuple[int, ...]  # of input and weight
    aligned_addresses: bool
    precision: str
    all_classes: int
    ignore_index: int
    options: tuple[tuple[str, bool | float], ...]

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, bias: Tensor | None, target: Target) -> Logits:
        return cls(
            input.device,
            input.dtype,
            (input.shape[0], weight.shape[0], weight.shape[1]),
            (*input.stride(), *weight.stride()),
            (input.data_ptr() | weight.data_ptr()) % 16 == 0,
            input_precision(input),
            target.classes,
            target.ignore_index,
            (
                ("HAS_BIAS", bias is not None),
                ("PROBABILITIES", target.probabilities),
                ("HAS_WEIGHT", target.weight is not None),
                ("LABEL_SMOOTHING", float(target.label_smoothing)),
            ),
        )

    def constants(self, tall: bool = False) -> tuple[dict[str, bool | float | str], MatmulConfig]:
        """Those that both kernels take, and the tile: no wider than high if it is to be ``tall`` and has the rows."""
        (M, N, K), (row, inner, class_, inner_too) = self.sizes, self.strides
        wide = inner == inner_too == 1 and math.gcd(row, class_, K) * self.dtype.itemsize % 16 == 0
        kind, on_cpu = (self.device, self.dtype, self.precision), self.device.type == "cpu"
        wide = on_cpu or (wide and self.aligned_addresses)
        config = matmul_config(*kind, M, N, 16) if wide else narrow_config(*kind)
        if not on_cpu:  # the epilogue takes registers
            config = config._replace(BLOCK_K=min(config.BLOCK_K, 64))
        most = self.results_per_warp(wide) * config.num_warps
        if config.BLOCK_M * config.BLOCK_N > most:
            config = config._replace(BLOCK_N=most // config.BLOCK_M)
        if tall and M > config.BLOCK_M < config.BLOCK_N:
            config = config._replace(BLOCK_M=config.BLOCK_N, BLOCK_N=config.BLOCK_M)
        constants: dict[str, bool | float | str] = {
            "INPUT_PRECISION": self.precision,
            "EVEN_K": K % config.BLOCK_K == 0,
            **dict(self.options),
            **config._asdict(),
            **register_limit(self.device, True),
        }
        return constants, config

    def results_per_warp(self, wide: bool) -> int:
        """How many logits of a tile leave registers for the rest.

        Hopper's matrix units read operands from shared memory, and with class indices the epilogue needs little: there
        tiles of 256 x 128 took an H100 half the time of 128 x 64.
        """
        options = dict(self.options)
        dense = options["PROBABILITIES"] or options["LABEL_SMOOTHING"]
        if wide and not dense and self.dtype.itemsize == 2 and architecture(self.device) == "sm90":
            return 4096
        return 1024 if wide else 512

    def numbers(self, *others: int, strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of a kernel, with these ``strides`` of the targets, and the units of N, K and all strides."""
        M, N, K = self.sizes
        sized = N, K, *self.strides, *strides
        units = units_of(self.dtype, *sized)
        N, K, *rest = (number // unit for number, unit in zip(sized, units, strict=True))
        return (M, N, K, *others, self.ignore_index, *rest), units


def target_strides(target: Tensor) -> tuple[int, int]:
    return target.stride(0), 0 if target.dim() == 1 else target.stride(1)


def linear_cross_entropy(input: Tensor, weight: Tensor, bias: Tensor | None, target: Target, budget: int) -> Statistics:
    """`Statistics` [M] of the logits of input [M, K], weight [N, K] and bias [N], any strides, nothing empty.

    They are float32, float64 for float64. No logit is written to memory, so that no ``budget`` is needed.
    """
    plan = statistics_plan(Logits.of(input, weight, bias, target), target_strides(target.target))
    statistics = input.new_empty((5, plan.grid[1], input.shape[0]), dtype=accumulator_dtype(input.dtype))
    launch(
        plan,
        input,
        weight,
        input if bias is None else bias.contiguous(),
        target.target,
        input if target.weight is None else target.weight.contiguous(),
        statistics,
    )
    return Statistics(*statistics.unbind()).merged()


@planned
def statistics_plan(logits: Logits, target: tuple[int, int]) -> Plan:
    """`linear_cross_entropy`, as many programs along the second axis as share the classes; ``target``: its strides.

    Class indices are checked where all classes are there: those of a shard may be of another shard.
    """
    M, N, _ = logits.sizes
    constants, config = logits.constants(tall=True)
    tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    per_split = triton.cdiv(tiles_n, class_splits(logits.device, tiles_m, tiles_n))
    numbers, units = logits.numbers(logits.all_classes, per_split, strides=target)
    check = logits.all_classes == N and not constants["PROBABILITIES"]
    return Plan(
        linear_cross_entropy_kernel,
        (tiles_m, triton.cdiv(tiles_n, per_split)),
        *numbers,
        UNITS=units,
        CHECK_TARGET=check,
        debug=check,  # compiles `device_assert`
        sanitize_overflow=False,  # and none of the overflow checks that `debug` would add
        **constants,
    )


def linear_cross_entropy_backward(
    scale: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    maximum: Tensor,
    exponentials: Tensor,
    mass: Tensor,
    needs: tuple[bool, bool, bool, bool],
    budget: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for input, weight, bias and class probabilities, those that are needed.

    ``scale``, and ``maximum``, ``exponentials`` and ``mass`` from `chunked_logits.losses`, are [M], contiguous, in the
    accumulators' dtype. ``scale`` is the gradient of each row's loss, 0 for an ignored row. ``budget``: how many bytes
    of gradients of logits exist at a time.
    """
    exact = scale.dtype
    grad_target = torch.empty_like(target.target) if needs[3] else None
    share = scale if target.probabilities else target.own_weight(exact) * (1 - target.label_smoothing)

    def logit_gradients(rows: slice, own: slice) -> Tensor:
        x, w = input[rows], weight[own]
        b = None if bias is None else bias[own].contiguous()
        goal = target.target[rows, own] if target.probabilities else target.target[rows]
        grad_goal = goal if grad_target is None else grad_target[rows, own]
        factors = None if target.weight is None else target.weight[own].contiguous()
        grad = x.new_empty((x.shape[0], w.shape[0]))
        strides = *target_strides(goal), *target_strides(grad_goal)
        plan = gradient_plan(Logits.of(x, w, b, target), own.start, strides, grad_target is not None)
        launch(
            plan,
            x,
            w,
            x if b is None else b,
            goal,
            x if factors is None else factors,
            *(vector[rows] for vector in (scale, maximum, exponentials, mass, share)),
            grad,
            grad_goal,
        )
        return grad

    def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        matmul(a, b, out=out, add=add)

    gradients = accumulated_gradients(input, weight, logit_gradients, multiply, needs[:3], budget)
    return (*gradients, grad_target)


@planned
def gradient_plan(logits: Logits, first_class: int, targets: tuple[int, ...], need_target: bool) -> Plan:
    """The gradient of logits; ``targets``: strides of the target and of its gradient."""
    M, N, _ = logits.sizes
    constants, config = logits.constants()
    numbers, units = logits.numbers(first_class, logits.all_classes, strides=targets)
    return Plan(
        logit_gradient_kernel,
        (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),),
        *numbers,
        UNITS=units,
        NEED_TARGET=need_target,
        GROUP_M=8,
        **constants,
    )
