"""The one way a kernel is started, and the choices that all launchers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .configs import architecture, reduced_precision

Start = Callable[[tuple[int, ...], int, Sequence[int]], None]  # of grid, stream and addresses
_starts: dict[tuple[Any, ...], Start] = {}
_LAUNCHERS = ("cuda", "hip")
_SMALL = 2**31 - 1  # bytes of storage that AMD's 32-bit offsets reach
_STARTS_AT_MOST = 1 << 14  # with shapes that never come again: all are forgotten, and found again in Triton's own cache


@functools.cache
def _triton() -> tuple[Any, Any, bool, bool]:
    """The driver, the run-time knobs, whether this Triton's private launchers are known here, and whether it is AMD."""
    import triton  # not above: the oneDNN twins use this module too and need no Triton
    from triton.runtime.driver import driver

    backend = driver.active.get_current_target().backend
    return (
        driver,
        triton.knobs.runtime,
        triton.__version__.startswith("3.8.") and backend in _LAUNCHERS,
        backend == "hip",
    )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first tensor, in that device's current stream.

    ``arguments`` are the kernel's first parameters in order, tensors before numbers; ``constants`` are all others and
    the compiler's options.

    Triton inspects every argument of each launch anew, which takes longer than the launch. What it looks for is the key
    of what it compiled before: dtypes, whether an address is a multiple of 16, for AMD whether 32-bit offsets reach all
    of a tensor's storage, numbers and constants.
    """
    if not hasattr(kernel, "device_caches"):  # interpreted
        kernel[grid](*arguments, **constants)
        return
    driver, runtime, known, amd = _triton()
    addresses: list[int] = []
    tensors: list[Any] = []  # their dtypes, and the places of those whose address is no multiple of 16
    for argument in arguments:
        if not isinstance(argument, Tensor):
            break
        address = argument.data_ptr()
        addresses.append(address)
        tensors.append(argument.dtype)
        if address % 16:
            tensors.append(len(tensors))
        if amd and argument.untyped_storage().nbytes() > _SMALL:
            tensors.append(-len(tensors))
    device, current = arguments[0].get_device(), driver.active.get_current_device()
    if device != current and device >= 0:  # Triton launches on the current device, which need not be the tensors' one
        with torch.accelerator.device_index(device):
            launch(kernel, grid, *arguments, **constants)
        return
    numbers = arguments[len(addresses) :]
    types = tuple(map(type, numbers))  # 1.0 equals 1, and is another argument
    key = kernel.fn, current, tuple(tensors), numbers, types, tuple(constants), tuple(constants.values())
    start = _starts.get(key)
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    watched = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks or runtime.debug
    if start is not None and not watched:
        start(grid, driver.active.get_current_stream(current), addresses)
        return
    compiled = kernel[grid](*arguments, **constants)
    if known and not watched and compiled is not None:
        if len(_starts) >= _STARTS_AT_MOST:
            _starts.clear()
        _starts[key] = _start(compiled, (*numbers, *(constants[name] for name in kernel.arg_names[len(arguments) :])))


def _start(compiled: Any, rest: tuple[Any, ...]) -> Start:
    """What starts a compiled kernel again, on other addresses: past its Python launcher, if that has nothing to do."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    scratch = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if type(run).__name__ == "CudaLauncher" and not any(getattr(run, name) for name in scratch):
        options = run.launch_cooperative_grid, run.launch_pdl, metadata, *(None,) * 5
        native, types, signature = run.launch, run.arg_annotations, run.kernel_signature

        def start(grid: tuple[int, ...], stream: int, addresses: Sequence[int]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            native(x, y, z, stream, function, *options, types, signature, (*addresses, *rest))

    else:

        def start(grid: tuple[int, ...], stream: int, addresses: Sequence[int]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, stream, function, metadata, None, None, None, *addresses, *rest)

    start.compiled = compiled  # type: ignore[attr-defined]  # which unloads the function when nobody holds it
    return start


def reshaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A fresh result in another shape, not as a view: autograd lets nobody change a view from a Function in place."""
    return torch.ops.aten._unsafe_view(result, shape)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def input_precision(tensor: Tensor, op: str = "matmul") -> str:
    """How "matmul" or "conv" may round float32 operands: what torch's own setting says for this device.

    torch allows a GPU "ieee" or "tf32", the latter also by `set_float32_matmul_precision` "high" (tf32, or sums of two
    bfloat16 numbers) and "medium". AMD's convolutions are float32: torch's setting for them is cuDNN's, on by default.
    """
    if tensor.dtype is not torch.float32 or not tensor.is_cuda or (op == "conv" and torch.version.hip is not None):
        return "ieee"
    cudnn: Any = torch.backends.cudnn  # whose type does not name its parts
    setting = cudnn.conv if op == "conv" else torch.backends.cuda.matmul
    return reduced_precision(architecture(tensor.device)) if setting.fp32_precision == "tf32" else "ieee"
