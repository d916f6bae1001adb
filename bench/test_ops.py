"""Every op at the sizes of real models, `fastops.ops.Op.timed`: the cases of `fastops.cli.bench`."""

from collections.abc import Callable

import pytest

from fastops.cli.bench import OP_CASES, Case


@pytest.mark.parametrize("contestant", ["eager", "fastops"])
@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case.name)
def test_op(compare: Callable[[Case, str], None], case: Case, contestant: str) -> None:
    compare(case, contestant)
