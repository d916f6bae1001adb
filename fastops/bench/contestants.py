"""Who does the same work: eager torch, torch.compile, fastops, fastops compiled, and packages that are installed."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.cli.examples import torch_function
from fastops.ops import Op
from fastops.ops.op import failures_raised
from fastops.timing import Call, synchronized

EAGER, COMPILED, OURS, OURS_COMPILED = "eager", "torch.compile", "fastops", "fastops, compiled"
TWO_CALLS, LIGER, ATTORCH, CUT = "linear + cross_entropy", "Liger", "attorch", "cut-cross-entropy"
OF_MODELS: Final = (EAGER, COMPILED, OURS, OURS_COMPILED)
CONTESTANTS: Final = (*OF_MODELS, TWO_CALLS, LIGER, ATTORCH, CUT)
Function = Callable[..., Tensor]


class NotRun(Exception):
    """Why something cannot run here, in one line."""


def one_line(error: BaseException) -> str:
    """What an error says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Functions of an op ---------------------------------------------------------------------------------------------------


def functions_of(op: Op) -> dict[str, Callable[[], Function]]:
    """What makes the function of each contestant, by name; it raises `NotRun` where there is none here."""
    reference, ours = torch_function(op), getattr(FF, op.name)
    makers: dict[str, Callable[[], Function]] = {
        EAGER: lambda: reference,
        COMPILED: lambda: compiled(reference),
        OURS: lambda: ours,
        OURS_COMPILED: lambda: compiled(ours),
    }
    if op.name == "linear_cross_entropy":
        makers[TWO_CALLS] = lambda: linear_and_cross_entropy
    for name, package in PACKAGES.items():
        if op.name in package:
            makers[name] = lambda package=package: package_function(op.name, *package[op.name])  # type: ignore[misc]
    return makers


def compiled(target: Any) -> Any:
    """By torch's default compiler, for these shapes alone. It compiles at the first call, which fails if it cannot."""
    return torch.compile(target, dynamic=False)


def forget_compiled() -> None:
    """Forget what was compiled before: so many versions of one function would be too many for the compiler."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def linear_and_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """A head in two calls, with all logits in memory."""
    return F.cross_entropy(F.linear(input, linear_weight), target, **options)


# By op: the module, the function (or the class of a loss), and our arguments in its order.
_HEAD, _LOSS = ("input", "linear_weight", "target"), ("input", "target")
_LOSSES: Final = {"cross_entropy": "CrossEntropyLoss", "mse_loss": "MSELoss", "l1_loss": "L1Loss"} | {
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
}
PACKAGES: Final[dict[str, dict[str, tuple[str, str, tuple[str, ...]]]]] = {
    LIGER: {
        "cross_entropy": ("liger_kernel.transformers.functional", "liger_cross_entropy", _LOSS),
        "linear_cross_entropy": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", _HEAD),
    },
    ATTORCH: {op: ("attorch", name, _LOSS) for op, name in _LOSSES.items()},
    CUT: {"linear_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy", _HEAD)},
}
DEFAULTS: Final = {("reduction", "mean"), ("label_smoothing", 0.0)}


def package_function(op: str, module: str, name: str, words: tuple[str, ...]) -> Function:
    """Another package's, which takes the arguments of ours; `NotRun` where it is not installed."""
    try:
        found = getattr(import_module(module), name)
    except ImportError:
        raise NotRun(f"{module.partition('.')[0]} is not installed") from None
    function = found() if isinstance(found, type) else found

    def call(**arguments: Any) -> Tensor:
        if {name: value for name, value in arguments.items() if name not in words}.items() - DEFAULTS:
            raise NotRun("not compared with these options")
        result = function(*(arguments[word] for word in words))
        loss: Tensor = result[0] if isinstance(result, tuple) else result
        return loss

    return call


# Models ---------------------------------------------------------------------------------------------------------------


def models_of(
    model: nn.Module, copied: Callable[[nn.Module], nn.Module], **options: Any
) -> dict[str, Callable[[], Any]]:
    """What makes the model of each contestant from ``model``, which stays as it is; ``options`` are those of `swap`."""
    return {
        EAGER: lambda: fastops.unswap(copied(model)),
        COMPILED: lambda: compiled(fastops.unswap(copied(model))),
        OURS: lambda: fastops.swap(copied(model), **options),
        OURS_COMPILED: lambda: compiled(fastops.swap(copied(model), **options)),
    }


# Calls ----------------------------------------------------------------------------------------------------------------


def made_when_called(make: Callable[[], Call]) -> Call:
    """A call that is made when it is first called."""
    made: list[Call] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


def through(backend: str, call: Call) -> Call:
    """The call, on that backend."""

    def on_backend() -> object:
        with fastops.backend(backend):
            return call()

    return on_backend


@contextmanager
def limited(deadline: float) -> Iterator[None]:
    """Raise `NotRun` inside at the deadline (of `time.monotonic`): in the main thread, where there are alarms."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise NotRun("no time was left")
    if seconds > 1e6 or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise NotRun("it took too long")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(
    calls: Mapping[str, Call], device: torch.device, needed: tuple[str, ...], deadline: float = float("inf")
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that run, each once, and why the others do not. Errors of those that are ``needed`` are raised.

    Those that are not needed have time until the deadline.
    """
    able: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, call in calls.items():
        start = time.monotonic()
        limit = deadline if name not in needed else float("inf")
        try:
            with failures_raised(), limited(limit):
                synchronized(call, device)()
        except NotRun as error:
            left_out[name] = str(error)
        except Exception as error:  # a compiler's or another package's own: why it is not compared
            if name in needed:
                raise
            late = time.monotonic() >= limit > start
            left_out[name] = "it took too long" if late else one_line(error)
        else:
            able[name] = call
    if EAGER in calls and EAGER not in able:
        raise NotRun(left_out[EAGER])
    return able, left_out
