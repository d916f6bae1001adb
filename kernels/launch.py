"""The one way a kernel is started, and the choices that all launchers share."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import private
from .configs import architecture, reduced_precision


class Plan:
    """All of a launch except the tensors: a kernel, its grid, and its other arguments.

    ``numbers`` are the arguments that follow the tensors, ``constants`` the constexprs and the compiler's options.
    Plans are cached (`configs.planned`). In ``starts`` a plan caches how to start what Triton compiled for it.
    """

    __slots__ = ("constants", "grid", "kernel", "numbers", "starts")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **constants: Any) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.starts: dict[tuple[Any, ...], private.Start] = {}


@functools.cache
def _triton() -> tuple[Any, Any, bool]:
    """Triton's driver and run-time knobs, and whether its launcher can be passed by."""
    import triton  # not above: kernels/onednn.py imports this module where Triton may be missing
    from triton.runtime.driver import driver

    backend = driver.active.get_current_target().backend
    return driver, triton.knobs.runtime, private.launchers_are_known(backend)


def launch(plan: Plan, *tensors: Tensor) -> None:
    """Start a kernel on the device of its first tensor, in that device's current stream.

    Triton inspects every argument of each launch, which takes longer than the launch itself. All that it looks for is
    in the plan or in the key below: the current device, dtypes, and whether addresses are multiples of 16. What was
    compiled for an equal key is started again, on NVIDIA's GPUs; elsewhere Triton launches.
    """
    kernel = plan.kernel
    if not hasattr(kernel, "device_caches"):  # interpreted
        private.prepare_interpreter()
        kernel[plan.grid](*tensors, *plan.numbers, **plan.constants)
        return
    driver, runtime, known = _triton()
    active = driver.active
    device, current = tensors[0].get_device(), active.get_current_device()
    if device != current and device >= 0:  # Triton launches on the current device, whatever device the tensors are on
        with torch.accelerator.device_index(device):
            launch(plan, *tensors)
        return
    addresses: list[int] = []
    key: list[Any] = [current]
    for tensor in tensors:
        address, dtype = tensor.data_ptr(), tensor.dtype
        addresses.append(address)
        key.append((dtype,) if address % 16 else dtype)
    arguments = tuple(key)
    start = plan.starts.get(arguments)
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    watched = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks or runtime.debug
    if start is not None and not watched:
        start(active.get_current_stream(current), addresses)
        return
    compiled = kernel[plan.grid](*tensors, *plan.numbers, **plan.constants)
    if known and not watched and compiled is not None:
        plan.starts[arguments] = _start(compiled, plan, len(tensors))


def _start(compiled: Any, plan: Plan, tensors: int) -> private.Start:
    """A function that starts a compiled kernel on other addresses."""
    x, y, z = (*plan.grid, 1, 1)[:3]
    names = plan.kernel.arg_names[tensors + len(plan.numbers) :]
    rest = (*plan.numbers, *(plan.constants[name] for name in names))
    start = private.starter(compiled, (x, y, z), rest)
    start.compiled = compiled  # type: ignore[attr-defined]  # keeps it alive: when it is freed, the function is unloaded
    return start


def units_of(dtype: torch.dtype, *numbers: int) -> tuple[int, ...]:
    """What each number, of elements, has in common with 16 bytes of them.

    A kernel gets numbers divided by these units and multiplies them again. So its code tells Triton of each how wide an
    access it allows, of multiples of 8 as of 16, where Triton by itself asks for 16 elements.
    """
    return tuple(math.gcd(number, 16 // dtype.itemsize) for number in numbers)


def reshaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new tensor in another shape, but no view: a view that a Function returns may not be changed in place."""
    return private.unsafe_view(result, shape)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def input_precision(tensor: Tensor, op: str = "matmul", channels: int = 0) -> str:
    """How "matmul" or "conv" may round float32 operands: what torch's own setting says for this device.

    torch's setting is "ieee" or "tf32"; `set_float32_matmul_precision` "high" and "medium" mean "tf32" too. AMD's
    convolutions are always "ieee": torch's setting for convolutions is cuDNN's, "tf32" by default. ``channels``: what
    the numbers of them of a convolution have in common. cuDNN rounds where that is a multiple of 4.
    """
    if tensor.dtype is not torch.float32 or not tensor.is_cuda or (op == "conv" and torch.version.hip is not None):
        return "ieee"
    cudnn: Any = torch.backends.cudnn  # whose type does not name its parts
    setting = cudnn.conv if op == "conv" else torch.backends.cuda.matmul
    if setting.fp32_precision != "tf32" or channels % 4:
        return "ieee"
    return reduced_precision(architecture(tensor.device))


@private.constant_to_dynamo
def is_exact(dtype: torch.dtype, op: str = "matmul") -> bool:
    """Whether torch's setting lets no "matmul" or "conv" on a GPU round operands, and they have more than 16 bits."""
    if dtype is not torch.float32 or (op == "conv" and torch.version.hip is not None):
        return dtype.itemsize >= 4
    cudnn: Any = torch.backends.cudnn
    setting = cudnn.conv if op == "conv" else torch.backends.cuda.matmul
    return bool(setting.fp32_precision != "tf32")
