"""Tensors of more than 2^31 elements: every kernel's addresses, in memory that is reserved and never touched.

The first and the last program along each axis of every launch run, and of long loops the first and the last two turns:
there a product that needed 64 bits, and had 32, leaves its tensor. Values are zeros, and results mean nothing.
"""

from __future__ import annotations

import inspect
import itertools
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from launches import kernel_modules
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import fastops.functional as FF
from fastops.ops import OPS
from fastops.ops.op import Op

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reserves more memory than there is, as Linux lets one")

NORESERVE = 0x4000  # a flag of mmap, which Python has a name for since 3.13
BIG = 2**29  # bytes, from which memory is reserved only
SHORT = 64  # turns of a loop that are all taken
ALLOCATIONS = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "new_zeros",
    "zeros",
    "zeros_like",
)


class Big(Exception):
    """The host would touch all of a tensor."""


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first in memory to the last one."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def reserved(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros that takes no memory until it is written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, span(shape, stride) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


def big(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False) -> Tensor:
    like = torch.empty(shape, device="meta")
    if channels_last:
        like = like.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    return reserved(shape, like.stride(), dtype)


def small(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


class Reserving(TorchDispatchMode):
    """Allocations of many elements are `reserved`, and nothing else may compute with those."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in ALLOCATIONS and str(kwargs.get("device")) != "meta":
            like = function(*args, **{**kwargs, "device": "meta"})
            if like.numel() * like.dtype.itemsize >= BIG:
                return reserved(tuple(like.shape), like.stride(), like.dtype)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        tensors = [t for t in (*args, result) if isinstance(t, Tensor) and not t.is_meta and t.nbytes >= BIG]
        if tensors and not function.is_view and name != "_unsafe_view":
            raise Big(f"{function} of a big tensor")
        return result


@contextmanager
def corners_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The interpreter runs some programs and turns only; yields the names of the kernels that reached 2^31 elements."""
    spans: list[tuple[int, int]] = []
    far: set[str] = set()
    running: list[str] = []
    builder = interpreter.InterpreterBuilder

    def call(self: interpreter.GridExecutor, *tensors: Any, **options: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        arguments = inspect.getcallargs(self.fn, *tensors, **{k: v for k, v in options.items() if k in known})
        spans[:] = [
            (each.data_ptr(), each.data_ptr() + each.element_size() * span(each.shape, each.stride()))
            for each in arguments.values()
            if isinstance(each, Tensor) and each.numel()
        ]
        running.append(self.fn.__name__)
        scope = interpreter._patch_lang(self.fn)
        try:
            converted = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in arguments.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for index in itertools.product(*(sorted({0, size - 1}) for size in grid)):
                interpreter.interpreter_builder.set_grid_idx(*index)
                self.fn(**converted)
        finally:
            scope.restore()
            running.pop()

    def check(pointers: Any, mask: Any) -> None:
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[active]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        inside = [(begin, end) for begin, end in spans if begin <= low and high < end]
        assert inside, f"{running[-1]} reached outside its tensors"
        width = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
        if any((high - begin) // width >= 2**31 for begin, _ in inside):
            far.add(running[-1])

    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def turns(*bounds: Any) -> Any:
        numbers = range(*(int(bound) for bound in bounds))
        return numbers if not running or len(numbers) <= SHORT else [*numbers[:2], *numbers[-2:]]

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        for module in kernel_modules():
            patch.setattr(module, "range", turns, raising=False)
        yield far


def run(op: Op, call: tuple[Any, ...]) -> None:
    """Forward and backward pass through the launchers, for all gradients."""
    arguments = call if op.raw_arguments is None else op.raw_arguments("triton", *call)
    results = op.launchers[0](*arguments)
    needs = tuple(isinstance(each, Tensor) and each.is_floating_point() for each in arguments[: op.variables])
    if op.name == "linear_cross_entropy":  # whose gradient of the input torch adds up, over all of its memory
        needs = False, *needs[1:]
    saved, options = op.save(needs, op, arguments, results)
    output = results[0] if isinstance(results, tuple) else results
    op.launchers[1](torch.empty_like(output), *saved, *options, *needs)


ROWS = 2**25 + 40  # of 64 features: a little more than 2^31 elements
MANY = 2**31 // 64 + 40  # classes or features beside 64 rows


CASES: dict[str, Callable[[], Any]] = {
    "add_relu": lambda: FF.add_relu(big(ROWS, 64), big(ROWS, 64)),
    "linear": lambda: FF.linear(big(ROWS, 64), small(64, 64), small(64)),
    "linear, long rows": lambda: FF.linear(big(64, MANY), big(64, MANY), small(64)),
    "linear_relu": lambda: FF.linear_relu(big(ROWS, 64), small(64, 64), small(64)),
    "linear_act": lambda: FF.linear_act(big(ROWS, 64), small(64, 64), small(64), "gelu"),
    "mse_loss": lambda: FF.mse_loss(big(ROWS, 64), big(ROWS, 64)),
    "mse_loss, none": lambda: FF.mse_loss(big(ROWS, 64), big(ROWS, 64), reduction="none"),
    "l1_loss": lambda: FF.l1_loss(big(ROWS, 64), big(ROWS, 64)),
    "smooth_l1_loss": lambda: FF.smooth_l1_loss(big(ROWS, 64), big(ROWS, 64)),
    "huber_loss": lambda: FF.huber_loss(big(ROWS, 64), big(ROWS, 64)),
    "binary_cross_entropy_with_logits": lambda: FF.binary_cross_entropy_with_logits(
        big(ROWS, 64), big(ROWS, 64), pos_weight=small(64)
    ),
    "cross_entropy": lambda: FF.cross_entropy(big(2**21 + 3, 1024), torch.zeros(2**21 + 3, dtype=torch.int64)),
    "cross_entropy, many classes": lambda: FF.cross_entropy(big(64, MANY), torch.full((64,), MANY - 1)),
    "cross_entropy, pixels": lambda: FF.cross_entropy(
        big(2, 1024, 2**20 + 40), torch.zeros(2, 2**20 + 40, dtype=torch.int64), reduction="sum"
    ),
    "cross_entropy, probabilities": lambda: FF.cross_entropy(
        big(ROWS, 64), big(ROWS, 64), small(64), label_smoothing=0.1
    ),
    "linear_cross_entropy": lambda: FF.linear_cross_entropy(
        big(2**17, 2**14 + 8), small(17, 2**14 + 8), torch.zeros(2**17, dtype=torch.int64)
    ),
}


def add_layouts(last: bool) -> None:
    """The ops that take channels first or ``last``."""
    layout = ", channels_last" * last
    image = partial(big, 2**15 + 40, 64, 32, 32, channels_last=last)
    norm: dict[str, Any] = {"weight": small(64), "bias": small(64), "training": True}
    gelu = {"activation": "gelu"}
    CASES.update(
        {
            f"batch_norm_relu{layout}": lambda: FF.batch_norm_relu(image(), None, None, **norm),
            f"batch_norm_act{layout}": lambda: FF.batch_norm_act(image(), None, None, **norm, **gelu),
            f"batch_norm_add_relu{layout}": lambda: FF.batch_norm_add_relu(image(), image(), None, None, **norm),
            f"batch_norm_add_act{layout}": lambda: FF.batch_norm_add_act(image(), image(), None, None, **norm, **gelu),
            f"relu_max_pool2d{layout}": lambda: FF.relu_max_pool2d(image(), 3, 2, 1),
            f"conv2d, few positions{layout}": lambda: FF.conv2d(
                big(1, 2**21, 32, 33, channels_last=last), small(8, 2**21, 1, 3)
            ),
        }
    )
    for dims, size in ((1, (2**25 + 40,)), (2, (8192, 4104)), (3, (512, 256, 258))):
        if last and dims == 1:
            continue
        weight = small(64, 64, *(3,) * dims)
        for op in (f"conv{dims}d", f"conv_relu{dims}d", f"conv_act{dims}d"):
            CASES[op + layout] = lambda op=op, size=size, weight=weight: getattr(FF, op)(
                big(1, 64, *size, channels_last=last), weight, small(64), padding=1
            )


add_layouts(False)
add_layouts(True)
CASES["conv2d, depthwise"] = lambda: FF.conv2d(
    big(1, 64, 8192, 4104, channels_last=True), small(64, 1, 3, 3), None, padding=1, groups=64
)


def test_every_op_has_a_case() -> None:
    assert {name.split(",")[0] for name in CASES} == set(OPS)


@pytest.mark.parametrize("name", CASES)
def test_addresses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FF, "call", lambda *arguments: arguments)
        op, *call = CASES[name]()
    assert op.accepts(*call) is None
    with torch.no_grad(), corners_alone(monkeypatch) as far, Reserving():
        run(op, tuple(call))
    assert far
