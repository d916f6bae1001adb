"""Convolutions, with and without ReLU, and the sum with ReLU: `fastops.cli.bench` lists the sizes."""

from collections.abc import Callable

import pytest

from fastops.cli.bench import CONV_CASES, Case


@pytest.mark.parametrize("contestant", ["eager", "fastops"])
@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_conv(compare: Callable[[Case, str], None], case: Case, contestant: str) -> None:
    compare(case, contestant)
