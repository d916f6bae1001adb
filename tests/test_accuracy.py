"""The rule by which results are judged: how much of the error that is allowed they have."""

from __future__ import annotations

import pytest
import torch

from fastops.accuracy import error_share

NAN, INF = float("nan"), float("inf")
ULP = torch.finfo(torch.float32).eps  # of 1


@pytest.mark.parametrize(
    ("result", "expected", "exact", "share"),
    [
        pytest.param([1.0], [1.0], [1.0], 0.0, id="nothing wrong"),
        pytest.param([1 + ULP], [1.0], [1.0], 2.0, id="torch is exact: half a unit in the last place is allowed"),
        pytest.param(
            [1 + ULP], [1.0], [1 + ULP / 2], 0.5 / 1.5, id="torch is wrong by one rounding: one and a half units"
        ),
        pytest.param([1 + 3 * ULP], [1 + ULP], [1.0], 3 / 2.5, id="more than twice as wrong as torch"),
        pytest.param([1.0, 1 + 2 * ULP], [1 + ULP, 1.0], [1.0, 1.0], 2 / 2.5, id="torch's largest error counts"),
        pytest.param([0.0], [0.0], [0.0], 0.0, id="zero"),
        pytest.param([2.0**-149], [0.0], [2.0**-150], 0.5 / 1.5, id="rounding of a number next to zero"),
        pytest.param([NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.0], 0.0, id="what is not finite"),
        pytest.param([1.0], [NAN], [NAN], INF, id="NaN is lost"),
        pytest.param([NAN], [1.0], [1.0], INF, id="NaN is made"),
        pytest.param([INF], [1.0], [1.0], INF, id="infinity is made"),
        pytest.param([INF], [-INF], [-INF], INF, id="the wrong infinity"),
        pytest.param([], [], [], 0.0, id="empty"),
    ],
)
def test_error_share(result: list[float], expected: list[float], exact: list[float], share: float) -> None:
    assert error_share(
        torch.tensor(result), torch.tensor(expected), torch.tensor(exact, dtype=torch.float64)
    ) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(("units", "share"), [(1, 1 / 3.5), (4, 4 / 3.5)])
def test_error_share_of_float64(units: int, share: float) -> None:
    """Torch's float32 result is wrong by one unit in its last place: so is, in effect, its float64 result."""
    exact = torch.ones(3, dtype=torch.float64)
    result = exact + units * torch.finfo(torch.float64).eps
    assert error_share(result, torch.full((3,), 1 + ULP), exact) == pytest.approx(share)
