"""Sizes of a convolution. Without Triton: what decides and what pretends needs them where no kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple


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
