"""Runs commands of the command line in this process, and what they time."""

import pytest

import fastops
from fastops.bench import counting
from fastops.bench.cases import Contest
from fastops.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must succeed on the plain CPU way; returns what it printed."""
    with fastops.backend("torch"):
        status = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


def fail(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must end with status 2; returns its one line."""
    try:
        status: object = main([str(word) for word in words])
    except SystemExit as error:  # of argparse, which prints the usage first
        status = error.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    lines = printed.err.splitlines()
    assert len([line for line in lines if not line.startswith(("usage:", " "))]) == 1
    return lines[-1]


def seen(contest: Contest, name: str) -> counting.Traffic:
    """The operations of a second call, on the torch expression."""
    with fastops.backend("torch"):
        contest.calls[name]()
        return counting.operations(contest.calls[name])
