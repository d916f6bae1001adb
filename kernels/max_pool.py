"""Maximum pooling of ReLU in two dimensions: one launch forward, one backward.

With ``w`` a window of the input ``x``, ``m`` its maximum, ``y`` the output and ``g`` its gradient::

    y  = relu(m), which is the maximum of relu(x) over w
    gx = sum of g over the windows whose first maximum it is, and is not <= 0

A window's *tap* is the number of the position in it that its maximum comes from, by rows: the first one of several, and
the last one of NaNs, as torch has it. The forward pass writes a byte for each window, its tap or ``DEAD`` where ReLU
lets no gradient through. That and the gradient are all that the backward pass reads.

One kernel serves both layouts: tiles are [positions, channels] where channels are last, ``LAST``, else [rows of planes,
columns]. The second dimension is the contiguous one. No access has a mask: what lies in the padding or past an edge is
read from the nearest position inside and does not count, and past an edge equal results are written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import planned, register_limit
from .elementwise import in_layout
from .geometry import Window, is_large, memory_format_of
from .launch import Plan, launch, units_of
from .tiles import tile_positions

DEAD: Final = tl.constexpr(255)
_SIZES = ["columns", "height", "width", "out_height", "out_width"]  # which vary from one batch of images to the next


@triton.jit
def tile_of(rows, columns, LARGE: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of the program's tile of [rows, columns]. Past an edge the last ones are repeated."""
    POSITION: tl.constexpr = tl.int64 if LARGE else tl.int32
    tiles = (columns + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // tiles).to(POSITION) * BLOCK_R + tl.arange(0, BLOCK_R)
    column, _ = tile_positions(tl.program_id(0) % tiles, columns, BLOCK_C, UNIT)
    return tl.minimum(row, rows - 1)[:, None], column.to(POSITION)[None, :]


@triton.jit
def place(row, column, height, width, LAST: tl.constexpr):
    """Sample or plane, and the position in it, of an element of [rows, columns]."""
    if LAST:
        line = row // width
        return line // height, line % height, row % width
    else:
        return row // height, row % height, column


@triton.jit
def offset_of(outer, y, x, column, height, width, columns, LAST: tl.constexpr):
    """The reverse, for the position inside that is nearest to ``y`` and ``x``."""
    y = tl.maximum(tl.minimum(y, height - 1), 0)
    x = tl.maximum(tl.minimum(x, width - 1), 0)
    pixel = (outer * height + y) * width + x
    if LAST:
        return pixel * columns + column
    else:
        return pixel


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=_SIZES)
def relu_max_pool_kernel(
    input_ptr,  # [samples, height, width, channels] if LAST, else [planes, height, width], contiguous
    output_ptr,  # [rows, columns]: the same with the output's size, contiguous
    taps_ptr,  # the same
    rows,
    columns,
    height,
    width,
    out_height,
    out_width,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    SAVE: tl.constexpr,
    LAST: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,  # of columns
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_R x BLOCK_C windows."""
    ACC: tl.constexpr = tl.float64 if input_ptr.dtype.element_ty == tl.float64 else tl.float32
    columns = columns * UNIT
    row, column = tile_of(rows, columns, LARGE, UNIT, BLOCK_R, BLOCK_C)
    outer, y, x = place(row, column, out_height, out_width, LAST)
    y = y * STRIDE[0] - PADDING[0]
    x = x * STRIDE[1] - PADDING[1]
    best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), ACC)
    tap = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    WIDTH: tl.constexpr = KERNEL[1]  # by name: in a loop Triton 3.6 takes an element of a tuple for no constant
    for i in range(KERNEL[0]):
        h = y + i * DILATION[0]
        for j in tl.static_range(WIDTH):
            w = x + j * DILATION[1]
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            value = tl.load(input_ptr + offset_of(outer, h, w, column, height, width, columns, LAST)).to(ACC)
            better = inside & ((value > best) | (value != value))
            best = tl.where(better, value, best)
            tap = tl.where(better, i * KERNEL[1] + j, tap)
    dead = best <= 0
    offsets = row * columns + column
    tl.store(output_ptr + offsets, tl.where(dead, 0.0, best).to(output_ptr.dtype.element_ty))
    if SAVE:
        tl.store(taps_ptr + offsets, tl.where(dead, DEAD, tap).to(tl.uint8))


@triton.jit
def window_of(position, number, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """In one dimension, the window that begins ``number`` before the last one that a padded position may lie in, and
    which of its elements that position is: a negative number beyond all taps if it is none."""
    window = position // STRIDE - number
    element = position - window * STRIDE
    real = (window >= 0) & (window < size) & (element % DILATION == 0) & (element < KERNEL * DILATION)
    return window, tl.where(real, element // DILATION, -256)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=_SIZES)
def relu_max_pool_backward_kernel(
    grad_ptr,  # [samples, out_height, out_width, channels] if LAST, else [planes, out_height, out_width], contiguous
    taps_ptr,  # the same
    grad_input_ptr,  # [rows, columns]: the same with the input's size, contiguous
    rows,
    columns,
    height,
    width,
    out_height,
    out_width,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    WINDOWS: tl.constexpr,  # that a position may lie in, in each dimension
    LAST: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,  # of columns
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per BLOCK_R x BLOCK_C positions, each of which looks at the windows that it lies in, in order."""
    ACC: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    columns = columns * UNIT
    row, column = tile_of(rows, columns, LARGE, UNIT, BLOCK_R, BLOCK_C)
    outer, y, x = place(row, column, height, width, LAST)
    y += PADDING[0]
    x += PADDING[1]
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    ACROSS: tl.constexpr = WINDOWS[1]  # by name, as above
    for i in range(WINDOWS[0]):
        h, top = window_of(y, WINDOWS[0] - 1 - i, out_height, KERNEL[0], STRIDE[0], DILATION[0])
        for j in tl.static_range(ACROSS):
            w, left = window_of(x, WINDOWS[1] - 1 - j, out_width, KERNEL[1], STRIDE[1], DILATION[1])
            offsets = offset_of(outer, h, w, column, out_height, out_width, columns, LAST)
            tap = tl.load(taps_ptr + offsets).to(tl.int32)
            grad = tl.load(grad_ptr + offsets).to(ACC)
            total += tl.where(tap == top * KERNEL[1] + left, grad, 0.0)
    tl.store(grad_input_ptr + (row * columns + column), total.to(grad_input_ptr.dtype.element_ty))


# Launches -------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the launches depend on besides the tensors."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the input
    channels_last: bool
    window: Window

    def plan(self, kernel: Any, size: Sequence[int], **constants: Any) -> Plan:
        """The launch of a kernel whose result has this ``size`` in the place of the input's."""
        samples, channels, height, width = self.shape
        out = self.window.output_size((height, width))
        lines, (result_height, result_width) = samples if self.channels_last else samples * channels, size
        rows, columns = lines * result_height, result_width
        if self.channels_last:
            rows, columns = rows * result_width, channels
        (unit,) = units_of(self.dtype, columns)
        block_r, block_c = tile_shape(self.device, self.dtype, rows, columns, unit)
        return Plan(
            kernel,
            (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),),
            rows,
            columns // unit,
            height,
            width,
            *out,
            KERNEL=self.window.kernel,
            STRIDE=self.window.stride,
            PADDING=self.window.padding,
            DILATION=self.window.dilation,
            **constants,
            LAST=self.channels_last,
            LARGE=is_large(samples * channels * height * width, samples * channels * out[0] * out[1]),
            UNIT=unit,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
            **register_limit(self.device, everywhere=True),
        )


def tile_shape(device: torch.device, dtype: torch.dtype, rows: int, columns: int, unit: int) -> tuple[int, int]:
    """Rows and columns of a tile: fewer where each element has an address of its own, or two registers.

    The interpreter pays per operation, not per element.
    """
    elements, wide = (1024 if unit == 1 or dtype is torch.float64 else 2048), triton.next_power_of_2(columns)
    if device.type == "cpu":
        elements, wide = 1 << 16, min(wide, 1 << 10)
    elif wide > 64:  # of the tiles that overlap least the largest
        wide = min((128, 64, 32), key=lambda block: -(-columns // block) * block)
    return min(triton.next_power_of_2(rows), elements // wide), wide


@planned
def forward_plan(call: Call, save_taps: bool) -> tuple[Plan, tuple[int, ...]]:
    """The launch, and the output's shape."""
    size = call.window.output_size(call.shape[2:])
    return call.plan(relu_max_pool_kernel, size, SAVE=save_taps), (*call.shape[:2], *size)


@planned
def backward_plan(call: Call) -> Plan:
    """The launch that makes the gradient of the input."""
    window, (height, width) = call.window, call.shape[2:]
    windows = tuple(
        -(-((k - 1) * d + 1) // s) for k, s, d in zip(window.kernel, window.stride, window.dilation, strict=True)
    )
    return call.plan(relu_max_pool_backward_kernel, (height, width), WINDOWS=windows)


def relu_max_pool(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    save_taps: bool,
) -> tuple[Tensor, Tensor]:
    """``max_pool2d(relu(input))`` of [N, C, H, W], nothing empty, two numbers of each kind, no window all in padding.

    Returns:
        The output, [N, C, H', W'], channels-last if the input is; and with ``save_taps`` the windows' taps, uint8 in
        the same layout, else empty.
    """
    layout = memory_format_of(input)
    window = Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    call = Call(input.device, input.dtype, input.shape, layout is torch.channels_last, window)
    plan, shape = forward_plan(call, save_taps)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    taps = torch.empty_like(output, dtype=torch.uint8) if save_taps else input.new_empty(0, dtype=torch.uint8)
    launch(plan, input.contiguous(memory_format=layout), output, taps if save_taps else output)
    return output, taps


def relu_max_pool_backward(
    grad_output: Tensor,
    taps: Tensor,
    input_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
) -> Tensor:
    """The gradient of `relu_max_pool` for its input, channels-last if that was. Tensors may lie otherwise since."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    window = Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    call = Call(grad_output.device, grad_output.dtype, tuple(input_shape), channels_last, window)
    taps = taps.contiguous(memory_format=layout)
    grad = in_layout(grad_output, taps.stride())
    result = torch.empty(call.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    launch(backward_plan(call), grad, taps, result)
    return result
