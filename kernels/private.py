"""Private interfaces of torch and Triton, each with what takes its place in a version that lacks it.

No other file of the package names one, but for attributes of `torch.nn.Module` that hooks and copies are in, and the
commands, which look into both libraries. What takes a place gives the same results: some calls then go through torch's
dispatcher or take the torch expression that need not. Triton is imported where it is needed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
T = TypeVar("T")

# torch ----------------------------------------------------------------------------------------------------------------

missing: Final[list[str]] = []  # what this version of torch lacks, as `fastops doctor` tells


def _torchs(path: str, otherwise: Any) -> Any:
    """``torch.<path>``, or what takes its place."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            missing.append(f"torch.{path}")
            return otherwise
    return found


def _yes(*_: object) -> bool:
    return True


# Who looks on. The torch expression is right under every transform, and a call of a raw op whoever looks on.
below_autograd: Final = _torchs("_C._AutoDispatchBelowAutograd", None)
transforms_active: Final = _torchs("_C._are_functorch_transforms_active", _yes) if below_autograd else _yes
forward_levels: Final[Any] = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
is_forward_ad_enabled: Final = _torchs("_C._is_fwd_grad_enabled", _yes)
is_profiling: Final = _torchs("_C._autograd._profiler_enabled", _yes)
is_function_mode_active: Final = _torchs("_C._is_torch_function_mode_enabled", _yes)
has_global_hooks: Final = _torchs("nn.modules.module._has_any_global_hook", _yes)
tracing_state: Final = _torchs("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)  # type: ignore[attr-defined]
is_zero_tensor: Final = _torchs("Tensor._is_zerotensor", lambda tensor: False)
dispatch_modes: Final = _torchs("utils._python_dispatch._get_current_dispatch_mode_stack", list)
PAD: Final = _torchs("_C._nn.pad", torch.nn.functional.pad)  # as Dynamo names it in a graph
VMAP_MODE: Final = _torchs("_C._dispatch_key_parse", lambda name: None)("VmapMode")


def _unknown_keys() -> Any:
    return SimpleNamespace(raw_repr=lambda: None, has=_yes)


included_keys: Final = _torchs("_C._dispatch_tls_local_include_set", _unknown_keys) if VMAP_MODE else _unknown_keys


def _idle() -> tuple[int, ...]:
    keys, key = _torchs("_C.DispatchKeySet", None), _torchs("_C.DispatchKey", None)
    if not (hasattr(key, "BackendSelect") and hasattr(key, "ADInplaceOrView") and hasattr(keys, "raw_repr")):
        return ()
    select = keys(key.BackendSelect)
    return (select | keys(key.ADInplaceOrView)).raw_repr(), select.raw_repr()


IDLE: Final = _idle()  # `included_keys` outside of all modes, transforms and tracers; the second is inference mode's

# Autograd and autocast.
any_requires_grad: Final = _torchs(
    "_C._any_requires_grad",
    lambda *arguments: any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments),
)
keeps_graph: Final = _torchs("_C._autograd._get_current_graph_task_keep_graph", _yes)
is_any_autocast_enabled: Final = _torchs(
    "_C._is_any_autocast_enabled", lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda", "xpu")))
)
# What a thread leaves under a name, autograd's own threads find while they run a backward pass of that thread.
_find: Final[Any] = _torchs("_C._get_obj_in_tls", None)
_is_there: Final[Any] = _torchs("_C._is_key_in_tls", None) if _find else None
_leave: Final[Any] = _torchs("_C._stash_obj_in_tls", None) if _is_there else None


def hand_down(name: str, value: object) -> None:
    """Leave ``value``, which no other takes the place of."""
    if _leave is None:
        return
    references = sys.getrefcount(value)
    _leave(name, value)
    if sys.getrefcount(value) == references:  # torch up to 2.11 keeps what it does not own: so it stays for good
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def constant_to_dynamo(function: Callable[P, T]) -> Callable[P, T]:
    """A function that Dynamo calls once instead of tracing it: `torch.compiler` has that too, but imports Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def handed_down(name: str) -> Any:
    """What was left, or None."""
    return _find(name) if _leave and _is_there(name) else None


# The ``__torch_function__`` of a class that overrides nothing.
overrides_nothing: Final = _torchs("_C._disabled_torch_function_impl", torch.nn.Parameter.__torch_function__)

# Arithmetic.
linear_pointwise: Final = _torchs("ops.mkldnn._linear_pointwise", None)  # without it there is no oneDNN
unsafe_view: Final = _torchs("ops.aten._unsafe_view", lambda tensor, shape: tensor.reshape(shape).clone())
reduction_number: Final = _torchs("nn._reduction.get_enum", ("none", "mean", "sum").index)
legacy_reduction: Final = _torchs(
    "nn._reduction.legacy_get_string",
    lambda size_average, reduce: "none" if reduce is False else "sum" if size_average is False else "mean",
)


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    word = ("none", "mean", "sum")[reduction]
    return torch.nn.functional.cross_entropy(
        input, target, weight, None, ignore_index, None, reduction=word, label_smoothing=label_smoothing
    )


def _assert(condition: Tensor, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    return torch.contiguous_format if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last) else last


cross_entropy_loss: Final = _torchs("_C._nn.cross_entropy_loss", _cross_entropy)
assert_async: Final = _torchs("_assert_async", _assert)
memory_format: Final = _torchs("_prims_common.suggest_memory_format", _memory_format)


def chunk_rows(options: Any, rows: int, features: int, classes: int, like: Tensor) -> int | None:
    """How many rows at a time torch's options of `linear_cross_entropy` would take, None if they do not say."""
    adjust = getattr(options, "_adjust", None)
    rows_at_a_time: int | None = adjust and adjust(rows, features, classes, like.dtype, like.device).batch_chunk_size
    return rows_at_a_time


def compiler(name: str, mode: str, options: dict[str, Any]) -> Callable[..., Callable[..., Any]]:
    """The backend ``name`` of `torch.compile` with these words."""
    if name == "inductor":
        wrapper = getattr(torch, "_TorchCompileInductorWrapper", None)
        if wrapper is not None:
            return wrapper(mode, options, None)
    elif (wrapper := getattr(torch, "_TorchCompileWrapper", None)) is not None:
        return wrapper(name, mode, options, None)
    from torch._dynamo import lookup_backend

    words: dict[str, Any] = {"options": options} if options else {}
    if name == "inductor":
        from torch._inductor import list_mode_options

        words = {"config_patches": list_mode_options(mode) | options}
    elif mode != "default":
        words["mode"] = mode
    return functools.partial(lookup_backend(name), **words)


def threads() -> int:
    """Of a CPU, for a product; in compiled code those that there were when it was compiled."""
    return torch.get_num_threads()


# As `torch.compiler.assume_constant_result` does, which imports Dynamo for that: a second.
threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def surely(condition: Any) -> bool:
    """Whether it holds; of sizes that are symbols to a compiler, whether it does for all of them. No guard is made."""
    if isinstance(condition, (bool, Tensor)) and not torch.compiler.is_dynamo_compiling():
        return bool(condition)  # `jit.trace` makes tensors of sizes
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes a second, and is there by now

    return statically_known_true(condition)


# Triton ---------------------------------------------------------------------------------------------------------------

Start = Callable[[int, Sequence[int]], None]  # of the stream and the addresses of the tensors


def _call_of_triton_3_5(run: Any, metadata: Any, grid: tuple[int, int, int], function: int, rest: Any) -> Start:
    native, options = run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)

    def start(stream: int, addresses: Sequence[int]) -> None:
        native(*grid, stream, function, *options, *addresses, *rest)

    return start


def _call_of_triton_3_7(run: Any, metadata: Any, grid: tuple[int, int, int], function: int, rest: Any) -> Start:
    native, options = run.launch, (run.launch_cooperative_grid, run.launch_pdl, metadata, *(None,) * 5)
    types, signature = run.arg_annotations, run.kernel_signature

    def start(stream: int, addresses: Sequence[int]) -> None:
        native(*grid, stream, function, *options, types, signature, (*addresses, *rest))

    return start


# How to call the native launcher of an NVIDIA GPU past the Python around it. Any other version launches by itself.
_NATIVE_CALLS: Final = {
    "3.5": _call_of_triton_3_5,
    "3.6": _call_of_triton_3_5,
    "3.7": _call_of_triton_3_7,
    "3.8": _call_of_triton_3_7,
}


def triton_version() -> str:
    """Of the installed one, major and minor."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def launchers_are_known(backend: str) -> bool:
    """Whether `starter` is for this Triton and this kind of GPU."""
    return backend == "cuda" and triton_version() in _NATIVE_CALLS


def starter(compiled: Any, grid: tuple[int, int, int], rest: tuple[Any, ...]) -> Start:
    """A function that starts a compiled kernel on other addresses; ``rest`` are the arguments behind them.

    It calls the native launcher directly where Triton's Python launcher around it would allocate no scratch memory.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    scratch = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if type(run).__name__ == "CudaLauncher" and not any(getattr(run, name, 0) for name in scratch):
        return _NATIVE_CALLS[triton_version()](run, metadata, grid, function, rest)

    def start(stream: int, addresses: Sequence[int]) -> None:
        run(*grid, stream, function, metadata, None, None, None, *addresses, *rest)

    return start


def compile_all(jobs: Sequence[Callable[[], object]], done: Callable[[object], object]) -> list[BaseException]:
    """Run ``jobs``, each of which compiles a kernel, as many at a time as there are cores, and return their errors.

    A version of Triton that cannot do so compiles one after the other. ``done`` is called whenever one has ended.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode

        pool = ThreadPoolExecutor(os.cpu_count())
        mode = AsyncCompileMode(pool, ignore_errors=True)
    except (ImportError, TypeError):  # Triton 3.5 raises the first error instead
        return [error for job in jobs if (error := _error_of(job, done)) is not None]
    with pool, mode:
        for job in jobs:
            job()
        for future in mode.raw_futures:
            future.add_done_callback(done)
    return [error for future in mode.raw_futures if (error := future.exception()) is not None]


def _error_of(job: Callable[[], object], done: Callable[[object], object]) -> Exception | None:
    try:
        job()
    except Exception as error:
        return error
    finally:
        done(job)
    return None


def binder(function: Any, backend: Any) -> Callable[..., Any]:
    """Triton's own look at the arguments of a launch: what has to be compiled for them?

    Raises:
        RuntimeError: in a version that has another one.
    """
    try:
        from triton.runtime.jit import create_function_from_signature
    except ImportError as error:
        raise RuntimeError(f"no way to ask Triton {triton_version()} what a launch compiles") from error
    bind: Callable[..., Any] = create_function_from_signature(function.signature, function.params, backend)
    return bind


@functools.cache
def prepare_interpreter() -> None:
    """Make Triton's interpreter twice as fast, and let its numbers, arrays of one element, be the bounds of a loop.

    It computes in int64 whether integers overflow, for an assertion that only its option ``debug`` lets it make. And up
    to 3.6 it calls ``int`` on the bounds of a loop, which numpy refuses since 2.4.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if triton_version() not in ("3.5", "3.6"):
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> Any:
        result = patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()  # put back as what ``patch`` has put there
        return result

    interpreter._patch_lang_tensor = patched
