"""Times calls in turns, and what the times say: the one stopwatch of ``bench``, ``qualify``, `fastops.tune` and bench/.

A machine's speed drifts while it works. Calls that follow each other see the same machine, so ratios are taken within
each turn, and every second turn runs in the other order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # the seconds of one call, of so many

SAMPLE_SECONDS: Final = 1e-3  # A shorter call is repeated to fill this: clocks and synchronizations cost microseconds.
LONGER_SAMPLE: Final = 1e-2  # Where nobody else takes turns with the call that a few samples decide about.
FLUSHED: Final = 2**28  # bytes written between two calls on a GPU: more than any L2 cache has
FLUSHES: Final = 6  # an H100 takes 0.1 ms for one


class Ratio(NamedTuple):
    """Median and quartiles of the time of one call over that of another, taken within each turn."""

    median: float
    lower: float
    upper: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of two calls that `interleave` has timed."""
    import numpy as np  # here: `fastops.tune` does without it

    lower, median, upper = (float(value) for value in np.quantile(np.divide(ours, theirs), [0.25, 0.5, 0.75]))
    return Ratio(median, lower, upper)


def shown(ratio: Sequence[float]) -> str:
    """A `Ratio`, or what JSON made of one, in words."""
    median, lower, upper = ratio
    return f"{median:.2f} ({lower:.2f} - {upper:.2f})"


def synchronized(call: Call, device: torch.device) -> Call:
    """The call, which returns when the device is done."""
    if device.type == "cpu":
        return call

    def call_and_wait() -> None:
        call()
        torch.accelerator.synchronize(device)

    return call_and_wait


def wall_clock(call: Call, calls: int) -> float:
    """Seconds of a call on the host's clock, over ``calls`` of them in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def clock_of(device: torch.device) -> Clock:
    """The clock of a device. On a GPU with CUDA's events it is theirs, and each call finds an empty L2 cache."""
    if device.type == "cuda":
        return partial(_events, torch.empty(FLUSHED, dtype=torch.int8, device=device))
    return lambda call, calls: wall_clock(synchronized(call, device), calls)


def _events(flushed: torch.Tensor, call: Call, calls: int) -> float:
    """Meanwhile the host runs ahead: what it takes to launch is hidden behind the flushes, unless that is longer."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    with torch.cuda.device(flushed.device):
        for start, end in pairs:
            for _ in range(FLUSHES):
                flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / calls


def host_seconds(call: Call, device: torch.device, calls: int) -> float:
    """Seconds for which each of so many calls keeps the host busy, least of five turns; the device works meanwhile."""
    waits = synchronized(lambda: None, device)
    times = []
    for _ in range(5):
        waits()
        times.append(wall_clock(call, calls))
    waits()
    return min(times)


def throughput(devices: Collection[torch.device], call: Call, calls: int) -> float:
    """Seconds of a call among so many in a row, whichever is slower, the host or the devices."""
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]

    def wait() -> None:
        for device in accelerators:
            torch.accelerator.synchronize(device)

    def many() -> None:
        for _ in range(calls):
            call()
        wait()

    wait()
    return wall_clock(many, 1) / calls


def alone(devices: Collection[torch.device], call: Call) -> float:
    """`throughput` of as many calls as fill a longer sample."""
    calls = 1
    while (seconds := throughput(devices, call, calls)) * calls <= LONGER_SAMPLE:
        calls *= 2
    return seconds


def in_turns(contestants: Iterable[T], turns: int, deadline: float = math.inf) -> Iterator[T]:
    """Each of them once in each turn, in the other order in every second one, without those taken out meanwhile.

    No turn but the first begins behind the ``deadline`` (of `time.monotonic`).
    """
    for turn in range(turns):
        if turn and time.monotonic() >= deadline:
            return
        yield from list(contestants)[:: 1 if turn % 2 == 0 else -1]


def interleave(
    contestants: Sequence[Call], turns: int, calls: int, clock: Clock = wall_clock, deadline: float = math.inf
) -> list[list[float]]:
    """Seconds per call of each, once in each turn: ``calls`` in a row of the one, then of the next."""
    times: list[list[float]] = [[] for _ in contestants]
    for which in in_turns(range(len(contestants)), turns, deadline):
        times[which].append(clock(contestants[which], calls))
    return times


def timed(
    contestants: Mapping[str, Call], turns: int, clock: Clock, deadline: float = math.inf
) -> dict[str, list[float]]:
    """Warm up and time them, as `interleave` does, each so often that the fastest fills a sample.

    Behind the ``deadline`` each is timed once, and nothing is warmed up.
    """
    calls, repeated = list(contestants.values()), 1
    if time.monotonic() < deadline:
        warm = [partial(clock, call, 1) for call in calls]  # with all that the clock itself takes
        fastest = min(own[-1] for own in interleave(warm, 3, 1, deadline=deadline))
        repeated = max(1, round(SAMPLE_SECONDS / fastest))
    return dict(zip(contestants, interleave(calls, turns, repeated, clock, deadline), strict=True))
