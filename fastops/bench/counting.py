"""What a call costs besides time: operations, the bytes that they move, and the memory that it takes at its peak."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastops.ops import OPS
from fastops.timing import Call, synchronized

from .contestants import EAGER, OURS, TWO_CALLS, one_line

SEEN: Final = (EAGER, OURS, TWO_CALLS)  # whose operations of torch can be seen
IMPLEMENTATIONS = {op.raw: op.compute_raw for op in OPS.values()} | {
    op.raw_backward: op.compute_raw_backward for op in OPS.values()
}

# Operations of torch --------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """What one launch read and wrote: bytes in distinct sectors, and all bytes that its loads and stores asked for.

    ``words`` describes the arguments of an operation of torch, so that equal operations can be told.
    """

    name: str
    read: int = 0
    written: int = 0
    requested: int = 0
    words: str = ""


@dataclass
class Traffic:
    """All launches of a call, and the ways of those that fastops made."""

    launches: list[Launch] = field(default_factory=list)
    ways: set[str] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        """In distinct sectors."""
        return sum(launch.read + launch.written for launch in self.launches)

    @property
    def requested(self) -> int:
        """That loads and stores asked for."""
        return sum(launch.requested for launch in self.launches)

    def same_code(self, other: Traffic) -> bool:
        """Whether both were the same operations on tensors of the same layouts, none of them a kernel of ours."""
        own, others = ([(launch.name, launch.words) for launch in one.launches] for one in (self, other))
        return own == others and not self.ways


class Operations(TorchDispatchMode):
    """Counts operations of torch: each reads its tensors and writes its results once. Views count nothing.

    Those of fastops are made of others, which count; what a Triton kernel does is not seen.
    """

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastops":
            self.traffic.ways.add(args[-1])
            with self:  # which would see the operation itself again
                return IMPLEMENTATIONS[func](*args)
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not func._schema.is_mutable:
            written = [tensor for tensor in written if tensor.untyped_storage().data_ptr() not in storages]
        if written and "empty" not in name:
            sizes = sum(map(_size, _read(name, args, kwargs or {}))), sum(map(_size, written))
            words = repr(tree_map(_described, (args, kwargs)))
            self.traffic.launches.append(Launch(name, *sizes, sum(sizes), words))
        return result


def _described(value: Any) -> Any:
    return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that exist: an expanded dimension has one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size if stride != 0 else min(size, 1) for size, stride in sizes)


def _read(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments of which an operation reads the elements, not the shape alone."""
    if name.startswith("new_") or name.endswith("_like") or name in ("copy_", "fill_", "zero_"):
        args = args[1:]
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    return list({id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}.values())


def operations(call: Call) -> Traffic:
    """Of one run of the call."""
    traffic = Traffic()
    with Operations(traffic):
        call()
    return traffic


def operations_of(name: str, call: Call) -> Traffic | str:
    """Of a contestant, or why they cannot be seen."""
    if name not in SEEN:
        return "code of a compiler, or of another package, is not seen"
    try:
        return operations(call)
    except Exception as error:  # there are models that refuse to be looked at
        return one_line(error)


# Meters ---------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """None where it cannot be told, and then a reason by the name of the field."""

    bytes: int | None
    launches: int | None
    peak_bytes: int | None
    unknown: dict[str, str]


def cost_of(call: Call, traffic: Traffic | str, device: torch.device) -> Cost:
    """Of a call that ran before, and whose operations were these; or why they cannot be seen."""
    moved, launches, unknown = None, None, {}
    if isinstance(traffic, str):
        unknown["bytes"] = unknown["launches"] = traffic
    elif any(way.startswith(("triton", "vendor")) for way in traffic.ways):
        unknown["bytes"] = "of kernels, bench/traffic.py counts them"
        unknown["launches"] = "Triton's are counted on a GPU with CUDA's profiler alone"
    else:
        moved, launches = traffic.bytes, len(traffic.launches)
    if device.type == "cuda":
        launches = _kernels(call, device)
        unknown.pop("launches", None)
    peak = {"cpu": _peak_on_cpu, "cuda": _peak_on_gpu}.get(device.type)
    if peak is None:
        unknown["peak_bytes"] = f"no meter for {device.type}"
    return Cost(moved, launches, peak and peak(call, device), unknown)


def _peak_on_cpu(call: Call, device: torch.device) -> int:
    """The most bytes that torch's allocator gave out at a time; oneDNN's and MKL's own memory is not seen."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it starts
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _peak_on_gpu(call: Call, device: torch.device) -> int:
    """What CUDA's allocator had at most, above what it had before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    synchronized(call, device)()
    return torch.cuda.max_memory_allocated(device) - before


def _kernels(call: Call, device: torch.device) -> int:
    """How many kernels CUDA's profiler sees."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        synchronized(call, device)()
    return sum(
        event.device_type == torch._C._autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in found.events()
    )
