"""Losses: `fastops.cli.bench` lists the sizes."""

from collections.abc import Callable

import pytest

from fastops.cli.bench import HEAD_CASES, LOSS_CASES, Case


@pytest.mark.parametrize("contestant", ["eager", "fastops"])
@pytest.mark.parametrize("case", [*LOSS_CASES, *HEAD_CASES], ids=lambda case: case.name)
def test_loss(compare: Callable[[Case, str], None], case: Case, contestant: str) -> None:
    compare(case, contestant)
