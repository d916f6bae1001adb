"""Binary cross-entropy of logits: ``kernels/bce.py``.

With input x, target y, weight w and weight of positives v (1 if none), n elements, s the sigmoid and the gradient g of
the loss, over n for 'mean'::

    loss = w ((1 - y) x - (1 + (v - 1) y) log s(x))
    gx = g w ((1 - y) s(x) - v y s(-x))
    gy = g w (log s(-x) - v log s(x))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .accepts import REDUCTIONS, Tensors, constant, loss_options, mismatch
from .examples import Audit, Example, Named, Sizes
from .op import Op, passes, wanted
from .pair import fake_gradients, timed_pairs


def _accepts(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> str | None:
    if (unfit := loss_options(reduction) or mismatch(input, target, optional=(weight, pos_weight))) is not None:
        return unfit
    if input.shape != target.shape:
        return "input and target shapes differ"
    for factor in (weight, pos_weight):
        if factor is None:
            continue
        sizes = (1,) * (input.dim() - factor.dim()) + tuple(factor.shape)
        if len(sizes) != input.dim() or any(own not in (1, size) for own, size in zip(sizes, input.shape, strict=True)):
            return "a weight does not broadcast to the input's shape"
    return constant(weight, pos_weight)


def _expression(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def _plain(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
    return torch.binary_cross_entropy_with_logits(input, target, weight, pos_weight, REDUCTIONS[reduction])


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    *needs: bool,
) -> Tensors:
    scale = grad_output / input.numel() if reduction == "mean" else grad_output
    scale = scale if weight is None else scale * weight
    v = 1 if pos_weight is None else pos_weight
    for_input = (1 + (v - 1) * target) * torch.sigmoid(input) - v * target  # whose derivative has no difference
    for_target = -input if pos_weight is None else F.logsigmoid(-input) - v * F.logsigmoid(input)
    return wanted(scale * for_input, scale * for_target, needs=needs)


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import bce

    return bce.bce, bce.bce_backward


def _fake(input: Tensor, target: Tensor, weight: Any, pos_weight: Any, reduction: str, way: str) -> Tensor:
    return target + target if reduction == "none" else input.new_empty(())  # the layout of an elementwise result


def _examples() -> Iterator[Example]:
    def example(name: str, reduction: str, weights: tuple[str, ...] = ()) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            shape = sizes.rows, sizes.features
            variables = {
                "input": torch.randn(shape, generator=generator),
                "target": torch.rand(shape, generator=generator),
            }
            return variables, {name: torch.rand(sizes.features, generator=generator) + 0.5 for name in weights}

        return Example(f"{reduction}{name}", draw, {"reduction": reduction})

    for reduction in ("none", "mean", "sum"):
        yield example("", reduction)
        yield example(", weight, pos_weight", reduction, ("weight", "pos_weight"))


def _audit(audit: Audit) -> Iterator[Any]:
    """Each dtype, with a weight for each element and one for each column; odd sizes without the latter."""
    forward, backward = _load()
    shapes = [*((dtype, (512, 2048)) for dtype in audit.dtypes), (audit.half_dtypes[0], (509, 2047))]
    for dtype, (rows, columns) in shapes:
        a, odd = audit.empty(rows, columns, dtype=dtype), columns % 2 == 1
        streams = partial(audit.streams, f"{rows}x{columns}", odd)
        arguments: tuple[Any, ...] = (a, a, a, None if odd else a[0], "mean")
        loss, found = streams(3, forward, *arguments)
        yield from found
        yield from streams(5, backward, loss, *arguments, True, True)[1]


BINARY_CROSS_ENTROPY_WITH_LOGITS: Final = Op(
    name="binary_cross_entropy_with_logits",
    replaces=(F.binary_cross_entropy_with_logits,),
    module=torch.nn.BCEWithLogitsLoss,
    accepts=_accepts,
    autocast="float32",
    saved_bytes=passes(4),
    expression=_expression,
    gradients=_gradients,
    load=_load,
    plain=_plain,
    schema="Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str reduction -> Tensor",
    backward_schema="Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight,"
    " str reduction, bool need_input, bool need_target -> (Tensor, Tensor)",
    fake=_fake,
    fake_backward=lambda grad_output, input, target, *rest: fake_gradients(input, target + target, rest[-3:-1]),
    tensors=4,
    variables=2,
    examples=tuple(_examples()),
    timed=timed_pairs(torch.rand, (512, 2048)),
    audit=_audit,
)
