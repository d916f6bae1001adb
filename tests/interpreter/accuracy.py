"""The one oracle: torch, at most twice its own error against float64 plus one rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastops.accuracy import error_share

Tensors = Sequence[Tensor | None]


def assert_as_accurate_as_torch(
    reference: Callable[..., Sequence[Tensor]], *runs: tuple[Sequence[Tensor], Tensors]
) -> None:
    """Hold each run's ``(results, tensors)`` to what ``reference(*tensors)`` gives.

    ``reference`` computes with torch, in whatever dtype the tensors have. It runs in float64, and in the results' own
    dtype; for float64 results in float32, whose error `error_share` scales. All runs are judged together: the error of
    torch in one single number may be nothing by luck.
    """

    def computed_in(dtype: torch.dtype, tensors: Tensors) -> Sequence[Tensor]:
        return reference(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors))

    dtype = runs[0][0][0].dtype
    ours = [results for results, _ in runs]
    torchs = [computed_in(torch.float32 if dtype is torch.float64 else dtype, tensors) for _, tensors in runs]
    exact = [computed_in(torch.float64, tensors) for _, tensors in runs]
    for number in range(len(ours[0])):
        result, expected, truth = (
            torch.stack([values[number] for values in column]) for column in (ours, torchs, exact)
        )
        assert result.dtype is dtype
        share = error_share(result, expected, truth)
        assert share <= 1, f"result {number} uses {share:.3g} of the error that is allowed"
