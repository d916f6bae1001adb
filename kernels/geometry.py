"""Sizes of convolutions, poolings and batch norms. Without Triton: what decides and what pretends needs no kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from . import private


def conv_output_size(
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of a convolution's output; less than 1 where the kernel does not fit."""
    sizes = zip(input_size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


class Geometry(NamedTuple):
    """Kernel size, stride, padding and dilation of a convolution in three dimensions."""

    KERNEL: tuple[int, ...]
    STRIDE: tuple[int, ...]
    PADDING: tuple[int, ...]
    DILATION: tuple[int, ...]

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Geometry:
        """From one to three dimensions; the missing ones have a kernel of size 1."""
        missing = 3 - len(kernel)
        parts = zip((kernel, stride, padding, dilation), (1, 1, 0, 1), strict=True)
        return cls(*((fill,) * missing + tuple(part) for part, fill in parts))

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """`conv_output_size` in three dimensions."""
        return conv_output_size(input_size, *self)


POINTWISE: Final = Geometry.of((), (), (), ())


def three(size: Sequence[int]) -> tuple[int, ...]:
    """A size in one to three dimensions -> in three."""
    return (1,) * (3 - len(size)) + tuple(size)


class Window(NamedTuple):
    """The window of a pooling, a number for each spatial dimension, and whether the output's size is rounded up."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output; less than 1 where the window does not fit. Every window begins in the input or in
        the padding before it."""
        found = []
        for n, k, s, p, d in zip(input_size, *self[:4], strict=True):
            room = n + 2 * p - d * (k - 1) - 1
            size = (room + (s - 1 if self.ceil_mode else 0)) // s + 1
            found.append(size - 1 if self.ceil_mode and (size - 1) * s >= n + p else size)
        return tuple(found)


def is_large(*positions: int) -> bool:
    """Whether so many flat positions, and those of a last tile behind them, need 64 bits."""
    return max(positions) >= 2**31 - 2**12


# In training one launch does all up to so many positions of a channel: at most 8 tiles, one after the other, and that
# twice. Programs that share them would need two launches more, which take longer than the tiles on any GPU. In float64,
# which is there for its digits, sums stay short: of strips, and then of these.
WHOLE: Final = 2048


class Columns(NamedTuple):
    """[N, C, ...] as a batch norm's kernels see it: [outer, columns, inner], or [inner, columns] if ``last``.

    A channel has ``fold`` columns beside each other. ``whole``: a program has all positions of its channels.
    """

    outer: int
    columns: int
    inner: int
    fold: int
    last: bool
    whole: bool

    @classmethod
    def of(cls, shape: Sequence[int], channels_last: bool, training: bool, dtype: torch.dtype) -> Columns:
        """Of a dense tensor in this order in memory. Few positions beside each other would waste most of a tile."""
        samples, channels, *rest = shape
        positions = math.prod(rest)
        whole = training and samples * positions <= WHOLE and dtype is not torch.float64
        if channels_last or positions == 1:
            return cls(1, channels, samples * positions, 1, True, whole)
        if positions < 512 and samples >= 16 and not whole:
            return cls(1, channels * positions, samples, positions, True, False)
        return cls(samples, channels, positions, 1, False, whole)

    def row(self) -> int:
        """How many elements of a row follow each other in memory."""
        return self.columns if self.last else self.inner


CHANNELS_LAST: Final = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def memory_format_of(input: Tensor) -> torch.memory_format:
    """torch's choice for the output of a batch norm and the gradient of its input."""
    return torch.contiguous_format if input.is_contiguous() else private.memory_format(input)
