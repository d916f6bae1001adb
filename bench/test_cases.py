"""Every case of ``fastops bench`` by itself: in each dtype, forward, forward and backward, steps and inference."""

from typing import Any

import pytest
import torch

from fastops.bench.cases import CASES, DTYPES
from fastops.benchmark import run_contestant
from fastops.cli.environment import pick_device

NAMED = {case.name: case for case in CASES}
ROWS = [
    (name, dtype, contestant) for name, case in NAMED.items() for dtype in DTYPES for contestant in case.contestants
]


@pytest.mark.parametrize(("case", "dtype", "contestant"), ROWS, ids=["-".join(row) for row in ROWS])
def test_case(benchmark: Any, case: str, dtype: str, contestant: str) -> None:
    torch.manual_seed(0)
    device = pick_device(None)
    contest = NAMED[case].prepare(device, DTYPES[dtype])
    run_contestant(benchmark, f"{case}-{dtype}", contest, contestant, device)
