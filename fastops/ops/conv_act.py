"""Convolutions in one, two and three dimensions with any activation: ``kernels/conv.py``."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from ..kernels.geometry import conv_output_size
from . import conv
from .op import Op
from .product_act import with_activation


def _shape(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, *_: Any
) -> tuple[int, ...]:
    size = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return input.shape[0], *size, weight.shape[0]


def _make(dimensions: int) -> Op:
    product = conv.CONV[dimensions, False]
    return with_activation(
        f"conv_act{dimensions}d",
        product,
        conv.CONV[dimensions, True],
        load=conv.load,
        differentiable=product.plain,
        shape=_shape,
        channels=1,
        names=("tanh", "hardswish"),
        timed=[conv.timed(8, 56, 64, 64, 3, padding=1)] if dimensions == 2 else (),
    )


CONV_ACT: Final = {dimensions: _make(dimensions) for dimensions in (1, 2, 3)}
