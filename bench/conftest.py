"""The benchmark suite: ``pytest bench/``, or ``make bench``.

Every case of ``fastops bench`` is one group with two rows: eager torch and fastops, on equal inputs, synchronized where
there is a GPU. pytest-benchmark times one row after the other, so a machine whose speed drifts shows in the comparison:
for ratios use ``fastops bench``, which times both in turns. ``FASTOPS_BACKEND`` selects the backend, ``-k`` the cases.
No time is ever asserted.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastops.cli import CommandError
from fastops.cli.bench import Case, environment, refuse_interpreter
from fastops.cli.environment import check_backend, pick_device
from fastops.timing import synchronized


def pytest_configure(config: pytest.Config) -> None:
    try:
        refuse_interpreter()
        check_backend(pick_device(None))
    except CommandError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(environment(pick_device(None)))


@pytest.fixture
def compare(benchmark: Any) -> Callable[[Case, str], None]:
    """Time one contestant of a case, in a group that both share."""

    def run(case: Case, contestant: str) -> None:
        torch.manual_seed(0)
        benchmark.group = case.name
        device = pick_device(None)
        benchmark(synchronized(case.prepare(device).calls[contestant], device))

    return run
