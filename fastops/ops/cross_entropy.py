"""Cross-entropy with class indices or class probabilities: ``kernels/cross_entropy_device.py``.

Per row, with logits x, p = softmax(x), l = log-sum-exp(x), the weighted target distribution t (`_distribution` builds
it), T = sum of t, and the row's scale r (its loss's gradient, over the denominator for 'mean')::

    loss = sum_c t_c (l - x_c)
    gx_c = r (p_c T - t_c)
    gq_c = r a_c (l - x_c),   a_c = d t_c / d q_c            (class probabilities q only)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import private
from ..kernels.launch import reshaped
from .accepts import REDUCTIONS, Tensors, constant, loss_options, mismatch
from .examples import Audit, Example, Named, Sizes, transposed
from .op import Op, passes, wanted


def is_index(value: Any) -> bool:
    """Whether this is an ``ignore_index`` for kernels."""
    return type(value) is int and -(2**63) <= value < 2**63


def _class_dim(input: Tensor) -> int:
    """Dimension of the classes: 1, or 0 for an input without a batch dimension."""
    return 0 if input.dim() == 1 else 1


def _accepts(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> str | None:
    if (unfit := mismatch(input, target, optional=(weight,), indices=target)) is not None:
        return unfit
    if input.dim() == 0:
        return "input has no class dimension"
    if not is_index(ignore_index):
        return "ignore_index is not a 64-bit integer"
    dim = _class_dim(input)
    if target.shape == input.shape:
        if target.dtype is not input.dtype or ignore_index >= 0:
            return "class probabilities need the dtype of the input and a negative ignore_index"
    elif target.dtype is not torch.int64:
        return f"no kernel for {target.dtype} class indices"
    elif target.shape != input.shape[:dim] + input.shape[dim + 1 :]:
        return "target shape does not match the input"
    if weight is not None and weight.shape != (input.shape[dim],):
        return "weight does not have one element per class"
    return constant(weight) or loss_options(reduction, label_smoothing)


def _expression(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    number = private.reduction_number(reduction)
    return private.cross_entropy_loss(input, target, weight, number, ignore_index, label_smoothing)


# Formulas -------------------------------------------------------------------------------------------------------------


def _distribution(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor | float]:
    """``(t, a)``: the weighted target distribution in the input's shape, and d t_c / d target_c (probabilities only).

    ``t_c = w_c ((1 - s) q_c + s / C)`` with q one-hot for class indices; zero where the target is ignored.
    """
    dim = _class_dim(input)
    classes = input.shape[dim]
    if target.dtype is torch.int64:
        kept = (target != ignore_index).unsqueeze(dim)
        index = target.unsqueeze(dim).where(kept, 0)
        hot = torch.zeros_like(input).scatter(dim, index, 1)
        distribution = (hot * (1 - label_smoothing) + label_smoothing / classes) * kept
    else:
        distribution = target * (1 - label_smoothing) + label_smoothing / classes
    if weight is None:
        return distribution, 1 - label_smoothing
    per_class = weight.reshape(-1, *[1] * (input.dim() - dim - 1))
    return distribution * per_class, per_class * (1 - label_smoothing)


def unscaled_gradients(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of each row's loss for its logits and for its target probabilities, in the input's shape."""
    dim = _class_dim(input)
    distribution, slope = _distribution(input, target, weight, ignore_index, label_smoothing)
    log_softmax = torch.log_softmax(input, dim)
    return log_softmax.exp() * distribution.sum(dim, keepdim=True) - distribution, -log_softmax * slope


def row_scale(grad_output: Tensor, input: Tensor, denominator: Tensor, reduction: str) -> Tensor:
    """What the loss's gradient multiplies each row with, broadcastable to the input's shape."""
    if reduction == "none":
        return grad_output.unsqueeze(_class_dim(input))
    return (grad_output / denominator).to(grad_output.dtype) if reduction == "mean" else grad_output


def _gradients(grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensors:
    _, denominator, reduction, ignore_index, label_smoothing, *needs = rest
    for_input, for_target = unscaled_gradients(input, target, weight, ignore_index, label_smoothing)
    scale = row_scale(grad_output, input, denominator, reduction)
    return wanted(scale * for_input, scale * for_target, needs=tuple(needs))


# The raw op: the loss, and for its backward pass the log-sum-exp of each row and the denominator of the mean ----------


def _plain(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _expression(input, target, weight, reduction, ignore_index, label_smoothing)
    exact = torch.promote_types(input.dtype, torch.float32)
    log_sum_exp = torch.logsumexp(input.to(exact), _class_dim(input))
    denominator = log_sum_exp.new_ones(())
    if reduction == "mean":
        kept = target != ignore_index
        if target.dtype is not torch.int64:
            denominator.fill_(log_sum_exp.numel())
        elif weight is None:
            denominator = kept.sum().to(exact)
        else:
            denominator = (weight.to(exact)[target.where(kept, 0)] * kept).sum()
        if label_smoothing:
            denominator = denominator.where(denominator != 0, torch.nan)
    return loss, log_sum_exp, denominator


def _row_shape(input: Tensor) -> torch.Size:
    """Shape of one loss per sample (and position): the input's without the class dimension."""
    dim = _class_dim(input)
    return input.shape[:dim] + input.shape[dim + 1 :]


def _rows_of_classes(tensor: Tensor) -> Tensor:
    """[C], [N, C] or [N, C, d1, ...] -> [N, C, D]."""
    return tensor.reshape(1, -1, 1) if tensor.dim() == 1 else tensor.reshape(*tensor.shape[:2], -1)


def _rows(tensor: Tensor, input: Tensor) -> Tensor:
    """Something per loss, in the shape of `_row_shape` -> [N, D]."""
    return tensor.reshape(1 if input.dim() == 1 else input.shape[0], -1)


@cache  # an import statement costs more than a kernel's launch
def _kernels() -> Any:
    from ..kernels import cross_entropy

    return cross_entropy


def _launch(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    goal = _rows(target, input) if target.dtype is torch.int64 else _rows_of_classes(target)
    loss, log_sum_exp, denominator = _kernels().cross_entropy(_rows_of_classes(input), goal, *options)
    shape = _row_shape(input)
    return loss if loss.dim() == 0 else reshaped(loss, shape), reshaped(log_sum_exp, shape), denominator


def _launch_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    denominator: Tensor,
    reduction: str,
    *rest: Any,
) -> Tensors:
    gradients = _kernels().cross_entropy_backward(
        _rows(grad_output, input) if reduction == "none" else grad_output,
        _rows_of_classes(input),
        _rows(target, input) if target.dtype is torch.int64 else _rows_of_classes(target),
        weight,
        _rows(log_sum_exp, input),
        denominator,
        reduction,
        *rest,
    )
    return tuple(None if gradient is None else reshaped(gradient, input.shape) for gradient in gradients)


def _fake(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *_: Any) -> tuple[Tensor, ...]:
    shape = _row_shape(input)
    exact = torch.promote_types(input.dtype, torch.float32)
    loss = input.new_empty(shape if reduction == "none" else ())
    return loss, input.new_empty(shape, dtype=exact), input.new_empty((), dtype=exact)


def _fake_backward(grad_output: Tensor, input: Tensor, target: Tensor, *rest: Any) -> list[Tensor]:
    return [
        reshaped(torch.empty_like(_rows_of_classes(like)), input.shape) if need else input.new_empty(0)
        for like, need in zip((input, target), rest[-3:-1], strict=True)
    ]


# Examples -------------------------------------------------------------------------------------------------------------


def _example(
    probabilities: bool,
    reduction: str,
    weight: bool = False,
    label_smoothing: float = 0.0,
    ignore: bool = False,
    layout: str = "",
) -> Example:
    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        classes = sizes.features
        batch, positions = {"vector": ((), ()), "images": ((2,), (1, sizes.rows))}.get(layout, ((sizes.rows,), ()))
        logits = torch.randn(*batch, classes, *positions, generator=generator)
        if layout == "transposed":
            logits = transposed(logits)
        variables: Named = {"input": logits}
        constants: Named = {}
        if probabilities:
            noise = torch.randn(logits.shape, generator=generator)
            variables["target"] = noise.softmax(0 if layout == "vector" else 1)
        else:
            constants["target"] = torch.randint(classes, (*batch, *positions), generator=generator)
            if ignore:
                constants["target"][:2] = torch.tensor([0, 1])
        if weight:
            constants["weight"] = torch.rand(classes, generator=generator) + 0.5
        return variables, constants

    options: Named = {"reduction": reduction, "label_smoothing": label_smoothing}
    if ignore:
        options["ignore_index"] = 1
    shown = {"weight": weight, "smoothing": label_smoothing, "ignore_index": ignore, layout: layout}
    name = ", ".join([reduction, *(word for word, used in shown.items() if used)])
    return Example(("probabilities, " if probabilities else "indices, ") + name, draw, options)


def _examples() -> Iterator[Example]:
    for reduction, weight, smoothing in product(REDUCTIONS, (False, True), (0.0, 0.1)):
        yield _example(False, reduction, weight, smoothing)
        yield _example(False, reduction, weight, smoothing, ignore=True)
        yield _example(True, reduction, weight, smoothing)
    for probabilities, layout in product((False, True), ("vector", "images", "transposed")):
        yield _example(probabilities, "mean", layout=layout)


def timed(rows: int, classes: int) -> Example:
    """For these sizes: class indices, the mean."""

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        logits = torch.randn(rows, classes, generator=generator)
        return {"input": logits}, {"target": torch.randint(classes, (rows,), generator=generator)}

    return Example(f"{rows}x{classes}", draw)


def _audit(audit: Audit) -> Iterator[Any]:
    """Few classes, many, probabilities, images, and odd numbers of classes."""
    half = audit.half_dtypes
    for dtype, sizes, probabilities in (
        (half[0], (4096, 16, 1), False),
        (half[0], (4096, 1024, 1), True),
        (half[0], (4096, 32000, 1), False),
        (half[0], (4096, 50257, 1), False),
        (half[0], (4093, 1021, 1), True),
        (half[0], (8, 16, 4096), False),
        (half[-1], (4096, 1024, 1), False),
        (torch.float32, (4096, 1024, 1), False),
        (torch.float32, (4093, 13, 1), False),
        (torch.float64, (4096, 1024, 1), True),
    ):
        N, classes, positions = sizes
        logits = audit.empty(*sizes, dtype=dtype)
        truth = logits if probabilities else audit.empty(N, positions, dtype=torch.int64)
        weight = audit.empty(classes, dtype=dtype) if probabilities else None
        common, options = (logits, truth, weight), ("mean", -100, 0.1 if probabilities else 0.0)
        kind = "probabilities" if probabilities else "indices"
        streams = partial(audit.streams, f"{N}x{classes}x{positions} {kind}", classes % 2 == 1)
        (loss, *saved), found = streams(1 + probabilities, _launch, *common, *options)
        yield from found
        arguments = (loss, *common, *saved, *options, True, probabilities)
        yield from streams(2 + 2 * probabilities, _launch_backward, *arguments)[1]


CROSS_ENTROPY: Final = Op(
    name="cross_entropy",
    replaces=(F.cross_entropy,),
    module=torch.nn.CrossEntropyLoss,
    accepts=_accepts,
    autocast="float32",
    saved_bytes=passes(4),
    expression=_expression,
    gradients=_gradients,
    load=lambda: (_launch, _launch_backward),
    plain=_plain,
    schema="Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, float label_smoothing"
    " -> (Tensor, Tensor, Tensor)",
    backward_schema="Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor log_sum_exp,"
    " Tensor denominator, str reduction, int ignore_index, float label_smoothing, bool need_input, bool need_target"
    " -> (Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    tensors=3,
    variables=2,
    examples=tuple(_examples()),
    timed=[timed(64, 10), timed(8192, 10), timed(256, 1000), timed(512, 32000)],
    audit=_audit,
)
