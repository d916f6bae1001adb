"""A model to be tuned, and a fake clock, for several files of tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

import fastops
from fastops import dispatch, tuning_cache

Timer: TypeAlias = Callable[[Callable[[], object]], float]


def clock(**seconds: float) -> Timer:
    """Makes the call, and says how long its backend takes."""

    def timer(call: Callable[[], object]) -> float:
        call()
        return seconds.get(dispatch.selected_backend(), 1.0)

    return timer


def again() -> None:
    """As a new process would find it."""
    tuning_cache._of.cache_clear()
    dispatch.tuned = tuning_cache.anything()


def mlp() -> nn.Module:
    return fastops.swap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4)))
