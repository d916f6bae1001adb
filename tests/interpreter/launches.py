"""Another `launch` in the place of the one that every kernel file imports; where kernels store."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

from fastops import kernels


def kernel_modules() -> list[ModuleType]:
    names = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    return [importlib.import_module(f"fastops.kernels.{name}") for name in sorted(names)]


def replace_launch(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., object]) -> None:
    """Let ``launch`` be called, with a plan and tensors, wherever a kernel would start."""
    for module in kernel_modules():
        if hasattr(module, "launch") and module.__name__ != "fastops.kernels.launch":
            monkeypatch.setattr(module, "launch", launch)


def record_stores(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray[Any, Any]]:
    """The addresses of each store from here on; an element that two lanes write is there twice."""
    store, written = InterpreterBuilder.create_masked_store, []

    def seen(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        written.append(addresses[active])
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", seen)
    return written
