"""How many of our own Python functions a call passes before its kernel is launched, as bench/host_calls.py counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastops.ops import OPS

ROOT = Path(__file__).parents[1]
MOST = {  # in all, forward and backward: what was measured
    "linear_relu": (12, 11),
    "conv_relu2d": (18, 15),  # two of them bring the input to channels last
    "add_relu": (12, 8),
    "mse_loss": (14, 7),
    "cross_entropy": (25, 15),
}


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[int, int]]:
    """By op: all calls of the forward and of the backward pass."""
    script = str(ROOT / "bench" / "host_calls.py")
    wide = os.environ | {"COLUMNS": "120"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    return {op: (int(forward), int(backward)) for op, _, forward, _, backward in rows}


def test_every_op_is_counted(counted: dict[str, tuple[int, int]]) -> None:
    """And launches something, both ways."""
    assert list(counted) == list(OPS)
    assert all(forward > 0 and backward > 0 for forward, backward in counted.values())


@pytest.mark.parametrize("op", MOST)
def test_the_way_does_not_get_longer(op: str, counted: dict[str, tuple[int, int]]) -> None:
    """The first two are goals of the design: 12 and 14, 18 and 18."""
    assert counted[op][0] <= MOST[op][0] and counted[op][1] <= MOST[op][1]
