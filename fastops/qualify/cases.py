"""A case of ``fastops qualify``, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from fastops.bench.contestants import NotRun as NotRun
from fastops.bench.contestants import one_line as one_line
from fastops.cli.verify import CheckError

HOLDS, FAILED, NOT_RUN = "holds", "failed", "not run"
Figures = dict[str, Any]  # as JSON has it
PARTS: Final = {
    "kernels": "Kernels: errors in units of torch's own, memory outside of tensors, two runs bit for bit, CUDA graphs",
    "models": "Gradients of each op, and reference models beside eager ones in training",
    "compilations": "Compiling what is timed",
    "speed": "Which way is the fastest, and how fast: fastops, eager, torch.compile, Liger",
}


@dataclass(frozen=True)
class Case:
    """Something to check or to measure. ``run`` returns figures, or raises `NotRun` or what went wrong."""

    name: str
    run: Callable[[torch.device], Figures]


@dataclass(frozen=True)
class Result:
    """What became of a case: ``outcome`` is "holds", "failed" or "not run", ``reason`` why it is one of the latter."""

    name: str
    outcome: str
    reason: str
    seconds: float
    figures: Figures


def on_a_gpu(device: torch.device) -> bool:
    """Whether figures of this device are a GPU's: on the CPU Triton's interpreter runs, to test the code."""
    return device.type != "cpu"


def run_case(case: Case, device: torch.device) -> Result:
    """Run it to its end, device included."""
    start = time.perf_counter()
    torch.manual_seed(0)
    outcome, reason, figures = HOLDS, "", Figures()
    try:
        figures = case.run(device)
        if on_a_gpu(device):
            torch.accelerator.synchronize(device)  # an error of the last kernel belongs to this case
    except NotRun as error:
        outcome, reason = NOT_RUN, str(error)
    except torch.OutOfMemoryError as error:
        outcome, reason = NOT_RUN, one_line(error)
    except CheckError as error:
        outcome, reason = FAILED, str(error)
    except Exception as error:  # whatever a case raises is what it found
        outcome, reason = FAILED, one_line(error)
    return Result(case.name, outcome, reason, round(time.perf_counter() - start, 3), figures)


def cases_of(part: str, device: torch.device) -> list[Case]:
    """Those of a part, the most important first."""
    from . import kernels, models, speed

    parts = {"kernels": kernels.cases, "models": models.cases, "compilations": speed.compilations, "speed": speed.cases}
    return parts[part](device)
