"""Linear + cross-entropy: `cross_entropy` of the logits z = x w^T + b, which are never kept.

With gz the gradient of the logits by the formulas of ``kernels/cross_entropy_device.py``::

    gx = gz w,   gw = gz^T x,   gb = sum of gz over rows

The raw op makes gz a tile at a time, forward and backward. Its shapes: input [N, K], linear weight [C P, K] and bias
[C P] for C classes at P positions, target [N, P] class indices or [N, C, P] probabilities. The positions do not depend
on each other and run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Final, cast

import torch
from torch import Tensor

from ..backport import LinearCrossEntropyLoss, LinearCrossEntropyOptions, linear_cross_entropy
from ..kernels import chunked_logits, onednn, private
from ..kernels.chunked_logits import Target
from ..kernels.launch import accumulator_dtype
from . import flops
from .accepts import Tensors, constant, loss_options, mismatch
from .cross_entropy import is_index, row_scale, unscaled_gradients
from .examples import Audit, Example, Named, Sizes
from .op import FUSES, Explanation, Op, wanted

# The way --------------------------------------------------------------------------------------------------------------


def _accepts(*call: Any) -> str | None:
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options, original = (
        call
    )
    unfit = (
        mismatch(input, linear_weight, optional=(linear_bias,))
        or mismatch(input, target, indices=target)
        or mismatch(input, optional=(weight,), indices=weight)
    )
    if unfit is not None:
        return unfit
    positions = linear_weight.shape[1:-1]
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        return "input and weight shapes do not make a linear layer"
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        return "bias does not have one element per output feature"
    if positions and input.dim() == 1:
        return "positions need a batched input"
    if target.shape == (*input.shape[:-1], *linear_weight.shape[:-1]):
        if target.dtype not in (input.dtype, torch.float32) or ignore_index is not None:
            return "class probabilities need the dtype of the input and no ignore_index"
    elif target.dtype is not torch.int64:
        return f"no kernel for {target.dtype} class indices"
    elif target.shape != (*input.shape[:-1], *positions):
        return "target shape does not match the input"
    if ignore_index is not None and not is_index(ignore_index):
        return "ignore_index is not a 64-bit integer"
    # float32 beside 16 bits comes from autocast; where nobody has cast, torch takes it with class probabilities alone.
    dtypes = (input.dtype,) if target.dtype is torch.int64 and original is None else (input.dtype, torch.float32)
    if weight is not None and (weight.shape != linear_weight.shape[:1] or weight.dtype not in dtypes):
        return "weight does not have one element of the input's dtype per class"
    if not (options is None or isinstance(options, LinearCrossEntropyOptions)):
        return "options are not of torch's class"
    return constant(weight) or loss_options(reduction, label_smoothing)


def _budget(input: Tensor, linear_weight: Tensor, options: LinearCrossEntropyOptions | None) -> int:
    """How many bytes of logits may exist at a time: what ``options`` say, else `chunked_logits.BUDGET`."""
    if options is None:
        return chunked_logits.BUDGET
    if (budget := getattr(options, "memory_budget", None)) is not None:
        return int(budget)
    rows, classes = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
    own = private.chunk_rows(options, rows, input.shape[-1], linear_weight.shape[0], input)
    return chunked_logits.BUDGET if own is None else max(1, own * classes * input.element_size())


def _exceeds_budget(input: Tensor, linear_weight: Tensor, *rest: Any) -> bool:
    """Whether all logits at once would be more than was asked for, of a call that kernels accept."""
    return _logits_size(input, linear_weight) > _budget(input, linear_weight, rest[-2])


def _surely_fit(input: Tensor, linear_weight: Tensor, *rest: Any) -> bool:
    return private.surely(_logits_size(input, linear_weight) <= _budget(input, linear_weight, rest[-2]))


def _logits_size(input: Tensor, linear_weight: Tensor) -> int:
    """Of all of them, in bytes."""
    rows, classes = input.numel() // input.shape[-1], linear_weight.numel() // linear_weight.shape[-1]
    return rows * classes * input.element_size()


_BUDGET_HOLDS: Final = Explanation("onednn", "all logits at once would exceed the memory budget")
_LOGITS_FIT: Final = Explanation("torch", "all logits fit into the memory budget at once")


def _cpu(*call: Any) -> Explanation:
    if (unfit := _accepts(*call)) is not None:
        return Explanation("torch", unfit)
    return _LOGITS_FIT if _surely_fit(*call) else _BUDGET_HOLDS


def _gpu(*call: Any) -> Explanation:
    return _LOGITS_FIT if _surely_fit(*call) else FUSES


# torch's expression ---------------------------------------------------------------------------------------------------


def _expression(*call: Any) -> Tensor:
    *arguments, options, original = call
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing = original or arguments
    return linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=None if hasattr(options, "memory_budget") else options,
    )


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *rest: Any,
) -> Tensors:
    _, _, _, denominator, _, _, _, reduction, ignore_index, label_smoothing, _, *needs = rest
    exact = torch.promote_types(input.dtype, torch.float32)
    x, w = input.to(exact), linear_weight.to(exact)
    z = x @ w.t() if linear_bias is None else x @ w.t() + linear_bias.to(exact)
    z = z.reshape(input.shape[0], -1, target.shape[-1])
    for_z, for_target = unscaled_gradients(z, target, weight, ignore_index, label_smoothing)
    scale = row_scale(grad_output, z, denominator, reduction)
    gz = (scale * for_z).reshape(input.shape[0], -1)
    found = (gz @ w).to(input.dtype), (gz.t() @ x).to(input.dtype), gz.sum(0).to(input.dtype)
    return wanted(*found, (scale * for_target).to(target.dtype), needs=tuple(needs))


# The raw op -----------------------------------------------------------------------------------------------------------


def _raw_arguments(way: str, *call: Any) -> tuple[Any, ...]:
    input, linear_weight, target, bias, weight, reduction, ignore_index, label_smoothing, options, original = call
    classes, positions = linear_weight.shape[0], linear_weight.shape[1:-1].numel()
    rows = 1 if input.dim() == 1 else input.shape[0]
    indices = target.dtype is torch.int64
    may_make = way.startswith("onednn") and torch.is_grad_enabled() and not target.requires_grad
    budget = _budget(input, linear_weight, options)
    if may_make and not _rows_fit(input, classes, budget):
        may_make = False  # said here, so that a graph for batches of any size says it for all of them
    makes = (may_make and tensor is not None and tensor.requires_grad for tensor in (input, linear_weight, bias))
    return (
        input.reshape(rows, -1),
        linear_weight.reshape(classes * positions, -1),
        None if bias is None else bias.reshape(-1),
        target.reshape(rows, positions) if indices else target.reshape(rows, classes, positions),
        weight,
        reduction,
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
        original is not None or torch.float32 in (target.dtype, None if weight is None else weight.dtype),
        budget,
        *makes,
    )


def _finish(loss: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, *_: Any) -> Tensor:
    if loss.dim() == 0:
        return loss
    return loss.reshape(
        target.shape if target.dtype is torch.int64 else (*input.shape[:-1], *linear_weight.shape[1:-1])
    )


def _positions(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Iterator[tuple[Tensor, Tensor | None, Target]]:
    """Weight [C, K], bias [C] and target of each position."""
    count = target.shape[-1]
    classes = linear_weight.shape[0] // count
    for p in range(count):
        bias = None if linear_bias is None else linear_bias[p::count]
        yield linear_weight[p::count], bias, Target(target[..., p], weight, ignore_index, label_smoothing, classes)


def _forward(statistics: Callable[..., chunked_logits.Statistics], *arguments: Any) -> tuple[Tensor, ...]:
    """``(loss, maximum, exponentials, mass, denominator)`` of the raw arguments up to the budget."""
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, *rest = arguments
    float32_loss, budget = rest
    exact = accumulator_dtype(input.dtype)
    indices = not target.is_floating_point()
    results, denominator = [], torch.zeros((), dtype=exact, device=input.device)
    for w, b, goal in _positions(linear_weight, linear_bias, target, weight, ignore_index, label_smoothing):
        if indices:
            chunked_logits.check_targets(goal.target, goal.classes, ignore_index)
        results.append(chunked_logits.losses(statistics(input, w, b, goal, budget), goal))
        if reduction == "mean":
            denominator += goal.own_weight(exact).sum() if indices else len(input)
    loss, maximum, exponentials, mass = (torch.stack(parts, 1) for parts in zip(*results, strict=True))
    denominator = _divisor(denominator, label_smoothing) if reduction == "mean" else denominator.fill_(1)
    if reduction != "none":
        loss = loss.sum() / denominator
    return loss.to(exact if float32_loss else input.dtype), maximum, exponentials, mass, denominator


ROWS_AT_ONCE = 64  # if so many rows of logits fit the budget, products of them are as fast as of tiles


def _forward_with_gradients(needs: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], Tensors]:
    """As `_forward` for one position, and the gradients of the reduced loss."""
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, _, budget = arguments
    goal = Target(target[..., 0], weight, ignore_index, label_smoothing, len(linear_weight))
    scale = torch.ones_like(input[:, 0])
    if not goal.probabilities:
        chunked_logits.check_targets(goal.target, goal.classes, ignore_index)
        scale = goal.kept().to(input.dtype)
    denominator = scale.new_ones(())
    if reduction == "mean":
        denominator = scale.sum() if goal.probabilities else goal.own_weight(scale.dtype).sum()
        denominator = _divisor(denominator, label_smoothing)
        scale = _finite_or_nan(scale / denominator).where(scale != 0, 0)  # and not 0 / 0, where nothing counts
    layer = (input, linear_weight, linear_bias)
    (loss, *saved), gradients = onednn.linear_cross_entropy_with_gradients(*layer, goal, scale, needs, budget)
    return (loss.sum() / denominator, *(part.unsqueeze(1) for part in saved), denominator), gradients


def _divisor(weights: Tensor, label_smoothing: float) -> Tensor:
    """What the mean divides by. torch divides the true classes' part and label smoothing's each: 0 / 0 if it is 0."""
    return weights.where(weights != 0, torch.nan) if label_smoothing else weights


def _finite_or_nan(scale: Tensor) -> Tensor:
    """``scale``, where it is infinite NaN: torch subtracts infinity from infinity in the gradient of every row."""
    return scale + (scale - scale)


def _backward(backward: Callable[..., Tensors], grad_output: Tensor, *arguments: Any) -> Tensors:
    """The gradients, of the arguments of a backward pass without what a forward pass may have made of them."""
    input, linear_weight, linear_bias, target, weight, maximum, exponentials, mass, denominator, *rest = arguments
    reduction, ignore_index, label_smoothing, budget, *all_needs = rest
    needs = tuple(all_needs)
    scale = _finite_or_nan(grad_output.to(mass.dtype) / denominator)
    scale = scale if reduction == "none" else scale.expand_as(mass)
    if not target.is_floating_point():
        scale = scale.where(target != ignore_index, 0)  # and not 0 * scale: the mean of no target has scale inf
    count, parts = target.shape[-1], []
    positions = _positions(linear_weight, linear_bias, target, weight, ignore_index, label_smoothing)
    for p, (w, b, goal) in enumerate(positions):
        saved = (saved[:, p].contiguous() for saved in (maximum, exponentials, mass))
        parts.append(backward(scale[:, p].contiguous(), input, w, b, goal, *saved, needs, budget))
    if count == 1:
        grad_input, grad_weight, grad_bias, grad_target = parts[0]
        return grad_input, grad_weight, grad_bias, None if grad_target is None else grad_target.unsqueeze(-1)
    inputs, weights, biases, targets = zip(*parts, strict=True)
    return (
        torch.stack(inputs).sum(0) if needs[0] else None,
        torch.stack(weights, 1).reshape(linear_weight.shape) if needs[1] else None,
        torch.stack(biases, 1).reshape(-1) if needs[2] else None,
        torch.stack(targets, -1) if needs[3] else None,
    )


@cache  # an import statement costs more than a kernel's launch
def _kernels() -> Any:
    from ..kernels import linear_cross_entropy

    return linear_cross_entropy


def _launch(*arguments: Any) -> tuple[Tensor, ...]:
    input = arguments[0]
    results = _forward(_kernels().linear_cross_entropy, *arguments[:-3])
    return (*results, *(input.new_empty(0) for _ in range(3)))


def _plain(*arguments: Any) -> tuple[Tensor, ...]:
    common, makes = arguments[:-3], arguments[-3:]
    input, gradients = common[0], cast(Tensors, (None, None, None))
    if _makes_gradients(*arguments):
        results, gradients = _forward_with_gradients(makes, *common)
    else:
        results = _forward(onednn.linear_cross_entropy, *common)
    return (*results, *(input.new_empty(0) if gradient is None else gradient for gradient in gradients))


def _makes_gradients(*arguments: Any) -> bool:
    """Whether the forward pass makes the gradients too: on a CPU, if the rows are one sum and enough of them fit."""
    input, linear_weight, _, target, _, reduction, *_, budget = arguments[:-3]
    if not any(arguments[-3:]) or reduction == "none" or target.shape[-1] != 1:
        return False
    return _rows_fit(input, linear_weight.shape[0], budget)


def _rows_fit(input: Tensor, classes: int, budget: int) -> bool:
    """Whether the logits of all rows, or of `ROWS_AT_ONCE`, do."""
    each = classes * input.element_size()
    return ROWS_AT_ONCE * each <= budget or private.surely(input.shape[0] * each <= budget)


def is_finite(scalar: Tensor) -> bool:
    return math.isfinite(scalar)


def _made(arguments: tuple[Any, ...]) -> Tensors | None:
    """The gradients that the forward pass made, if those are all that a backward pass is asked for.

    They are made on the CPU alone, where a value may be read. One that is not finite must not meet the zeros in them.
    """
    made, needs = arguments[10:13], arguments[-4:]
    if not any(part.numel() for part in made) or needs[3] or not is_finite(arguments[0]):
        return None
    if not all(part.numel() for part, need in zip(made, needs[:3], strict=True) if need):
        return None
    return tuple(part if need else None for part, need in zip(made, needs[:3], strict=True))


def _overwrite(grad_output: Tensor, *arguments: Any) -> Tensors | None:
    """What the forward pass made, scaled where it is."""
    made = _made((grad_output, *arguments))
    return made and (*(None if part is None else part.mul_(grad_output) for part in made), None)


def _on_tiles(backward: Callable[[], Callable[..., Tensors]], *arguments: Any) -> Tensors:
    if (made := _made(arguments)) is not None:
        return *(None if part is None else arguments[0] * part for part in made), None
    return _backward(backward(), *arguments[:10], *arguments[13:])


def _save(needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], results: Any) -> tuple[Tensors, tuple[Any, ...]]:
    return (*arguments[:5], *results[1:]), (*arguments[5:8], arguments[9])


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *raw, _ = arguments
    input, linear_weight, _, target, _, reduction, _, _, float32_loss, _, *makes = raw
    makes = makes if _makes_gradients(*raw) else [False] * 3
    exact = torch.promote_types(input.dtype, torch.float32)
    shape = (input.shape[0], target.shape[-1])
    made = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    return (
        input.new_empty(shape if reduction == "none" else (), dtype=exact if float32_loss else input.dtype),
        *(input.new_empty(shape, dtype=exact) for _ in range(3)),
        input.new_empty((), dtype=exact),
        *(input.new_empty(size if need else 0) for size, need in zip(made, makes, strict=True)),
    )


def _fake_backward(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *rest: Any
) -> list[Tensor]:
    *_, need_input, need_weight, need_bias, need_target, _ = rest
    return [
        input.new_empty(input.shape if need_input else 0),
        input.new_empty(linear_weight.shape if need_weight else 0),
        input.new_empty(linear_weight.shape[:1] if need_bias else 0),
        target.new_empty(target.shape) if need_target else input.new_empty(0),
    ]


# Examples -------------------------------------------------------------------------------------------------------------


def _examples() -> Iterator[Example]:
    def example(name: str, probabilities: bool = False, weight: bool = False, **options: Any) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            classes = sizes.outputs
            variables = {
                "input": torch.randn(sizes.rows, sizes.features, generator=generator),
                "linear_weight": torch.randn(classes, sizes.features, generator=generator) / sizes.features**0.5,
                "linear_bias": torch.randn(classes, generator=generator),
            }
            constants: Named = {"weight": torch.rand(classes, generator=generator) + 0.5} if weight else {}
            if probabilities:
                variables["target"] = torch.randn(sizes.rows, classes, generator=generator).softmax(1)
            else:
                constants["target"] = torch.randint(classes, (sizes.rows,), generator=generator)
                constants["target"][:2] = torch.tensor([0, 1])
            return variables, constants

        return Example(name, draw, options)

    yield example("indices, mean")
    yield example("indices, none, weight", weight=True, reduction="none")
    yield example("indices, sum, smoothing, ignore_index", label_smoothing=0.1, ignore_index=1, reduction="sum")
    yield example("probabilities, mean, weight", probabilities=True, weight=True)


def timed(rows: int, features: int, classes: int) -> Example:
    """A head of these sizes: class indices, the mean."""

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        weight = torch.randn(classes, features, generator=generator) / features**0.5
        variables = {"input": torch.randn(rows, features, generator=generator), "linear_weight": weight}
        return variables, {"target": torch.randint(classes, (rows,), generator=generator)}

    return Example(f"{rows}x{features}-{classes}", draw)


def _audit(audit: Audit) -> Iterator[Any]:
    """Class indices or all options of probabilities; sizes of 16, of 8, odd ones, and ones that fill a GPU."""
    kernels, half = _kernels(), audit.half_dtypes[0]
    aligned, eighths, odd, large = (512, 768, 1024), (512, 1000, 1000), (509, 783, 1021), (4096, 1024, 32000)
    for dtype, precision, *_ in audit.tables():
        of_half = [(eighths, False), (odd, False), (large, False)] if dtype is half else []
        for sizes, dense in [(aligned, True), (large, True), *of_half]:
            M, K, N = sizes
            x, w, b = (audit.empty(*shape, dtype=dtype) for shape in ((M, K), (N, K), (N,)))
            truth = audit.empty(M, N, dtype=dtype) if dense else audit.empty(M, dtype=torch.int64)
            goal = Target(truth, b if dense else None, -100, 0.1 if dense else 0.0, N)
            vector = audit.empty(M, dtype=accumulator_dtype(dtype))
            saved, needs = (goal, vector, vector, vector), (True, True, True, dense)
            shape = f"{M}x{K}x{N} {'probabilities' if dense else 'indices'}"
            for launcher, arguments in (
                (kernels.linear_cross_entropy, (x, w, b, goal, 1 << 30)),
                (kernels.linear_cross_entropy_backward, (vector, x, w, b, *saved, needs, 1 << 30)),
            ):
                for launch in audit.launches(shape, None, precision, launcher, *arguments)[1]:
                    if launch.request["kernel"].startswith(kernels.__name__):  # the products behind are linear's
                        yield launch._replace(wide=sizes != odd)


LINEAR_CROSS_ENTROPY: Final = Op(
    name="linear_cross_entropy",
    replaces=(linear_cross_entropy,),
    module=LinearCrossEntropyLoss,
    fuses=("linear", "cross_entropy"),
    accepts=_accepts,
    cpu=_cpu,
    gpu=_gpu,
    saved_bytes=lambda *_: math.inf,
    onednn=True,
    saves_memory=_exceeds_budget,
    expression=_expression,
    gradients=_gradients,
    load=lambda: (_launch, partial(_on_tiles, lambda: _kernels().linear_cross_entropy_backward)),
    plain=_plain,
    plain_backward=partial(_on_tiles, lambda: onednn.linear_cross_entropy_backward),
    schema="Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, str reduction,"
    " int ignore_index, float label_smoothing, bool float32_loss, int budget, bool make_input, bool make_weight,"
    " bool make_bias -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="Tensor grad_output, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? weight, Tensor maximum, Tensor exponentials, Tensor mass, Tensor denominator, Tensor made_input,"
    " Tensor made_weight, Tensor made_bias, str reduction, int ignore_index, float label_smoothing, int budget,"
    " bool need_input, bool need_weight, bool need_bias, bool need_target -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    tensors=5,
    flops=(flops.head, flops.head_backward),
    variables=4,
    raw_arguments=_raw_arguments,
    finish=_finish,
    save=_save,
    overwrite=_overwrite,
    examples=tuple(_examples()),
    timed=[timed(1024, 256, 16000), timed(4096, 512, 32000)],
    audit=_audit,
)
