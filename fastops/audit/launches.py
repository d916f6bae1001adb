"""Every launch that the launchers make: each kernel, dtype and entry of the tables, on shapes of all kinds.

The launchers run on meta tensors and the launch is recorded instead, specialized as Triton does it: what is compiled is
what would run.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from fastops import kernels
from fastops.kernels import configs, private
from fastops.kernels.launch import Plan
from fastops.ops import OPS

from .machine_code import Request, gpu_target
from .targets import TARGETS

MODULES = [import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)]


class Launch(NamedTuple):
    """One compilation, and what its machine code should show."""

    op: str
    request: Request
    shape: str
    wide: bool = False  # a product whose rows are aligned: 128-bit accesses are possible
    stream: int = 0  # bytes of the large tensors of a loss that each thread reads and writes for one tile
    width: int = 128  # bits of each access that does so, or more
    narrow: bool = False  # beside those there may be any number of narrower ones
    leading: bool = False  # a product of a shape that fills the GPU, with the first tile of its table

    @property
    def target(self) -> str:
        """The architecture that it is for."""
        return str(self.request["architecture"])

    @property
    def kernel(self) -> str:
        """The name of the kernel, without its module."""
        return str(self.request["kernel"].split(":")[1])

    @property
    def dtype(self) -> str:
        """Triton's name of what is computed with: "tf32" or "bf16x3" if float32 is rounded to it."""
        precision = str(self.request["constants"].get("INPUT_PRECISION", "ieee"))
        first = next(str(type_)[1:] for type_ in self.request["types"].values() if str(type_).startswith("*"))
        return first if precision == "ieee" else precision

    @property
    def product(self) -> bool:
        """Whether it multiplies matrices."""
        return "INPUT_PRECISION" in self.request["constants"]

    @property
    def config(self) -> str:
        """Block sizes, warps and stages."""
        constants = self.request["constants"]
        sizes = "x".join(str(value) for name, value in constants.items() if name.startswith("BLOCK"))
        stages = f" s{self.request['num_stages']}" if "num_stages" in self.request else ""
        return f"{sizes} w{self.request.get('num_warps', 4)}{stages}"


def recorded(
    target: str,
    tile: configs.Tile | None,
    precision: str,
    launcher: Callable[..., Any],
    *arguments: Any,
) -> tuple[Any, list[Request]]:
    """``launcher(*arguments)`` and the compilations it would ask for, with one tile for all products or the table's."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(plan: Plan, *tensors: Tensor) -> None:
        launches.append((plan.kernel, (*tensors, *plan.numbers), plan.constants))

    replacements = {
        "launch": record,
        "input_precision": lambda *_: precision,
        "architecture": lambda _: configs.listed(target),
        "multiprocessors": lambda _: 100,
    }
    if tile is not None:
        persistent = isinstance(tile, configs.PersistentConfig)
        replacements["matmul_config"] = lambda *_: tile
        replacements["persistent_config"] = lambda *_: tile if persistent else None
    with ExitStack() as stack:
        stack.enter_context(patch.object(configs, "plans", {}))
        for module in MODULES:
            for name, replacement in replacements.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        result = launcher(*arguments)
    return result, [_request(target, *launch) for launch in launches]


def jit_function(kernel: Any) -> JITFunction[Any]:
    """What Triton compiles, also where the kernel itself is interpreted."""
    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)


def _request(target: str, kernel: Any, values: tuple[Any, ...], constants: dict[str, Any]) -> Request:
    function = jit_function(kernel)
    bound, specialized, options = private.binder(function, make_backend(gpu_target(target)))(*values, **constants)
    types, attributes, fixed = {}, {}, {}
    for (name, value), (type_, attribute) in zip(bound.items(), specialized, strict=True):
        if type_ == "constexpr":
            fixed[name] = value
            continue
        types[name] = type_
        if attribute:
            attributes[name] = attribute
    return {
        "kernel": f"{function.module}:{function.__name__}",
        "architecture": target,
        "types": types,
        "constants": fixed,
        "attributes": attributes,
        **options,
    }


class Audit:
    """What an op's `audit` is handed (`fastops.ops.op.Audit`), for one target."""

    def __init__(self, op: str, target: str) -> None:
        self.op, self.target, self.listed = op, target, configs.listed(target)
        bfloat16 = [torch.bfloat16] if TARGETS[target].bfloat16 else []
        self.half_dtypes: Sequence[torch.dtype] = [*bfloat16, torch.float16]
        self.dtypes: Sequence[torch.dtype] = [*self.half_dtypes, torch.float32, torch.float64]

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def tables(self) -> Iterator[tuple[torch.dtype, str, Sequence[configs.Tile], Sequence[configs.Tile]]]:
        pairs = [(dtype, "ieee") for dtype in self.dtypes]
        for dtype, precision in dict.fromkeys([*pairs, (torch.float32, configs.reduced_precision(self.listed))]):
            key = self.listed, dtype, precision
            yield dtype, precision, configs.matmul_candidates(*key), configs.persistent_candidates(*key)

    def launches(
        self, shape: str, tile: Any, precision: str, launcher: Callable[..., Any], *arguments: Any
    ) -> tuple[Any, list[Launch]]:
        result, requests = recorded(self.target, tile, precision, launcher, *arguments)
        return result, [Launch(self.op, request, shape) for request in requests]

    def streams(
        self, shape: str, odd: bool, tensors: int, launcher: Callable[..., Any], *arguments: Any
    ) -> tuple[Any, list[Launch]]:
        result, (first, *sums) = self.launches(shape, None, "ieee", launcher, *arguments)
        main = first.request
        if self.target.startswith("gfx"):
            main.pop("debug", None)  # an assertion of AMD brings a hundred accesses of its own
        threads = main["num_warps"] * TARGETS[self.target].warp_size
        elements = math.prod(value for name, value in main["constants"].items() if name.startswith("BLOCK"))
        stream = tensors * elements * arguments[0].element_size() // threads
        return result, [first._replace(stream=stream, width=64 if odd else 128), *sums]


AUDITED = {name: op.audit for name, op in OPS.items() if op.audit is not None}


def launches(target: str, ops: Sequence[str]) -> list[Launch]:
    """The launches of some ops for one target, each compilation once."""
    found: dict[str, Launch] = {}
    for op in ops:
        for launch in AUDITED[op](Audit(op, target)):
            found.setdefault(repr(launch.request), launch)
    return list(found.values())
