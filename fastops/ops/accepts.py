"""What kernels take: which tensors, which options."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN: Final = (Tensor, torch.nn.Parameter)
# What stands for a plain tensor while a compiler traces. By name: importing them takes a second, and whoever makes one
# has done so. Other subclasses may mean something else by an op.
_STAND_INS: Final = ("torch._subclasses.fake_tensor.FakeTensor", "torch._subclasses.functional_tensor.FunctionalTensor")


def is_plain(kind: type) -> bool:
    """Whether tensors of this class are what they look like."""
    return kind in PLAIN or f"{kind.__module__}.{kind.__qualname__}" in _STAND_INS


def mismatch(*tensors: Tensor, optional: Tensors = (), indices: Tensor | None = None) -> str | None:
    """Why no kernel takes these tensors together, or None. All but ``indices`` are to have one dtype."""
    dtype = device = None
    present = (*tensors, *(tensor for tensor in optional if tensor is not None)) if optional else tensors
    for tensor in present:
        kind = type(tensor)
        if kind not in PLAIN and not is_plain(kind):
            return f"no kernel for arguments of type {kind.__name__}"
        if dtype is None:
            dtype, device = tensor.dtype, tensor.device
        elif tensor.dtype is not dtype and tensor is not indices:
            return "dtypes differ"
        elif tensor.device != device:
            return "tensors are on different devices"
        if tensor.layout is not torch.strided:
            return f"no kernel for layout {tensor.layout}"
        if tensor.is_nested:
            return "no kernel for nested tensors"
        if tensor.numel() == 0:
            return "a tensor is empty"
    return None if dtype in DTYPES else f"no kernel for {dtype}"


def loss_options(reduction: Any, label_smoothing: Any = 0.0) -> str | None:
    """Why no loss has these options, or None."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        return f"{reduction!r} is no reduction"
    if not (isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing <= 1):
        return "label_smoothing is not a number from 0 to 1"
    return None


REDUCTIONS: Final = {"none": 0, "mean": 1, "sum": 2}  # ATen's numbers


def constant(*weights: Tensor | None) -> str | None:
    """Why kernels, which take weights of classes and elements for constants, do not take these, or None."""
    for weight in weights:
        if weight is not None and weight.requires_grad:
            return "a weight requires a gradient"
    return None
