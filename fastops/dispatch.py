"""Decides, for every call of `fastops.functional`, which way it goes: Triton kernels, oneDNN, or the torch expression.

A decision reads devices, dtypes and shapes, never values and never a clock: the same call goes the same way in every
run, by a rule or as `fastops.tune` once found faster. Arguments without a kernel, and wrong ones too, take the torch
expression: so every feature and every error message is torch's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from . import fit, winners
from .kernels import chunked_logits, onednn

BACKENDS: Final = ("auto", "triton", "onednn", "torch")

WRONG_IN_INTERPRETER: Final = "Triton's interpreter computes bfloat16 wrongly"
interpreter_has_bfloat16 = False  # the tests mend the interpreter and say so here
triton_installed = importlib.util.find_spec("triton") is not None
_INTERPRETER = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class Explanation(NamedTuple):
    """Which way a call goes (``"triton"``, ``"onednn"`` or ``"torch"``) and why."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    return name


try:
    _selected = _checked(os.environ.get("FASTOPS_BACKEND", "auto"))
except ValueError as error:
    raise ValueError(f"environment variable FASTOPS_BACKEND: {error}") from None


class backend:
    """Context manager that selects the backend of all calls inside it.

    ``"auto"`` (the default, or what the environment variable ``FASTOPS_BACKEND`` says) takes the fastest way known for
    device and shape; ``"triton"`` the kernels wherever one exists for the arguments; ``"onednn"`` the same Functions
    with oneDNN products on the CPU; ``"torch"`` the torch expression. Process-wide, like the flags of
    ``torch.backends``. A backward pass runs on the backend of its forward.

    Raises:
        ValueError: if ``name`` is no backend.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name)
        self._outer: list[str] = []

    def __enter__(self) -> None:
        global _selected
        self._outer.append(_selected)
        _selected = self._name

    def __exit__(self, *_: object) -> None:
        global _selected
        _selected = self._outer.pop()


def selected_backend() -> str:
    """The backend that `backend` or ``FASTOPS_BACKEND`` selected."""
    return _selected


_onednn_from = onednn.FASTER_FROM_MULTIPLY_ADDS

# Autocast -------------------------------------------------------------------------------------------------------------


_PRODUCTS: Final = (
    "linear",
    "linear_relu",
    "linear_cross_entropy",
    *(f"conv{relu}{n}d" for relu in ("", "_relu") for n in (1, 2, 3)),
)


def autocast_dtype(op: str, input: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants ``op`` to run (a loss in float32), or None where it is off."""
    if (
        torch._C._is_any_autocast_enabled()
        and isinstance(input, Tensor)
        and input.device.type != "meta"
        and torch.is_autocast_enabled(input.device.type)
    ):
        is_product = op in _PRODUCTS
        return torch.get_autocast_dtype(input.device.type) if is_product else torch.float32
    return None


def under_autocast(function: Callable[..., Any], dtype: torch.dtype, *arguments: Any, **keywords: Any) -> Any:
    """Call ``function`` as autocast would: floating tensors (float64 excepted) as ``dtype``, autocast off inside.

    Casting here, once, keeps the gradients of the originals in their own dtype.
    """

    keywords = {name: autocast_to(dtype, value) for name, value in keywords.items()}
    with torch.autocast(arguments[0].device.type, enabled=False):
        return function(*(autocast_to(dtype, value) for value in arguments), **keywords)


def autocast_to(dtype: torch.dtype, value: Any) -> Any:
    """A floating tensor (float64 excepted) as ``dtype``; anything else as it is."""
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if eligible else value


# What was measured ----------------------------------------------------------------------------------------------------

tuned = winners.anything()  # or `fastops.tune` ran in this process
_asked: list[winners.Key] | None = None


@contextlib.contextmanager
def by_the_rule() -> Iterator[list[winners.Key]]:
    """What was measured does not count inside; what would have been looked for is in the list."""
    global tuned, _asked
    outer = tuned, _asked
    tuned, _asked = True, []
    try:
        yield _asked
    finally:
        tuned, _asked = outer


def _measured(
    op: str, unfit: Callable[[], str | None], tensors: tuple[Tensor | None, ...], *options: Any
) -> Explanation | None:
    """The way that won when this call was measured, if it was and can still be gone."""
    first = tensors[0]
    if _selected != "auto" or not isinstance(first, Tensor) or first.is_meta or torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in fit.PLAIN[:2] or tensor.layout is not torch.strided or tensor.is_nested
        ):
            return None
    known = winners.of(first.device)
    if not known and _asked is None:
        return None
    key = winners.key(op, tensors, options)
    if key is None:
        return None
    if _asked is not None:
        _asked.append(key)
        return None
    way = known.get(key)
    return None if way is None or (way != "torch" and unfit() is not None) else _MEASURED[way]


# The rule -------------------------------------------------------------------------------------------------------------

_SELECTED_TORCH = Explanation("torch", "backend 'torch' is selected")
_TRITON = Explanation("triton", "a Triton kernel exists for these arguments")
_ONEDNN_SELECTED = Explanation("onednn", "backend 'onednn' is selected")
_ONEDNN_PAYS = Explanation("onednn", "oneDNN's product is faster than MKL's on this processor at this size")
_ATEN_IS_FASTER = Explanation("torch", "on this processor ATen is at least as fast at this size")
_ATEN_IS_ONEDNN = Explanation("torch", "ATen's convolution on a CPU is oneDNN's already")
_NO_PRODUCT = Explanation("torch", "there is no product here that oneDNN could take")
_BUDGET_HOLDS = Explanation("onednn", "all logits at once would exceed the memory budget")
_LOGITS_FIT = Explanation("torch", "all logits fit into the memory budget at once")
_MEASURED: Final = {way: Explanation(way, "fastops.tune measured it the fastest here") for way in winners.WAYS}
_WRONG_IN_INTERPRETER = Explanation("torch", WRONG_IN_INTERPRETER)
_NO_TRITON = Explanation("torch", "Triton is not installed")
_NO_TENSOR = Explanation("torch", "an argument is no tensor")


def _triton_applies(tensor: Tensor) -> Explanation | None:
    """None if kernels can run where ``tensor`` is, under the selected backend, else the reason why not.

    Raises:
        RuntimeError: if backend ``"triton"`` is selected and Triton cannot run at all.
    """
    if tensor.is_cuda or tensor.is_xpu or (tensor.is_cpu and _INTERPRETER):  # each cheaper than `device.type`
        if triton_installed:
            return None
        if _selected == "triton":
            raise RuntimeError(
                "backend 'triton' is selected but Triton is not installed: pip install 'torch-fastops[triton]'"
            )
        return _NO_TRITON
    device = tensor.device
    if _selected == "triton" and device.type != "meta":
        raise RuntimeError(
            f"backend 'triton' is selected but Triton cannot run on {device.type!r} tensors"
            + (": set TRITON_INTERPRET=1 before importing fastops to interpret kernels" if device.type == "cpu" else "")
        )
    return Explanation("torch", f"no kernel for device {device.type!r}")


def _by_triton(unfit: str | None, input: Tensor) -> Explanation:
    """The kernels unless these arguments are ``unfit``, for the reason given, or the interpreter is."""
    if unfit is not None:
        return Explanation("torch", unfit)
    wrong = input.dtype is torch.bfloat16 and input.is_cpu and not interpreter_has_bfloat16
    return _WRONG_IN_INTERPRETER if wrong else _TRITON


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Explanation:
    """The way of `functional.linear` and `functional.linear_relu`."""
    if _selected == "torch":
        return _SELECTED_TORCH
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return _NO_TENSOR
    if tuned:
        tensors = (input, weight, bias)
        if (measured := _measured("linear", lambda: fit.linear(*tensors), tensors)) is not None:
            return measured
    if _selected == "auto" and input.is_cpu and not _INTERPRETER:
        if _onednn_from is None or input.numel() * weight.shape[:1].numel() < _onednn_from:
            return _ATEN_IS_FASTER
    elif _selected != "onednn":
        if (no_triton := _triton_applies(input)) is not None:
            return no_triton
        return _by_triton(fit.linear(input, weight, bias), input)
    unfit = fit.linear(input, weight, bias)
    if unfit is None and (not input.is_cpu or input.dtype is not torch.float32):
        unfit = "oneDNN products are for float32 on the CPU"
    if unfit is not None:
        return Explanation("torch", unfit)
    return _ONEDNN_SELECTED if _selected == "onednn" else _ONEDNN_PAYS


def conv(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Explanation:
    """The way of `functional.conv1d`, `functional.conv_relu1d` and their like in two and three dimensions."""
    if _selected == "torch":
        return _SELECTED_TORCH
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return _NO_TENSOR
    if tuned:
        tensors, options = (input, weight, bias), (stride, padding, dilation, groups)
        measured = _measured("conv", lambda: fit.conv(dimensions, *tensors, *options), tensors, dimensions, *options)
        if measured is not None:
            return measured
    if _selected == "auto" and input.is_cpu and not _INTERPRETER:
        return _ATEN_IS_ONEDNN
    if _selected != "onednn":
        no_triton = _triton_applies(input)
        if no_triton is not None:
            return no_triton
    unfit = fit.conv(dimensions, input, weight, bias, stride, padding, dilation, groups)
    if unfit is None and _selected == "onednn" and (not input.is_cpu or input.dtype is not torch.float32):
        unfit = "oneDNN convolutions are for float32 on the CPU"
    return _ONEDNN_SELECTED if unfit is None and _selected == "onednn" else _by_triton(unfit, input)


def _without_product(
    op: str, input: Tensor, target: Tensor, unfit: Callable[[], str | None], *options: Any
) -> Explanation:
    if _selected == "torch":
        return _SELECTED_TORCH
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        return _NO_TENSOR
    if _selected == "onednn":
        return _NO_PRODUCT
    if tuned and (measured := _measured(op, unfit, (input, target), *options)) is not None:
        return measured
    if _selected == "auto" and input.is_cpu and not _INTERPRETER:
        return _ATEN_IS_FASTER
    no_triton = _triton_applies(input)
    if no_triton is not None:
        return no_triton
    return _by_triton(unfit(), input)


def add_relu(input: Tensor, other: Tensor) -> Explanation:
    """The way of `functional.add_relu`."""

    return _without_product("add_relu", input, other, partial(fit.add_relu, input, other))


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Explanation:
    """The way of `functional.mse_loss`."""

    unfit = partial(fit.mse_loss, input, target, weight, reduction)
    return _without_product("mse_loss", input, target, unfit, weight is None, reduction)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Explanation:
    """The way of `functional.cross_entropy`."""

    unfit = partial(fit.cross_entropy, input, target, weight, reduction, ignore_index, label_smoothing)
    return _without_product("cross_entropy", input, target, unfit, weight is None, reduction, label_smoothing)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Explanation:
    """The way of `functional.binary_cross_entropy_with_logits`."""

    unfit = partial(fit.binary_cross_entropy_with_logits, input, target, weight, pos_weight, reduction)
    weights = weight is None, pos_weight is None
    return _without_product("binary_cross_entropy_with_logits", input, target, unfit, *weights, reduction)


def logits_budget(input: Tensor, linear_weight: Tensor, options: LinearCrossEntropyOptions | None) -> int:
    """How many bytes of logits may exist at a time: what ``options`` say, else `chunked_logits.BUDGET`."""
    if options is None:
        return chunked_logits.BUDGET
    if (budget := getattr(options, "memory_budget", None)) is not None:
        return int(budget)
    rows, classes = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
    own = options._adjust(rows, input.shape[-1], linear_weight.shape[0], input.dtype, input.device)
    return max(1, own.batch_chunk_size * classes * input.element_size())


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Explanation:
    """The way of `functional.linear_cross_entropy`."""
    if _selected == "torch":
        return _SELECTED_TORCH
    if not all(isinstance(tensor, Tensor) for tensor in (input, linear_weight, target)):
        return _NO_TENSOR
    on_cpu = _selected == "onednn" or (_selected == "auto" and input.is_cpu and not _INTERPRETER)
    if not on_cpu:
        no_triton = _triton_applies(input)
        if no_triton is not None:
            return no_triton
    unfit = fit.linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options
    )
    logits = input.shape[:-1].numel() * linear_weight.shape[:-1].numel() * input.element_size()
    budget_holds = unfit is None and logits > logits_budget(input, linear_weight, options)
    if tuned and unfit is None and not budget_holds:  # no speed is worth more memory than was asked for
        tensors, losses = (input, linear_weight, target), (linear_bias is None, weight is None, reduction)
        if (measured := _measured("linear_cross_entropy", lambda: None, tensors, *losses)) is not None:
            return measured
    if unfit is None and on_cpu and (not input.is_cpu or input.dtype is not torch.float32):
        unfit = "oneDNN products are for float32 on the CPU"
    if unfit is not None or not on_cpu:
        return _by_triton(unfit, input)
    if _selected == "onednn":
        return _ONEDNN_SELECTED
    return _BUDGET_HOLDS if budget_holds else _LOGITS_FIT


_OPS: Final[dict[str, Callable[..., Explanation]]] = {
    "linear": linear,
    "linear_relu": linear,
    **{f"conv{relu}{n}d": partial(conv, n) for relu in ("", "_relu") for n in (1, 2, 3)},
    "add_relu": add_relu,
    "mse_loss": mse_loss,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "linear_cross_entropy": linear_cross_entropy,
}


def explain(op: str, *arguments: Any, **keywords: Any) -> Explanation:
    """Which way ``functional.<op>(*arguments, **keywords)`` would go now, and why. Computes nothing.

    Raises:
        ValueError: if ``op`` is no fastops function.
        RuntimeError: where the call itself would raise one: Triton is selected and cannot run.

    Example:
        >>> fastops.explain("linear", torch.randn(2, 3), torch.randn(4, 3)).backend
        'torch'
    """
    if op not in _OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(map(repr, _OPS))}")
    input = arguments[0] if arguments else keywords.get("input")
    dtype = None if input is None else autocast_dtype(op, input)
    if input is None or dtype is None:
        return _OPS[op](*arguments, **keywords)
    others = {name: value for name, value in keywords.items() if name != "input"}
    return under_autocast(_OPS[op], dtype, input, *arguments[1:], **others)
