"""`fastops.warmup`: compile the kernels that a model will launch, before it launches the first."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from . import dispatch
from .kernels import private
from .ops.op import FallbackWarning
from .tuning import Call, Example, calls_of, one_at_a_time


def warmup(model: nn.Module, example_input: Any = (), *, example_kwargs: Mapping[str, Any] | None = None) -> int:
    """Compile the kernels that training and evaluating a swapped model will need, as many at a time as there are cores.

    Otherwise each is compiled at its first launch, one after the other. Which ones there are shows one run of
    ``model(example_input)``, which computes the torch expressions; then every call of fastops is made up to its
    launches, with its backward pass and without. A terminal shows how far it is if rich is installed. The model is left
    as it is, as by `tune`. Warm up after tuning: other ways and tiles are other kernels.

    Args:
        model: on the device to compile for; swapped, or there is nothing to compile.
        example_input: what the model is called with: one argument, or a tuple of several.
        example_kwargs: keyword arguments of that call.

    Returns:
        How many kernels were compiled: 0 where no call goes to Triton, or all have been launched before.

    Raises:
        TypeError: if ``model`` is not a module.
        RuntimeError: if backend ``"triton"`` is selected and cannot run, or where the call of the model raises one.

    Warns:
        FallbackWarning: if some do not compile. Their calls will compute the torch expression.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup expects a torch.nn.Module, not {type(model).__name__}")
    with one_at_a_time, torch.inference_mode(False):
        with dispatch.backend("torch"):
            calls = calls_of(model, Example(example_input, example_kwargs))
        for_triton = [call for call in calls if call.way().backend == "triton"]
        return _compile(_missing(for_triton)) if for_triton else 0


_Missing = dict[tuple[str, str, int], Callable[[], object]]


def _missing(calls: list[Call]) -> _Missing:
    """How to compile each kernel that these calls would launch and that has not been compiled yet."""
    from triton import knobs

    found: _Missing = {}
    own, outer = threading.get_ident(), knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **others: Any) -> Any:
        if threading.get_ident() != own:
            return outer and outer(fn=fn, compile=compile, **others)
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0
        found[fn.name, compile["key"], device] = partial(fn.jit_function.preload, compile["specialization_data"])
        return True  # nothing is compiled or launched now

    knobs.runtime.jit_cache_hook = note
    try:
        with torch.autograd.set_multithreading_enabled(False):  # backward passes in this thread too
            for gradients in (True, False):
                for call in calls:
                    with torch.set_grad_enabled(gradients):
                        call.run()
    finally:
        knobs.runtime.jit_cache_hook = outer
    return found


def _compile(missing: _Missing) -> int:
    """How many of them compiled."""

    def on_its_device(device: int, compile: Callable[[], object]) -> None:
        with torch.accelerator.device_index(device) if torch.accelerator.is_available() else nullcontext():
            compile()

    jobs = [partial(on_its_device, device, compile) for (*_, device), compile in missing.items()]
    with _progress(len(missing)) as advance:
        errors = private.compile_all(jobs, advance)
    if errors:
        message = f"{len(errors)} of {len(missing)} kernels do not compile; torch will run instead: {errors[0]}"
        warnings.warn(message, FallbackWarning, stacklevel=3)
    return len(missing) - len(errors)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[object], None]]:
    """What to call when one of ``total`` kernels is done: a bar on a terminal, where rich is installed."""
    if not (total and sys.stderr.isatty() and find_spec("rich")):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling kernels", total=total)
        yield lambda _: bar.advance(task)
