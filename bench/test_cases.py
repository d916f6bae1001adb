"""Every case of `fastops.cli.bench`: ops at the sizes of real models, whole training steps, and inference."""

from collections.abc import Callable

import pytest

from fastops.cli.bench import CASES, Case


@pytest.mark.parametrize("contestant", ["eager", "fastops"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(compare: Callable[[Case, str], None], case: Case, contestant: str) -> None:
    compare(case, contestant)
