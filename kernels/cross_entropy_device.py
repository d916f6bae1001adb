"""Cross-entropy: one online pass over the logits forward, one read and one write backward.

Per position, with logits ``x_c`` over C classes, weights ``w_c`` (1 if none), label smoothing ``s`` and ``g`` the
gradient of the position's loss::

    t_c = w_c ((1 - s) [c = target] + s / C)     class indices; t_c = 0 for all c where target = ignore_index
    t_c = w_c ((1 - s) q_c + s / C)              class probabilities q_c
    lse = log sum_c exp(x_c)
    loss = sum_c t_c (lse - x_c)                 'mean' divides the sum of losses by the denominator: the sum of the
                                                 weights of the targets that count, or the number of positions
    gx_c = g (exp(x_c - lse) sum_k t_k - t_c)
    gq_c = g w_c (1 - s) (lse - x_c)

Forward is an online softmax per lane: each lane of a tile keeps the maximum ``m`` of the logits it has seen and the
sums of ``exp(x - m)`` and, where t has a value for every class, of ``t (x - m)`` and ``t``. After the last tile the
lanes are reduced. Sums relative to the maximum do not cancel. The code avoids -inf minus -inf, which is NaN, unless all
logits of a position are -inf: there torch's loss is NaN too.

A program takes BLOCK_ROWS positions that lie side by side. Logits are seen as [outer, C, inner]: [N, C, D] as it
is, [N, C, 1] as [1, C, N].

Packed rows of classes whose length is no multiple of 16 bytes do not start at multiples of 16 bytes. Their tiles begin
at the last multiple before the row, so that loads and stores have 16 bytes each, except for stores at both ends of a
row and loads at the end of the tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import sum_of_partials
from .tiles import covering_tile


@triton.jit
def row_offsets(outer, rows, outer_stride, inner_stride, ALIGNMENT: tl.constexpr):
    """Offsets of the first class of these positions, all multiples of ``ALIGNMENT``."""
    offsets = outer * outer_stride + rows * inner_stride
    if ALIGNMENT > 1:
        offsets = tl.multiple_of(offsets, ALIGNMENT)
    return offsets


@triton.jit
def flat_positions(outer, rows, inner, ALIGNMENT: tl.constexpr):
    """Of ``rows`` in [outer, inner], whose ``ALIGNMENT`` (`tile_alignment`) divides ``inner``."""
    UNIT: tl.constexpr = ALIGNMENT if ALIGNMENT > 0 else -ALIGNMENT
    return outer * (inner // UNIT * UNIT) + rows  # equals inner, but the compiler sees that UNIT divides it


@triton.jit
def class_tile(step, starts, classes, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, UNIT: tl.constexpr):
    """Tile number ``step`` of rows at ``starts``: classes, whether a lane is the first with its class, and units.

    A unit is UNIT elements, 16 bytes that start at a multiple of 16, and is known by its first class. With UNIT > 1 a
    tile consists of whole units, the first and last of which may reach out of the row.
    """
    if UNIT > 1:
        lanes = step * BLOCK + tl.arange(0, BLOCK)
        shift = (starts % UNIT).to(tl.int32)[:, None]
        columns, units = lanes[None, :] - shift, (lanes // UNIT * UNIT)[None, :] - shift
        fresh = (columns >= 0) & (columns < classes)
    else:
        positions, first_met = covering_tile(step, classes, BLOCK, ALIGNMENT)
        columns, units, fresh = positions[None, :], positions[None, :], first_met[None, :]
    return columns, fresh, units


@triton.jit
def class_pointers(pointer, starts, columns, step, class_stride, UNIT: tl.constexpr):
    """[rows, columns] of the rows at ``starts``, of tile number ``step``."""
    if UNIT > 1:  # the same as below, from where the compiler sees the multiples, where ``class_stride`` is 1
        BLOCK: tl.constexpr = columns.shape[1]
        offsets = (starts // UNIT * UNIT)[:, None] + (tl.arange(0, BLOCK) + step * BLOCK)[None, :]
    else:
        offsets = starts[:, None] + columns * class_stride
    return pointer + offsets


@triton.jit
def load_classes(pointers, fresh, units, classes, UNIT: tl.constexpr):
    """The values in the ``fresh`` lanes of a `class_tile`; in the others any value."""
    if UNIT > 1:
        last = tl.program_id(0) == tl.num_programs(0) - 1
        readable = units < (classes - (UNIT - 1) if last else classes)  # no memory may be read behind the last row
        values = tl.load(pointers, mask=readable)
        if last:
            values = tl.where(readable, values, tl.load(pointers, mask=fresh & ~readable))
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def store_classes(pointers, values, own_rows, fresh, units, classes, UNIT: tl.constexpr):
    """Store the ``fresh`` lanes of a `class_tile` alone: another program writes the others."""
    values = values.to(pointers.dtype.element_ty)
    own = own_rows[:, None] & fresh
    if UNIT > 1:
        whole = (units >= 0) & (units <= classes - UNIT)
        tl.store(pointers, values, mask=own_rows[:, None] & whole)
        tl.store(pointers, values, mask=own & ~whole)
    else:
        tl.store(pointers, values, mask=own)


@triton.jit
def load_weights(weight_ptr, columns, fresh, UNIT: tl.constexpr):
    """Weights of the classes of a `class_tile`, anything in lanes that are not ``fresh``."""
    if UNIT > 1:
        weights = tl.load(weight_ptr + columns, mask=fresh)
    else:
        weights = tl.load(weight_ptr + columns)
    return weights


@triton.jit
def weighted_probabilities(
    probabilities,  # [rows, columns]
    weight_ptr,  # [classes]
    columns,
    fresh,
    uniform,  # LABEL_SMOOTHING / classes, of the dtype to compute in
    HAS_WEIGHT: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    UNIT: tl.constexpr,
):
    """``t`` of the module's formulas for a tile of class probabilities."""
    t = probabilities.to(uniform.dtype) * (1.0 - LABEL_SMOOTHING) + uniform
    if HAS_WEIGHT:
        t *= load_weights(weight_ptr, columns, fresh, UNIT).to(uniform.dtype)
    return t


@triton.jit
def store_total(loss_ptr, denominator_ptr, loss, weight, MEAN: tl.constexpr, LABEL_SMOOTHING: tl.constexpr):
    """The reduced loss from the sums of the losses and of the positions' weights, and what it was divided by.

    torch divides the part of the true classes and that of label smoothing each by the weights: 0 / 0 if they are 0.
    """
    if MEAN:
        if LABEL_SMOOTHING > 0:
            weight = tl.where(weight == 0.0, float("nan"), weight)
        tl.store(loss_ptr, (loss / weight).to(loss_ptr.dtype.element_ty))
        tl.store(denominator_ptr, weight)
    else:
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
        tl.store(denominator_ptr, 1.0)


@triton.jit(do_not_specialize_on_alignment=["inner"])
def cross_entropy_kernel(
    input_ptr,  # [outer, classes, inner]
    target_ptr,  # [outer, inner] class indices or [outer, classes, inner] probabilities
    weight_ptr,  # [classes]
    loss_ptr,  # [outer, inner], or [programs] partial sums, or the one result if there is one program
    denominator_ptr,  # [programs] partial sums of the positions' weights
    log_sum_exp_ptr,  # [outer, inner]
    classes,
    inner,
    input_outer_stride,
    input_class_stride,
    input_inner_stride,
    target_outer_stride,
    target_class_stride,
    target_inner_stride,
    ignore_index,
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    SUM: tl.constexpr,
    MEAN: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    INNER_ALIGNMENT: tl.constexpr,
    CLASSES_ALIGNMENT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """One program per BLOCK_ROWS positions, in a loop over tiles of BLOCK_CLASSES."""
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32
    NOTHING: tl.constexpr = float("-inf")

    program = tl.program_id(0).to(tl.int64)
    row_tiles = tl.cdiv(inner, BLOCK_ROWS)
    outer = program // row_tiles
    rows, own_rows = covering_tile(program % row_tiles, inner, BLOCK_ROWS, INNER_ALIGNMENT)
    input_starts = row_offsets(outer, rows, input_outer_stride, input_inner_stride, ROW_ALIGNMENT)
    TARGET_ALIGNMENT: tl.constexpr = ROW_ALIGNMENT if PROBABILITIES else 1
    target_starts = row_offsets(outer, rows, target_outer_stride, target_inner_stride, TARGET_ALIGNMENT)
    uniform = tl.full((), LABEL_SMOOTHING, ACCUMULATOR) / classes
    # Here, before the tiles are loaded: the assertion compiles to a function call, before which the compiler saves all
    # registers that are in use.
    if not PROBABILITIES:
        target = tl.load(target_ptr + target_starts)
        counts = target != ignore_index
        valid = (target >= 0) & (target < classes)
        tl.device_assert(valid | (target == ignore_index), "Target is out of bounds.")

    maximum = tl.full((BLOCK_ROWS, BLOCK_CLASSES), NOTHING, ACCUMULATOR)
    exponentials = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), ACCUMULATOR)  # sum of exp(x - m)
    products = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), ACCUMULATOR)  # sum of t (x - m)
    mass = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), ACCUMULATOR)  # sum of t

    class_tiles = 1 if ONE_TILE else tl.cdiv(classes + (UNIT - 1), BLOCK_CLASSES)
    for step in range(0, class_tiles):
        columns, fresh, units = class_tile(step, input_starts, classes, BLOCK_CLASSES, CLASSES_ALIGNMENT, UNIT)
        pointers = class_pointers(input_ptr, input_starts, columns, step, input_class_stride, UNIT)
        x = load_classes(pointers, fresh, units, classes, UNIT).to(ACCUMULATOR)
        x = tl.where(fresh, x, NOTHING)
        reference = tl.where(maximum == NOTHING, 0.0, maximum)
        if ONE_TILE:
            maximum = x
            exponentials += 1.0
        else:
            # One exponential serves both cases: it scales the old sum down, or is the new term.
            scale = tl.where(x == maximum, 1.0, tl.exp(-tl.abs(x - maximum)))
            exponentials = tl.where(x > maximum, exponentials * scale + 1.0, exponentials + scale)
            maximum = tl.where(x > maximum, x, maximum)

        if PROBABILITIES or LABEL_SMOOTHING > 0:
            if PROBABILITIES:
                pointers = class_pointers(target_ptr, target_starts, columns, step, target_class_stride, UNIT)
                t = load_classes(pointers, fresh, units, classes, UNIT)
                t = weighted_probabilities(t, weight_ptr, columns, fresh, uniform, HAS_WEIGHT, LABEL_SMOOTHING, UNIT)
            else:
                t = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), ACCUMULATOR) + uniform
                if HAS_WEIGHT:
                    t *= load_weights(weight_ptr, columns, fresh, UNIT).to(ACCUMULATOR)
            new_reference = tl.where(maximum == NOTHING, 0.0, maximum)
            if not ONE_TILE:
                products += (reference - new_reference) * mass
            products += tl.where(fresh, t * (x - new_reference), 0.0)
            mass += tl.where(fresh, t, 0.0)

    row_maximum = tl.max(maximum, 1)
    shift = tl.where(row_maximum == NOTHING, 0.0, row_maximum)
    log_sum = tl.log(tl.sum(exponentials * tl.exp(maximum - shift[:, None]), 1))
    position = flat_positions(outer, rows, inner, INNER_ALIGNMENT)
    tl.store(log_sum_exp_ptr + position, shift + log_sum, mask=own_rows)

    loss = tl.zeros((BLOCK_ROWS,), ACCUMULATOR)
    row_weight = tl.full((BLOCK_ROWS,), 1.0, ACCUMULATOR)
    if PROBABILITIES or LABEL_SMOOTHING > 0:
        reference = tl.where(maximum == NOTHING, 0.0, maximum)
        loss = log_sum * tl.sum(mass, 1) - tl.sum(products + (reference - shift[:, None]) * mass, 1)
    if not PROBABILITIES:
        safe_target = tl.where(valid, target, 0)
        if HAS_WEIGHT:
            row_weight = tl.load(weight_ptr + safe_target).to(ACCUMULATOR)
        target_x = tl.load(input_ptr + input_starts + safe_target * input_class_stride).to(ACCUMULATOR)
        loss += row_weight * (1.0 - LABEL_SMOOTHING) * (log_sum - (target_x - shift))
        loss = tl.where(counts, loss, 0.0)
        row_weight = tl.where(counts, row_weight, 0.0)

    if SUM:
        total_loss = tl.sum(tl.where(own_rows, loss, 0.0), 0)
        total_weight = tl.sum(tl.where(own_rows, row_weight, 0.0), 0)
        if ONE_PROGRAM:
            store_total(loss_ptr, denominator_ptr, total_loss, total_weight, MEAN, LABEL_SMOOTHING)
        else:
            tl.store(loss_ptr + program, total_loss)
            tl.store(denominator_ptr + program, total_weight)
    else:
        tl.store(loss_ptr + position, loss.to(loss_ptr.dtype.element_ty), mask=own_rows)


@triton.jit(do_not_specialize=["programs"])
def cross_entropy_total_kernel(
    partial_losses_ptr,  # [programs]
    partial_weights_ptr,  # [programs]
    loss_ptr,
    denominator_ptr,
    programs,
    MEAN: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the reduced loss and its denominator from all partial sums."""
    loss = sum_of_partials(partial_losses_ptr, programs, BLOCK)
    weight = sum_of_partials(partial_weights_ptr, programs, BLOCK)
    store_total(loss_ptr, denominator_ptr, loss, weight, MEAN, LABEL_SMOOTHING)


@triton.jit(do_not_specialize_on_alignment=["inner"])
def cross_entropy_backward_kernel(
    grad_output_ptr,  # [outer, inner]
    input_ptr,  # [outer, classes, inner]
    target_ptr,  # [outer, inner] class indices or [outer, classes, inner] probabilities
    weight_ptr,  # [classes]
    weight_sum_ptr,  # the sum of the weights
    log_sum_exp_ptr,  # [outer, inner], contiguous
    denominator_ptr,
    grad_input_ptr,  # [outer, classes, inner]
    grad_target_ptr,  # [outer, classes, inner]
    classes,
    inner,
    grad_output_outer_stride,
    grad_output_inner_stride,
    input_outer_stride,
    input_class_stride,
    input_inner_stride,
    target_outer_stride,
    target_class_stride,
    target_inner_stride,
    grad_input_outer_stride,
    grad_input_class_stride,
    grad_input_inner_stride,
    grad_target_outer_stride,
    grad_target_class_stride,
    grad_target_inner_stride,
    ignore_index,
    NEED_INPUT: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    INNER_ALIGNMENT: tl.constexpr,
    CLASSES_ALIGNMENT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """One program per BLOCK_ROWS positions (axis 0); along axis 1, programs take turns with the tiles of classes."""
    ACCUMULATOR: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32

    row_tiles = tl.cdiv(inner, BLOCK_ROWS)
    outer = tl.program_id(0).to(tl.int64) // row_tiles
    rows, own_rows = covering_tile(tl.program_id(0).to(tl.int64) % row_tiles, inner, BLOCK_ROWS, INNER_ALIGNMENT)
    input_starts = row_offsets(outer, rows, input_outer_stride, input_inner_stride, ROW_ALIGNMENT)
    TARGET_ALIGNMENT: tl.constexpr = ROW_ALIGNMENT if PROBABILITIES else 1
    target_starts = row_offsets(outer, rows, target_outer_stride, target_inner_stride, TARGET_ALIGNMENT)
    uniform = tl.full((), LABEL_SMOOTHING, ACCUMULATOR) / classes
    class_tiles = 1 if ONE_TILE else tl.cdiv(classes + (UNIT - 1), BLOCK_CLASSES)

    log_sum_exp = tl.load(log_sum_exp_ptr + flat_positions(outer, rows, inner, INNER_ALIGNMENT))
    scale = tl.load(grad_output_ptr + outer * grad_output_outer_stride + rows * grad_output_inner_stride)
    scale = scale.to(ACCUMULATOR) / tl.load(denominator_ptr)
    if PROBABILITIES:
        mass = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), ACCUMULATOR)
        if NEED_INPUT and not ONE_TILE:
            for step in range(0, class_tiles):
                columns, fresh, units = class_tile(step, target_starts, classes, BLOCK_CLASSES, CLASSES_ALIGNMENT, UNIT)
                pointers = class_pointers(target_ptr, target_starts, columns, step, target_class_stride, UNIT)
                t = load_classes(pointers, fresh, units, classes, UNIT)
                t = weighted_probabilities(t, weight_ptr, columns, fresh, uniform, HAS_WEIGHT, LABEL_SMOOTHING, UNIT)
                mass += tl.where(fresh, t, 0.0)
        target_sum = tl.sum(mass, 1)
    else:
        target = tl.load(target_ptr + target_starts)
        valid = (target >= 0) & (target < classes)
        target_sum = tl.full((BLOCK_ROWS,), 1.0, ACCUMULATOR)
        target_share = tl.full((BLOCK_ROWS,), 1.0 - LABEL_SMOOTHING, ACCUMULATOR)
        if HAS_WEIGHT:
            target_share *= tl.load(weight_ptr + tl.where(valid, target, 0)).to(ACCUMULATOR)
            target_sum = target_share
            if LABEL_SMOOTHING > 0:
                target_sum += uniform * tl.load(weight_sum_ptr)
        scale = tl.where(target == ignore_index, 0.0, scale)  # not 0 * scale: if all are ignored, scale is infinite

    for step in range(tl.program_id(1), class_tiles, tl.num_programs(1)):
        columns, fresh, units = class_tile(step, input_starts, classes, BLOCK_CLASSES, CLASSES_ALIGNMENT, UNIT)
        pointers = class_pointers(input_ptr, input_starts, columns, step, input_class_stride, UNIT)
        x = load_classes(pointers, fresh, units, classes, UNIT).to(ACCUMULATOR)
        log_probability = x - log_sum_exp[:, None]
        if ONE_TILE:
            # The whole row is in the tile: correct the rounding error of log_sum_exp, which a large logit makes large.
            row_sum = tl.sum(tl.where(fresh, tl.exp(log_probability), 0.0), 1)
            log_probability -= tl.log(row_sum)[:, None]
        if NEED_INPUT:
            if PROBABILITIES:
                pointers = class_pointers(target_ptr, target_starts, columns, step, target_class_stride, UNIT)
                t = load_classes(pointers, fresh, units, classes, UNIT)
                t = weighted_probabilities(t, weight_ptr, columns, fresh, uniform, HAS_WEIGHT, LABEL_SMOOTHING, UNIT)
                if ONE_TILE:
                    target_sum = tl.sum(tl.where(fresh, t, 0.0), 1)
            else:
                t = tl.where(columns == target[:, None], target_share[:, None], 0.0)
                if LABEL_SMOOTHING > 0:
                    if HAS_WEIGHT:
                        t += load_weights(weight_ptr, columns, fresh, UNIT).to(ACCUMULATOR) * uniform
                    else:
                        t += uniform
            grad = (tl.exp(log_probability) * target_sum[:, None] - t) * scale[:, None]
            # With an infinite scale torch subtracts infinity from infinity wherever t is not 0 for certain.
            if PROBABILITIES or LABEL_SMOOTHING > 0:
                grad += (scale - scale)[:, None]
            else:
                grad += tl.where(columns == target[:, None], (scale - scale)[:, None], 0.0)
            starts = row_offsets(outer, rows, grad_input_outer_stride, grad_input_inner_stride, ROW_ALIGNMENT)
            pointers = class_pointers(grad_input_ptr, starts, columns, step, grad_input_class_stride, UNIT)
            store_classes(pointers, grad, own_rows, fresh, units, classes, UNIT)
        if NEED_TARGET:
            grad = -log_probability * (1.0 - LABEL_SMOOTHING) * scale[:, None]
            if HAS_WEIGHT:
                grad *= load_weights(weight_ptr, columns, fresh, UNIT).to(ACCUMULATOR)
            starts = row_offsets(outer, rows, grad_target_outer_stride, grad_target_inner_stride, ROW_ALIGNMENT)
            pointers = class_pointers(grad_target_ptr, starts, columns, step, grad_target_class_stride, UNIT)
            store_classes(pointers, grad, own_rows, fresh, units, classes, UNIT)
