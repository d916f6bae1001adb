"""Sum with ReLU: ``y = relu(a + b)``, both gradients ``gy where not y <= 0, else 0``: ``kernels/add_relu.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from .accepts import Tensors, mismatch
from .examples import Audit, Example, Named, Sizes
from .op import Op, masked, passes


def _accepts(input: Tensor, other: Tensor) -> str | None:
    return mismatch(input, other) or (None if input.shape == other.shape else "the shapes differ")


def _expression(input: Tensor, other: Tensor) -> Tensor:
    return torch.add(input, other).relu_()


def _gradients(grad_output: Tensor, output: Tensor, *needs: bool) -> Tensors:
    return (masked(grad_output, output),)  # the same for both


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import add_relu

    def backward(grad_output: Tensor, output: Tensor, *needs: bool) -> Tensors:
        return (add_relu.add_relu_backward(grad_output, output),)

    return add_relu.add_relu, backward


def _save(needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], output: Tensor) -> tuple[Tensors, tuple[()]]:
    return (output,), ()


def _draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
    shape = sizes.rows, sizes.features
    return {name: torch.randn(shape, generator=generator) for name in ("input", "other")}, {}


def timed(*shape: int) -> Example:
    """A sum of this shape."""

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        return {name: torch.randn(shape, generator=generator) for name in ("input", "other")}, {}

    return Example("x".join(map(str, shape)), draw)


def _audit(audit: Audit) -> Iterator[Any]:
    """Each dtype; aligned sizes and odd ones."""
    forward, backward = _load()
    for dtype, size in [*((dtype, 512 * 2048) for dtype in audit.dtypes), (audit.half_dtypes[0], 509 * 2047)]:
        a, options = audit.empty(size, dtype=dtype), (str(size), size % 2 == 1, 3)
        result, found = audit.streams(*options, forward, a, a)
        yield from found
        yield from audit.streams(*options, backward, a, result)[1]


ADD_RELU: Final = Op(
    name="add_relu",
    fuses=("add", "relu"),
    accepts=_accepts,
    saved_bytes=passes(2),
    expression=_expression,
    gradients=_gradients,
    load=_load,
    plain=_expression,
    schema="Tensor input, Tensor other -> Tensor",
    backward_schema="Tensor grad_output, Tensor output, bool need_input, bool need_other -> Tensor",
    fake=lambda input, other, way: input + other,
    fake_backward=lambda grad_output, output, *_: torch.empty_strided(
        output.shape, output.stride(), dtype=output.dtype, device=output.device
    ),
    tensors=2,
    variables=2,
    save=_save,
    examples=(Example("two tensors", _draw),),
    timed=[timed(8, 64, 56, 56)],
    audit=_audit,
)
