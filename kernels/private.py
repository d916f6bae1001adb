"""Private interfaces of torch and Triton, each with what takes its place in a version that lacks it.

Nothing else in the package names one, except what every library of layers needs of `torch.nn.Module`. Triton is
imported where it is needed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

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


@functools.cache
def mend_interpreter() -> None:
    """Let a number of Triton's interpreter, an array of one element, be the bound of a loop.

    Up to 3.6 Triton calls ``int`` on it, which numpy refuses since 2.4.
    """
    if triton_version() not in ("3.5", "3.6"):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> Any:
        result = patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()  # put back as what ``patch`` has put there
        return result

    interpreter._patch_lang_tensor = patched
