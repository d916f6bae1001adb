"""The benchmark suite: ``pytest bench/``, or ``make bench``.

Every case of ``fastops bench`` in a dtype is one group, with a row for each contestant, on equal inputs, synchronized
where there is a GPU. pytest-benchmark times one row after the other, so a machine whose speed drifts shows in the
comparison: for ratios use ``fastops bench``, which times them in turns. ``FASTOPS_BACKEND`` selects the backend, ``-k``
the rows. No time is ever asserted.
"""

from typing import Any

import pytest

from fastops.cli import CommandError
from fastops.cli.bench import environment, refuse_interpreter
from fastops.cli.environment import check_backend, pick_device


def pytest_configure(config: pytest.Config) -> None:
    try:
        refuse_interpreter()
        check_backend(pick_device(None))
    except CommandError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(environment(pick_device(None)))
