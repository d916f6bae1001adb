"""Which way a call of fastops is the fastest, for the tables of `fastops.measured`."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import nn

import fastops
from fastops import measured
from fastops.ops.op import Explanation, FallbackWarning, failures_raised
from fastops.timing import ratio, throughput, timed
from fastops.tuning import LEAST_GAIN, Call, Example, calls_of, grouped

from .cases import on_a_gpu

TURNS: Final = 9


def ways_of(model: nn.Module, example_input: Any, timing: bool = True) -> list[dict[str, Any]]:
    """For each class of calls in a run of ``model``: the rule's way, the one that won, and the seconds of each.

    The rule's has won where no other is clearly faster. Without a GPU each way is gone, and none is told; without
    ``timing`` each is gone once, which compiles what it needs.
    """
    calls = calls_of(model, Example(example_input, None))
    entries = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for (device, key, rule), alike in grouped(calls).items():
                seconds = _seconds(alike[0], rule, device, timing)
                if seconds and on_a_gpu(device):
                    way = _won(seconds, rule.way)
                    medians = {name: float(np.median(own)) for name, own in seconds.items()}
                    entries.append(
                        {"class": measured.shape_class(key), "rule": rule.way, "way": way, "seconds": medians}
                    )
    return entries


def _seconds(call: Call, rule: Explanation, device: torch.device, timing: bool) -> dict[str, list[float]]:
    """Of each way that the call can go, in turns; nothing if that is one alone."""

    def through(backend: str) -> None:
        with fastops.backend(backend):
            call.run()

    ways = {rule.way: "auto"} | {way: way for way in ("triton", "torch") if way != rule.way and call.can_go(way)}
    able = {}
    for way, backend in ways.items():
        try:
            with failures_raised():
                through(backend)
        except (FallbackWarning, torch.OutOfMemoryError):  # no way for this call here
            continue
        able[way] = partial(through, backend)
    if rule.way not in able or len(able) == 1 or not timing:
        return {}
    return timed(able, TURNS if on_a_gpu(device) else 1, partial(throughput, {device}))


def _won(seconds: dict[str, list[float]], rule: str) -> str:
    fastest = min(seconds, key=lambda way: float(np.median(seconds[way])))
    clearly = ratio(seconds[fastest], seconds[rule]).upper < 1 - LEAST_GAIN
    return fastest if clearly else rule
