"""The one way a kernel is started, and the choices that all launchers share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first tensor, in that device's current stream.

    Triton launches on the *current* device, which need not be the tensors' one: hence the guard.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    guard = contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)
    with guard:
        kernel[grid](*arguments, **constants)


def reshaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A fresh result in another shape, not as a view: autograd lets nobody change a view from a Function in place."""
    return torch.ops.aten._unsafe_view(result, shape)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def input_precision(tensor: Tensor, op: str = "matmul") -> str:
    """How "matmul" or "conv" may round float32 operands: what torch's own setting says for this device."""
    if tensor.dtype is not torch.float32 or not tensor.is_cuda or torch.version.hip is not None:
        return "ieee"
    cudnn: Any = torch.backends.cudnn  # whose type does not name its parts
    setting = cudnn.conv if op == "conv" else torch.backends.cuda.matmul
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
