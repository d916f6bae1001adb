"""How many of our own Python functions a call passes before its kernel is launched, as bench/host_calls.py counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastops.ops import OPS

ROOT = Path(__file__).parents[1]
MEASURED = {
    "linear_relu": (17, 7),
    "conv_relu2d": (29, 18),
    "add_relu": (18, 9),
    "mse_loss": (20, 13),
    "cross_entropy": (27, 16),
}
GOALS = {"linear_relu": (12, 14), "conv_relu2d": (18, 18)}


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[int, int]]:
    """By op: calls up to the first launch of the forward and of the backward pass."""
    script = str(ROOT / "bench" / "host_calls.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    return {op: (int(forward), int(backward)) for op, forward, _, backward, _ in rows}


def test_every_op_is_counted(counted: dict[str, tuple[int, int]]) -> None:
    """And launches something, both ways."""
    assert list(counted) == list(OPS)
    assert all(forward > 0 and backward > 0 for forward, backward in counted.values())


@pytest.mark.parametrize("op", MEASURED)
def test_no_more_than_measured(op: str, counted: dict[str, tuple[int, int]]) -> None:
    assert counted[op][0] <= MEASURED[op][0] and counted[op][1] <= MEASURED[op][1]


@pytest.mark.parametrize(
    "which", [pytest.param(0, marks=pytest.mark.xfail, id="forward"), pytest.param(1, id="backward")]
)
@pytest.mark.parametrize("op", GOALS)
def test_goal(op: str, which: int, counted: dict[str, tuple[int, int]]) -> None:
    assert counted[op][which] <= GOALS[op][which]
