"""What others put in the place of torch's own: then a layer of ours computes what they want, as torch's layer would.

Libraries replace methods of torch's classes (``nn.Linear.forward = ...``) and functions (``F.linear = ...``), and give
layers weights of a class that overrides functions. Each call looks again: they may do so at any time.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backport
from ..kernels import private
from ..ops import OPS
from ..ops.accepts import PLAIN
from ..ops.activations import MODULES

_Part = tuple[object, str, object]  # an owner, the name of an attribute and what torch has there


def _part(owner: object, name: str) -> _Part:
    """What ``owner.name`` is now, if torch or fastops defined it; else something that it never is."""
    found = getattr(owner, name)
    home = getattr(found, "__globals__", {"__name__": "torch"})  # built-in functions have none
    return owner, name, found if str(home["__name__"]).partition(".")[0] in ("torch", "fastops") else object()


def _layer(kind: Any, function: str, *methods: str) -> tuple[_Part, ...]:
    homes = [home for home in (F, backport) if hasattr(home, function)][:1]  # none where torch has no such function
    return (*(_part(kind, name) for name in ("forward", *methods)), *(_part(home, function) for home in homes))


_PARTS: Final[dict[object, tuple[_Part, ...]]] = {
    F.relu: (_part(torch, "relu"), _part(torch, "relu_")),
    nn.Module: (_part(nn.Module, "__call__"), _part(nn.Module, "_call_impl")),
    nn.MaxPool2d: _layer(nn.MaxPool2d, "max_pool2d"),
    nn.BatchNorm1d: _layer(nn.BatchNorm1d, "batch_norm"),
    nn.BatchNorm2d: _layer(nn.BatchNorm2d, "batch_norm"),
    nn.BatchNorm3d: _layer(nn.BatchNorm3d, "batch_norm"),
    **{
        kind: (
            *_layer(kind, name),
            *(_part(owner, own) for owner in (torch, Tensor) for own in (name, f"{name}_") if hasattr(owner, own)),
            *([_part(F, "hardtanh")] if issubclass(kind, nn.Hardtanh) else []),
        )
        for kind, name in MODULES.items()
    },
    **{
        op.module: _layer(op.module, op.name, *(["_conv_forward"] if hasattr(op.module, "_conv_forward") else []))
        for op in OPS.values()
        if op.module is not None
    },
}

MODULE_CALL, MODULE_CALL_IMPL = (torchs for _, _, torchs in _PARTS[nn.Module])


def replaced(kind: object) -> bool:
    """Whether somebody replaced what ``kind`` runs, a class of torch's modules or `torch.nn.functional.relu`."""
    for owner, name, torchs in _PARTS[kind]:  # noqa: SIM110  (a generator takes longer than all the rest)
        if getattr(owner, name, None) is not torchs:
            return True
    return False


def overrides(*tensors: Tensor | None) -> bool:
    """Whether one of them is of a class that has its own idea of what functions of torch do."""
    for tensor in tensors:
        kind = type(tensor)
        if tensor is not None and kind not in PLAIN:
            own = getattr(kind, "__torch_function__", None)
            if own is not private.overrides_nothing:
                return True
    return False
