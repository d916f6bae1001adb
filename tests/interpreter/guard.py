"""Runs a launcher where a wrong address shows: poisoned bands around all memory, and a check of what kernels touch.

A band alone misses the read whose value a mask throws away afterwards, which on a GPU is an illegal access. So every
address of every load and store is also looked up among the elements of the kernel's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

BAND = 64  # elements on either side
POISON = {True: float("nan"), False: -(2**62)}  # by is_floating_point
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def offsets_of(tensor: Tensor) -> Tensor:
    """Offsets of all elements from the first one."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.flatten()


class Guard:
    """Tensors in poisoned memory."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor]] = []

    def like(self, tensor: Tensor) -> Tensor:
        """A new tensor with these sizes and strides. All around and between its elements is poison."""
        span = int(offsets_of(tensor).max()) + 1
        storage = torch.full((span + 2 * BAND,), POISON[tensor.is_floating_point()], dtype=tensor.dtype)
        guarded = storage.as_strided(tensor.shape, tensor.stride(), BAND)
        self.tensors.append((guarded, storage))
        return guarded

    def copy(self, tensor: Tensor) -> Tensor:
        guarded = self.like(tensor)
        flat = guarded.as_strided((guarded._base.numel() - BAND,), (1,), BAND)  # an expanded tensor takes no copy_
        flat[offsets_of(tensor)] = tensor.flatten()
        return guarded

    def assert_intact(self) -> None:
        for tensor, storage in self.tensors:
            outside = torch.ones(storage.shape, dtype=torch.bool)
            outside[BAND + offsets_of(tensor)] = False
            poison = storage[outside]
            intact = poison.isnan() if tensor.is_floating_point() else poison == POISON[False]
            assert intact.all(), f"memory outside a tensor of shape {tuple(tensor.shape)} was written"


class GuardedAllocations(TorchDispatchMode):
    """Puts what torch.empty and its like return into a guard."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        allocates = function.overloadpacket.__name__ in ALLOCATIONS
        return self.guard.like(result) if allocates and result.numel() and not result.is_meta else result


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Kernels may load and store nothing but elements of the tensors that they were launched with."""
    allowed = np.empty(0, np.uint64)
    call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(pointers: Any, mask: Any) -> None:
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        assert np.isin(addresses[active], allowed).all(), "a kernel reached outside its tensors"

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal allowed
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        elements = [tensor.data_ptr() + offsets_of(tensor) * tensor.element_size() for tensor in tensors]
        allowed = np.unique(torch.cat(elements).numpy().view(np.uint64))
        call(self, *args, **kwargs)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", checked_call)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


def run_guarded(launcher: Callable[..., Any], *arguments: Any) -> Any:
    """``launcher(*arguments)`` with all tensors in guarded memory.

    Asserts that nothing outside the tensors is touched, and that the arguments keep their values.
    """
    guard = Guard()
    guarded = [guard.copy(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
    with checked_addresses(), GuardedAllocations(guard):
        result = launcher(*guarded)
    guard.assert_intact()
    for argument, kept in zip(arguments, guarded, strict=True):
        assert not isinstance(argument, Tensor) or same_bits(argument, kept), "an argument was modified"
    return result


def call_plainly(launcher: Callable[..., Any], *arguments: Any) -> Any:
    """``launcher(*arguments)``: what `run_guarded` does, without a guard."""
    return launcher(*arguments)


def same_bits(first: Any, second: Any) -> bool:
    """Equal values and strides of tensors, or of tuples of tensors and None; a NaN equals itself."""
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same_bits, first, second))
    if first is None:
        return second is None
    return first.stride() == second.stride() and torch.equal(first.nan_to_num(7), second.nan_to_num(7))
