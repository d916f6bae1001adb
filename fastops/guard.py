"""Runs a launcher where a wrong address shows: poisoned bands around all memory, and a check of what kernels touch.

A band alone misses the read whose value a mask throws away afterwards, which on a GPU is an illegal access. So in
Triton's interpreter every address of every load and store is also looked up among the elements of the kernel's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch

BANDS: Final = {True: 64, False: 2**16}  # elements on either side, on the CPU and on a GPU, whose tiles are large
POISON: Final[dict[torch.dtype, float]] = {torch.int64: -(2**62), torch.uint8: 173}  # and NaN
ALLOCATIONS: Final = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ALIGNED: Final = 16  # bytes: what kernels may know of an address


# A load in a loop may be fetched ahead whatever its mask says (pytorch #187081), so masked lanes of a load may not have
# addresses outside either. Nothing fetches ahead for a store. These kernels are let off, for these reasons:
MASKED_OUTSIDE: Final = {
    "depthwise_kernel": "each tap would need a clamp of its own at the padding, in the innermost loop",
    "depthwise_grad_input_kernel": "likewise",
    "depthwise_grad_weight_kernel": "likewise",
    "cross_entropy_kernel": "units of 16 bytes lie across the ends of the first and last row and take no other address",
    "cross_entropy_backward_kernel": "likewise",
    "persistent_matmul_kernel": "tensor descriptors, which the hardware holds to their bounds",
}


def offsets_of(tensor: Tensor) -> Tensor:
    """Offsets of all elements from the first one."""
    offsets = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device=tensor.device) * stride
    return offsets.flatten()


class Guard:
    """Tensors in poisoned memory."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor, int]] = []  # each with its memory and where it begins there

    def like(self, tensor: Tensor) -> Tensor:
        """A new tensor with these sizes and strides, aligned as this one. All around and between elements is poison."""
        span, band = int(offsets_of(tensor).max()) + 1, BANDS[tensor.is_cpu]
        begin = band + tensor.data_ptr() % ALIGNED // tensor.element_size()
        memory = torch.full(
            (begin + span + band,), POISON.get(tensor.dtype, torch.nan), dtype=tensor.dtype, device=tensor.device
        )
        guarded = memory.as_strided(tensor.shape, tensor.stride(), begin)
        self.tensors.append((guarded, memory, begin))
        return guarded

    def copy(self, tensor: Tensor) -> Tensor:
        """`like`, with its values."""
        if not tensor.numel():
            return tensor
        guarded = self.like(tensor)
        _, memory, begin = self.tensors[-1]
        memory[begin:][offsets_of(tensor)] = tensor.flatten()  # an expanded tensor takes no copy_
        return guarded

    def check(self) -> None:
        """Raise ``AssertionError`` if poison was overwritten."""
        for tensor, memory, begin in self.tensors:
            outside = torch.ones_like(memory, dtype=torch.bool)
            outside[begin + offsets_of(tensor)] = False
            poison = memory[outside]
            intact = poison.isnan() if tensor.is_floating_point() else poison == POISON[tensor.dtype]
            if not intact.all():
                raise AssertionError(f"memory outside a tensor of shape {tuple(tensor.shape)} was written")


class GuardedAllocations(TorchDispatchMode):
    """Puts what torch.empty and its like return into a guard."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.guard = guard

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        allocates = function.overloadpacket.__name__ in ALLOCATIONS
        return self.guard.like(result) if allocates and result.numel() and not result.is_meta else result


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Interpreted kernels may load and store nothing but elements of the tensors that they were launched with.

    Where the mask of a load is false, its address must lie between the first and the last element of one all the same,
    unless the kernel is listed above.
    """
    from triton.runtime import interpreter

    memories: list[tuple[int, Any]] = []  # of each tensor: its address, and for each byte whether an element begins
    kernel = ""
    call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(pointers: Any, mask: Any, masked: bool = False) -> None:
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        inside, elements = np.zeros((2, *addresses.shape), bool)
        for begin, is_element in memories:
            offsets = addresses - np.uint64(begin)  # huge before the first element: numbers without a sign
            own = offsets < is_element.size
            inside |= own
            elements[own] |= is_element[offsets[own]]
        if not elements[active].all():
            raise AssertionError(f"{kernel} reached outside its tensors")
        if masked and not inside.all():
            raise AssertionError(f"{kernel} has an address outside its tensors where the mask of a load is false")

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal kernel
        kernel = self.fn.__name__
        memories.clear()
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.numel():
                offsets = offsets_of(tensor) * tensor.element_size()
                is_element = np.zeros(int(offsets.max()) + 1, bool)
                is_element[offsets.numpy()] = True
                memories.append((tensor.data_ptr(), is_element))
        call(self, *args, **kwargs)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask, masked=kernel not in MASKED_OUTSIDE)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(interpreter.GridExecutor, "__call__", checked_call),
        patch.multiple(builder, create_masked_load=checked_load, create_masked_store=checked_store),
    ):
        yield


def run_guarded(launcher: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """``launcher(*arguments, **options)`` with all tensors in guarded memory.

    Raises:
        AssertionError: if anything outside the tensors is touched, or an argument changes its values.
    """
    guard = Guard()
    guarded = [guard.copy(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
    with checked_addresses() if dispatch._INTERPRETER else nullcontext(), GuardedAllocations(guard):
        result = launcher(*guarded, **options)
    guard.check()
    for argument, kept in zip(arguments, guarded, strict=True):
        if isinstance(argument, Tensor) and not same_bits(argument, kept):
            raise AssertionError("an argument was modified")
    return result


def same_bits(first: Any, second: Any) -> bool:
    """Equal bits and strides of tensors, or of tuples of tensors and None; any NaN equals any other."""
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same_bits, first, second))
    if first is None:
        return second is None
    return _layout(first) == _layout(second) and torch.equal(_bits(first), _bits(second))


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _bits(tensor: Tensor) -> Tensor:
    """Bytes of all elements, with one NaN for all."""
    values = tensor.detach().nan_to_num(torch.nan, torch.inf, -torch.inf)
    return values.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
