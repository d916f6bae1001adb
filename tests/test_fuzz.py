"""Every public op against torch, over random shapes, layouts, dtypes, values, options and mistakes.

CONTRIBUTING.md says how to try a thousand calls of each, and how to run a failure again.
"""

from __future__ import annotations

import re

import pytest
from fuzz_calls import Call, Given, check
from fuzz_strategies import FAMILIES, calls
from hypothesis import given

from fastops.ops import OPS


def test_every_op_has_a_strategy() -> None:
    assert all(any(re.fullmatch(family, op) for family in FAMILIES) for op in OPS)


@pytest.mark.parametrize("op", OPS)
def test_calls(op: str) -> None:
    given(call=calls(op))(check)()


def test_a_printed_call_runs_as_it_stands() -> None:
    call = Call("linear", {"input": Given((3, 2), "float32"), "weight": Given((1, 2), "float32", "transposed")})
    exec(f"from fuzz_calls import *\ncheck(call={call!r})", {})
