"""What the losses of a pair have in common: ``loss(input - target)``, element by element, then a reduction.

With d = input - target, f the loss of an element, n elements, and the gradient g of the loss::

    gi = g f'(d) / n for 'mean', else g f'(d);    gt = -gi
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .accepts import Tensors, loss_options, mismatch
from .examples import Audit, Example, Named, Sizes, transposed
from .op import Op, passes, wanted


def pair_loss(
    function: Callable[..., Tensor],
    module: type[torch.nn.Module],
    slope: Callable[..., Tensor],
    number: str = "",
    number_accepted: Callable[[float], bool] = lambda number: True,
) -> Op:
    """The record of such a loss. A call of it is ``(input, target, weight, reduction, number)``.

    In a call the weight of each element is None where the function has none, and the number is left out likewise.

    Args:
        function: torch's, which has the name of the op and of its kernels; or one of yours, in torch's own words.
        module: torch's, or one of yours.
        slope: f'(d), of d and the ``number``, as a differentiable torch expression.
        number: the name of the loss's own option, a float, if it has one.
        number_accepted: whether kernels take that float. torch gets the others, and what is no float.
    """

    def accepts(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *numbers: Any) -> str | None:
        if weight is not None:
            return "no kernel for element weights"
        if (unfit := loss_options(reduction) or mismatch(input, target)) is not None:
            return unfit
        if input.shape != target.shape:
            return "input and target shapes differ"
        for value in numbers:
            if not (isinstance(value, (int, float)) and number_accepted(value)):
                return f"no kernel for this {number}"
        return None

    def expression(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *numbers: Any) -> Tensor:
        options = dict(zip((number,), numbers, strict=False)) | ({} if weight is None else {"weight": weight})
        return function(input, target, reduction=reduction, **options)

    def gradients(grad_output: Tensor, input: Tensor, target: Tensor, reduction: str, *rest: Any) -> Tensors:
        grad = grad_output * slope(input - target, *rest[:-2])
        grad = grad / input.numel() if reduction == "mean" else grad
        return wanted(grad, -grad, needs=rest[-2:])

    def load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
        from ..kernels.pair_loss import pair_loss, pair_loss_backward

        return partial(pair_loss, name), partial(pair_loss_backward, name)

    def plain(input: Tensor, target: Tensor, reduction: str, *numbers: float) -> Tensor:
        return expression(input, target, None, reduction, *numbers)

    name = function.__name__
    float_number = f", float {number}" if number else ""
    return Op(
        name=name,
        replaces=(function,),
        module=module,
        accepts=accepts,
        autocast="float32",
        saved_bytes=passes(4),
        expression=expression,
        gradients=gradients,
        load=load,
        plain=plain,
        raw_arguments=lambda way, input, target, weight, *options: (input, target, *options),
        schema=f"Tensor input, Tensor target, str reduction{float_number} -> Tensor",
        backward_schema=f"Tensor grad_output, Tensor input, Tensor target, str reduction{float_number},"
        " bool need_input, bool need_target -> (Tensor, Tensor)",
        fake=fake_loss,
        fake_backward=lambda grad_output, input, target, *rest: fake_gradients(input, input + target, rest[-3:-1]),
        tensors=2,
        variables=2,
        examples=tuple(_examples("weight" in inspect.signature(function).parameters, number)),
        timed=timed_pairs(torch.randn),
        audit=partial(_audit, load, (1.0,) if number else ()),
    )


def fake_loss(input: Tensor, target: Tensor, reduction: str, *_: Any) -> Tensor:
    """The result without values, in the layout of an elementwise one."""
    return input + target if reduction == "none" else input.new_empty(())


def fake_gradients(input: Tensor, like: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Gradients in the layout of ``like``, empty where nobody needs one."""
    return [torch.empty_like(like) if need else input.new_empty(0) for need in needs]


def _audit(load: Callable[[], tuple[Callable[..., Any], ...]], numbers: tuple[Any, ...], audit: Audit) -> Iterator[Any]:
    """Each dtype with a mean, and one without reduction; aligned sizes and odd ones."""
    forward, backward = load()
    half, large, odd = audit.half_dtypes[0], 512 * 2048, 509 * 2047
    others = ((half, "none", large), (half, "mean", odd), (torch.float32, "none", odd))
    for dtype, reduction, size in [*((dtype, "mean", large) for dtype in audit.dtypes), *others]:
        a, each, options = audit.empty(size, dtype=dtype), reduction == "none", (reduction, *numbers)
        streams = partial(audit.streams, f"{size} {reduction}", size == odd)
        loss, found = streams(2 + each, forward, a, a, *options)
        yield from found
        yield from streams(4 + each, backward, loss, a, a, *options, True, True)[1]


def _examples(weights: bool, number: str) -> Iterator[Example]:
    def example(
        name: str, reduction: str, other_order: bool = False, weight: bool = False, value: float | None = None
    ) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            shape = sizes.rows, sizes.features
            input, target, factors = (torch.randn(shape, generator=generator) for _ in range(3))
            variables = {"input": input, "target": transposed(target) if other_order else target}
            return variables, {"weight": factors.abs()} if weight else {}

        return Example(
            f"{reduction}{name}", draw, {"reduction": reduction} | ({} if value is None else {number: value})
        )

    for reduction in ("none", "mean", "sum"):
        yield example("", reduction)
        yield example(", transposed target", reduction, other_order=True)
    if number:  # a default of 1 hides a missing factor, and 0.5 that a kernel for float64 rounds it to float32
        yield example(f", {number} 0.3", "none", value=0.3)
    if weights:
        yield example(", element weights", "mean", weight=True)


def timed_pairs(draw_target: Callable[..., Tensor], *shapes: tuple[int, int]) -> list[Example]:
    """Matrices of small and of large sizes."""

    def timed(shape: tuple[int, int]) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            target = draw_target(shape, generator=generator)
            return {"input": torch.randn(shape, generator=generator)}, {"target": target}

        return Example("x".join(map(str, shape)), draw)

    return [timed(shape) for shape in shapes or ((64, 10), (512, 2048))]
