"""Decides, for every call of `fastops.functional`, which way it goes: Triton kernels, oneDNN, or the torch expression.

A decision reads devices, dtypes and shapes, never values and never a clock: the same call goes the same way in every
run, by a rule or as `fastops.tune` once found faster. Arguments without a kernel, and wrong ones too, take the torch
expression: so every feature and every error message is torch's own. What an op decides for itself is in its record
(`fastops.ops`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import measured, tuning_cache
from .kernels import onednn, private
from .ops.accepts import PLAIN
from .ops.op import (
    HOST_TAKES_LONGER,
    LEAST_SAVED,
    OPS,
    STRICT,
    Explanation,
    Op,
    failed,
    fallback_error,
    has_failed,
)

BACKENDS: Final = ("auto", "triton", "onednn", "torch")
ONEDNN_DTYPES = (torch.float32,)

WRONG_IN_INTERPRETER: Final = "Triton's interpreter computes bfloat16 wrongly"
interpreter_has_bfloat16 = False  # the tests mend the interpreter and say so here
triton_installed = importlib.util.find_spec("triton") is not None
# By name: a lookup through modules at each call adds up.
_is_any_autocast_enabled: Final = private.is_any_autocast_enabled
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_transforms_active: Final = private.transforms_active
_is_mode_active: Final = private.is_function_mode_active
_levels: Final = private.forward_levels
_tracing_state: Final = private.tracing_state
_INTERPRETER = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# Backends -------------------------------------------------------------------------------------------------------------


class _Selection(NamedTuple):
    """What a thread has chosen for its calls.

    ``strict``: a call that would take the torch expression is an error. ``explaining``: a call returns its
    `Explanation` instead of computing. ``asked``: what was measured does not count, and what a call would have looked
    for is noted in the list. ``outer``: what is selected again behind a ``with``. ``counters``: count what ran.
    """

    backend: str
    outer: _Selection | None = None
    strict: bool = False
    explaining: bool = False
    asked: list[tuning_cache.Key] | None = None
    counters: tuple[Counter[tuple[str, str]], ...] = ()


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    return name


try:
    _default = _Selection(_checked(os.environ.get("FASTOPS_BACKEND", "auto")))
except ValueError as error:
    raise ValueError(f"environment variable FASTOPS_BACKEND: {error}") from None


class _Thread(threading.local):
    """Where each thread has its selection. As a class attribute, Dynamo up to torch 2.11 would see that alone.

    Threads that Python did not start, autograd's for each GPU among them, have that of the thread that began the
    backward pass: checkpoints compute a forward pass anew there, and what they save must be what was saved before.
    """

    selection: _Selection

    def __init__(self) -> None:
        self.is_pythons = not isinstance(threading.current_thread(), threading._DummyThread)
        if self.is_pythons:
            self.selection = _default
            private.hand_down(_NAME, self.__dict__)

    def __getattr__(self, name: str) -> Any:
        if name != "selection":
            raise AttributeError(name)
        if _is_dynamo_compiling():  # which cannot trace what follows
            return _default
        return (private.handed_down(_NAME) or {}).get(name, _default)


_NAME: Final = "fastops"
_thread = _Thread()


def _select(selection: _Selection) -> None:
    if not _thread.is_pythons:  # what was handed down is not kept, but looked for each time
        _thread.__dict__.pop("selection", None)
        if selection is _thread.selection:
            return
    elif not _is_dynamo_compiling() and private.handed_down(_NAME) is None:  # it was first asked in a backward pass
        private.hand_down(_NAME, _thread.__dict__)
    _thread.selection = selection


class backend(contextlib.ContextDecorator):
    """Context manager, and decorator, that selects the backend of all calls inside it.

    ``"auto"`` (the default, or what the environment variable ``FASTOPS_BACKEND`` says) takes the fastest way known for
    device and shape; ``"triton"`` the kernels wherever one exists for the arguments, forward and backward; ``"onednn"``
    the same Functions with oneDNN products on the CPU; ``"torch"`` the torch expression. It holds for the thread
    that enters it, like `torch.no_grad`. A backward pass runs on the backend of its forward.

    With ``strict=True`` a call that would take the torch expression after all raises a `FallbackError`, forward and
    backward, and so does `explain`; wrong arguments raise torch's error; a kernel that cannot be compiled or launched
    raises its own error instead of a `FallbackWarning`. Inside `torch.compile` a graph breaks at such a call, or with
    ``fullgraph=True`` the compilation fails. A selection inside is strict only if it says so too.

    Args:
        name: one of these four.
        strict: only with ``"triton"`` and ``"onednn"``: the other two have nothing to fall back from.

    Raises:
        ValueError: if ``name`` is no backend, or cannot be strict.
    """

    def __init__(self, name: str, *, strict: bool = False) -> None:
        self._name, self._strict = _checked(name), strict
        if strict and name in ("auto", "torch"):
            raise ValueError(f"backend {name!r} cannot be strict: only 'triton' and 'onednn' can")

    def __enter__(self) -> None:
        outer = _thread.selection
        _select(_Selection(self._name, outer, self._strict, counters=outer.counters))

    def __exit__(self, *_: object) -> None:
        leave()


def leave() -> None:
    """Select again what was selected before the innermost `backend` or `count`."""
    outer = _thread.selection.outer
    assert outer is not None
    _select(outer)


def count(counter: Counter[tuple[str, str]]) -> None:
    """Count the calls of this thread by op and way, until `leave`."""
    outer = _thread.selection
    counters = tuple(known for known in outer.counters if known is not counter)
    _select(outer._replace(outer=outer, counters=(*counters, counter)))


def selected_backend() -> str:
    """The backend that `backend` or ``FASTOPS_BACKEND`` selected."""
    return _thread.selection.backend


def on_plain_cpu(input: Tensor) -> bool:
    """Whether no call with ``input`` runs in a kernel, and any may take the torch expression."""
    selection = _thread.selection
    return input.is_cpu and not selection.strict and not (_INTERPRETER and selection.backend in ("auto", "triton"))


def is_left_to_torch(input: Tensor, passes: float = 0) -> bool:
    """Whether ops without a product for oneDNN take the torch expression for ``input``, and nobody looks on.

    A short way for layers, where the host's time for a small one shows. ``passes``: how many passes over the input a
    kernel saves on a GPU at most (`Op.saved_bytes`).
    """
    selection = _thread.selection
    return (
        (input.is_cpu or (input.is_cuda and not tuned and _saves_little(passes * input.numel() * input.element_size())))
        and not _INTERPRETER
        and selection.backend != "triton"
        and not (selection.strict or selection.explaining or selection.counters)
        and selection.asked is None
        and not (_is_mode_active() or _is_dynamo_compiling())
    )


def _saves_little(size: float) -> bool:
    """Whether a kernel that saves a GPU so many bytes costs the host more (`Op.saved_bytes`)."""
    return private.surely(size < LEAST_SAVED)


def refuse_fallback(op: str, reason: str) -> None:
    """Raise a `FallbackError` if a strict backend is selected."""
    selection = _thread.selection
    if selection.strict:
        raise fallback_error(op, selection.backend, reason)


# The way of a call ----------------------------------------------------------------------------------------------------


def call(op: Op, *arguments: Any) -> Any:
    """What ``functional.<op>`` returns for the arguments of a call (`Op`)."""
    selection, input = _thread.selection, arguments[0]
    if (  # all that `_way` would find out, at once: beside a small layer on the CPU every step shows
        selection.backend == "auto"
        and type(input) is Tensor
        and not (tuned or _INTERPRETER or selection.explaining or selection.counters)
        and selection.asked is None
        and (
            op.cpu(*arguments).backend == "torch"
            if input.is_cpu
            else input.is_cuda
            and not (op.autocast == "float32" and _is_any_autocast_enabled())  # which takes twice the bytes
            and _saves_little(op.saved_bytes(*arguments))
        )
    ):
        return op.expression(*arguments)
    if _is_any_autocast_enabled() and (dtype := autocast_dtype(op.autocast, arguments[0])) is not None:
        # Casting here, once, keeps the gradients of the originals in their own dtype.
        with torch.autocast(arguments[0].device.type, enabled=False):
            return call(op, *(autocast_to(dtype, argument) for argument in arguments))
    explanation = _way(op, arguments, selection)
    if selection.strict:
        reason = explanation.reason if explanation.backend == "torch" else None
        if explanation.backend == "onednn" and not onednn.available():
            reason = "this torch was built without oneDNN"
        if reason is not None:
            if not selection.explaining:
                op.expression(*arguments)  # wrong arguments raise torch's error
            refuse_fallback(op.name, reason)
    if selection.explaining:
        return explanation
    if selection.counters and not _is_dynamo_compiling():
        return _counted(op, arguments, explanation, selection)
    if explanation.backend == "torch":
        return op.expression(*arguments)
    return op.run(explanation.way + STRICT if selection.strict else explanation.way, arguments)


_counting: Final = threading.Lock()  # two threads may be in one block


def _counted(op: Op, arguments: tuple[Any, ...], explanation: Explanation, selection: _Selection) -> Any:
    """The result of a call, which is counted if there is one."""
    way = explanation.way
    if way == "torch":
        result: Any = op.expression(*arguments)
    else:
        result = op.run(way + STRICT if selection.strict else way, arguments)
        if explanation.backend == "triton" and failed and has_failed(op.name, arguments[0]):
            way = "torch"  # its kernel failed in this very call
    with _counting:
        for counter in selection.counters:
            counter[op.name, way] += 1
    return result


def explain(op: str, *arguments: Any, **keywords: Any) -> Explanation:
    """Which way ``functional.<op>(*arguments, **keywords)`` would go now, forward and backward, and why.

    Computes nothing.

    Raises:
        ValueError: if ``op`` is no fastops function.
        TypeError: if that function does not take these arguments.
        RuntimeError: where the call itself would raise one: Triton is selected and cannot run, or, a `FallbackError`,
            a strict backend is selected and the call would fall back.

    Example:
        >>> fastops.explain("linear", torch.randn(2, 3), torch.randn(4, 3)).backend
        'torch'
    """
    from . import functional

    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(map(repr, OPS))}")
    outer = _thread.selection
    _select(outer._replace(explaining=True))
    try:
        explanation: Explanation = getattr(functional, op)(*arguments, **keywords)
    finally:
        _select(outer)
    return explanation


_SELECTED_TORCH: Final = Explanation("torch", "backend 'torch' is selected")
_SELECTED_TRITON: Final = Explanation("triton", "a Triton kernel exists for these arguments")
_SELECTED_ONEDNN: Final = Explanation("onednn", "backend 'onednn' is selected")
_NO_PRODUCT: Final = Explanation("torch", "there is no product here that oneDNN could take")
_NOT_FOR_ONEDNN: Final = Explanation("torch", "oneDNN products are for float32 on the CPU")
_NO_TENSOR: Final = Explanation("torch", "an argument is no tensor")
_NO_TRITON: Final = Explanation("torch", "Triton is not installed")
_FAILED: Final = Explanation("torch", "its kernel failed before on this device, for this dtype")
_WRONG_IN_INTERPRETER: Final = Explanation("torch", WRONG_IN_INTERPRETER)
_TRANSFORMED: Final = Explanation("torch", "under torch.func, forward-mode AD and jit.trace torch differentiates")
_MEASURED: Final = {way: Explanation(way, "fastops.tune measured it the fastest here") for way in tuning_cache.WAYS}

_OF_ITS_KIND: Final = "fastops qualify measured it the fastest on this kind of GPU"
_WON: Final = {way: Explanation(way, _OF_ITS_KIND) for way in ("triton", "torch")} | {
    "vendor": Explanation("triton", _OF_ITS_KIND, "vendor", _OF_ITS_KIND)
}


def _way(op: Op, arguments: tuple[Any, ...], selection: _Selection) -> Explanation:
    """Which way a call goes.

    Raises:
        RuntimeError: if backend ``"triton"`` is selected and Triton cannot run.
    """
    selected, input = selection.backend, arguments[0]
    if selected == "torch":
        return _SELECTED_TORCH
    if not isinstance(input, Tensor):
        return _NO_TENSOR
    found = None
    if selected == "auto" and (tuned or selection.asked is not None):
        found = _measured(op, arguments, selection)
    on_cpu = input.is_cpu  # a third of the price of `device.type`
    device = "cpu" if on_cpu else input.device.type
    if found is None and selected == "auto" and on_cpu and not _INTERPRETER:
        found = op.cpu(*arguments)
    if found is not None:
        pass
    elif selected == "onednn":
        found = _SELECTED_ONEDNN if op.onednn else _NO_PRODUCT
    elif selected == "triton" and not triton_installed and device != "meta":
        raise RuntimeError(
            "backend 'triton' is selected but Triton is not installed: pip install 'torch-fastops[triton]'"
        )
    elif device in ("cuda", "xpu") or (on_cpu and _INTERPRETER):
        found = _NO_TRITON
        if triton_installed:
            found = _SELECTED_TRITON if selected == "triton" or on_cpu else None  # None: the op decides
    elif selected == "triton" and device != "meta":
        hint = ": set TRITON_INTERPRET=1 before importing fastops to interpret kernels" if on_cpu else ""
        raise RuntimeError(f"backend 'triton' is selected but Triton cannot run on {device!r} tensors{hint}")
    else:
        found = Explanation("torch", f"no kernel for device {device!r}")
    if found is not None and found.backend == "torch":
        return found
    if _transforms_active() or (
        not _is_dynamo_compiling() and (_levels._current_level >= 0 or _tracing_state() is not None)
    ):
        return _TRANSFORMED
    if (unfit := op.accepts(*arguments)) is not None:
        return Explanation("torch", unfit)
    if found is None and _saves_little(op.saved_bytes(*arguments)):
        bare = op.gpu(*arguments)
        found = bare if bare.backend == "torch" else HOST_TAKES_LONGER
    if found is None and kinds_measured:
        found = _measured_on_its_kind(op, arguments)
    found = found or op.gpu(*arguments)
    if failed and found.backend == "triton" and not selection.strict and has_failed(op.name, input):
        return _FAILED
    if found.backend == "onednn" and not (on_cpu and input.dtype in ONEDNN_DTYPES):
        return _NOT_FOR_ONEDNN
    if on_cpu and input.dtype is torch.bfloat16 and found.backend == "triton" and not interpreter_has_bfloat16:
        return _WRONG_IN_INTERPRETER
    return found


# Autocast -------------------------------------------------------------------------------------------------------------


def autocast_dtype(rule: str | None, input: Any) -> torch.dtype | None:
    """The dtype in which autocast wants an op with this rule (`Op.autocast`) to run, or None where it is off."""
    if rule is None or not isinstance(input, Tensor) or input.is_meta:
        return None
    kind = input.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.float32 if rule == "float32" else torch.get_autocast_dtype(kind)


def autocast_to(dtype: torch.dtype, value: Any) -> Any:
    """A floating tensor (float64 excepted) as ``dtype``; anything else as it is."""
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if eligible else value


# What was measured ----------------------------------------------------------------------------------------------------

tuned = tuning_cache.anything()  # or `fastops.tune` ran in this process
kinds_measured = measured.anything()


@contextlib.contextmanager
def by_the_rule() -> Iterator[list[tuning_cache.Key]]:
    """Inside, calls of this thread go by the rule, whatever was measured. What they would have looked for is listed."""
    asked: list[tuning_cache.Key] = []
    outer = _thread.selection
    _select(outer._replace(asked=asked))
    try:
        yield asked
    finally:
        _select(outer)


def _measured(op: Op, arguments: tuple[Any, ...], selection: _Selection) -> Explanation | None:
    """The way that won when this call was measured, if it was and can still be gone."""
    input = arguments[0]
    if input.is_meta or torch.compiler.is_compiling():
        return None
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            type(argument) not in PLAIN or argument.layout is not torch.strided or argument.is_nested
        ):
            return None
    known = tuning_cache.of(input.device)
    if not known and selection.asked is None:
        return None
    key = tuning_cache.key(op.name, arguments)
    if key is None:
        return None
    if selection.asked is not None:
        selection.asked.append(key)
        return None
    way = known.get(key)
    if way is None or (op.saves_memory is not None and op.accepts(*arguments) is None and op.saves_memory(*arguments)):
        return None  # no speed is worth more memory than was asked for
    return _MEASURED[way]


def _measured_on_its_kind(op: Op, arguments: tuple[Any, ...]) -> Explanation | None:
    """The way that won on this kind of GPU for calls of this class; ``op`` accepts the arguments."""
    known = {} if torch.compiler.is_compiling() else measured.of(arguments[0].device)
    if not known or (op.saves_memory is not None and op.saves_memory(*arguments)):
        return None
    key = tuning_cache.key(op.name, arguments)
    way = None if key is None else known.get(measured.shape_class(key))
    return None if way is None else _WON[way]
