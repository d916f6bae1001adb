"""Times and costs of a case: one row for each contestant, and what its figures let one say."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastops.timing import Call, clock_of, ratio, timed

from .cases import Case
from .contestants import EAGER, OURS, OURS_COMPILED, forget_compiled, through, tried
from .counting import Traffic, cost_of, operations_of

FASTER, SLOWER, UNCLEAR, SAME, OVERHEAD = "faster", "slower", "unclear", "same code", "same code, slower"
FEWEST_TURNS: Final = 5  # of which quartiles say anything
WIDEST: Final = 1.5  # upper quartile over lower: with more the machine was busy with something else
SPREAD: Final = (0.05, 0.95)  # nine of ten turns are between


@dataclass(frozen=True)
class Row:
    """A contestant in a case. ``ratio``: its time over eager's in the same turn, median; below it quartiles and spread.

    ``bytes``, ``launches`` and ``peak_bytes`` are None where they cannot be told: ``unknown`` says why. ``bytes`` and
    ``flops`` are of one call, ``flops`` of a GPU's alone. ``way`` is that of fastops.
    """

    case: str
    contestant: str
    dtype: str
    way: str
    milliseconds: float
    turns: int
    ratio: float
    quartiles: tuple[float, float]
    spread: tuple[float, float] | None
    verdict: str
    bytes: int | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    flops: int = 0
    unknown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """The rows of a case, and why other contestants have none."""

    rows: list[Row]
    left_out: dict[str, str]


def verdict(turns: int, lower: float, upper: float, same_code: bool) -> str:
    """What quartiles of ratios say: nothing if they are few, far apart or on both sides of 1.

    The same code is never faster; it is slower where what comes before it shows.
    """
    clear = turns >= FEWEST_TURNS and not lower <= 1 <= upper and upper <= WIDEST * lower
    if same_code:
        return OVERHEAD if clear and lower > 1 else SAME
    if not clear:
        return UNCLEAR
    return FASTER if upper < 1 else SLOWER


def measure(
    case: Case,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    pairs: int = 50,
    backend: str = "auto",
    contestants: Collection[str] = (),
    seconds: float = float("inf"),
) -> Measured:
    """Prepare a case, time its contestants in turns, and count what they do.

    Without ``contestants`` all take part. First calls may take half of the ``seconds``, and no turn begins after them.
    Raises `NotRun` if eager does not run.
    """
    torch.manual_seed(0)
    forget_compiled()
    start = time.monotonic()
    contest = case.prepare(device, dtype)
    wanted = {
        name: through(backend, call) if name in (OURS, OURS_COMPILED) else call
        for name, call in contest.calls.items()
        if not contestants or name in (EAGER, *contestants)
    }
    first = sorted(wanted, key=lambda name: name not in (EAGER, OURS))  # a compiler may take all the time that is left
    able, left_out = tried({name: wanted[name] for name in first}, device, (), start + seconds / 2)
    times = timed(able, pairs, clock_of(device), start + 0.9 * seconds)
    way = str(through(backend, contest.way)()) if OURS in able else ""
    seen = {name: operations_of(name, call) for name, call in able.items()}
    flops = _flops(able[EAGER]) if device.type == "cuda" else 0
    rows = [
        _row(case, name, dtype, way if name == OURS else "", times, able[name], seen, device, flops) for name in able
    ]
    return Measured(rows, left_out)


def _row(
    case: Case,
    name: str,
    dtype: torch.dtype,
    way: str,
    times: Mapping[str, list[float]],
    call: Call,
    seen: Mapping[str, Traffic | str],
    device: torch.device,
    flops: int,
) -> Row:
    own, eager = times[name], times[EAGER]
    median, lower, upper = ratio(own, eager)
    low, high = (float(value) for value in np.quantile(np.divide(own, eager), SPREAD))
    ours, theirs = seen[name], seen[EAGER]
    same = isinstance(ours, Traffic) and isinstance(theirs, Traffic) and ours.same_code(theirs)
    cost = cost_of(call, ours, device)
    return Row(
        case.name,
        name,
        str(dtype).removeprefix("torch."),
        way,
        1e3 * float(np.median(own)),
        len(own),
        median,
        (lower, upper),
        (low, high),
        "" if name == EAGER else verdict(len(own), lower, upper, same),
        cost.bytes,
        cost.launches,
        cost.peak_bytes,
        flops,
        cost.unknown,
    )


def _flops(call: Call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())


def peaks(
    device: torch.device, size: int = 2**30, width: int = 8192, dtypes: Collection[torch.dtype] = (torch.float32,)
) -> dict[str, float]:
    """What a device does at most in a second: bytes of a copy (read and written), operations of a product by dtype."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    target, clock = torch.empty_like(source), clock_of(device)
    rates = {"copy": 2 * size / _median(timed({"": lambda: target.copy_(source)}, 15, clock))}
    for dtype in dtypes:
        rows = width // 2 if dtype is torch.float64 else width
        a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        seconds = _median(timed({"": lambda a=a, b=b: torch.mm(a, b)}, 5, clock))  # type: ignore[misc]
        rates[str(dtype).removeprefix("torch.")] = 2 * rows**3 / seconds
    return rates


def _median(times: Mapping[str, list[float]]) -> float:
    return float(np.median(times[""]))
