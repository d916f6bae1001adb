"""The one oracle: torch, at most twice its own error against float64 plus one rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastops.accuracy import error_share

Tensors = Sequence[Tensor | None]
Run = tuple[Sequence[Tensor], Tensors]

# Of two equally good sums of 64 products in float32, the one breaks the rule beside the other once in seven times if
# the error of a single number is all that is known of the other, and once in a thousand if it is the largest of 64.
NUMBERS = 64


def assert_as_accurate_as_torch(reference: Callable[..., Sequence[Tensor]], *runs: Run) -> None:
    """Hold each run's ``(results, tensors)`` to what ``reference(*tensors)`` gives.

    ``reference`` computes with torch, in whatever dtype the tensors have. It runs in float64, and in the results' own
    dtype; for float64 results in float32, whose error `error_share` scales. All runs are judged together.

    The error of torch in a few numbers may be nothing by luck, and which are the lucky ones depends on the processor.
    So torch computes others near to them, until its error in at least 64 numbers is known.
    """

    def computed_in(dtype: torch.dtype, tensors: Tensors) -> Sequence[Tensor]:
        return reference(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors))

    dtype = runs[0][0][0].dtype
    torchs_dtype = torch.float32 if dtype is torch.float64 else dtype
    generator = torch.Generator().manual_seed(0)
    known = len(runs) * max(1, min(result.numel() for result in runs[0][0]))
    more = [tensors for _, tensors in runs for _ in range(-(-NUMBERS // known) - 1)]
    drawn = [*(tensors for _, tensors in runs), *([near(t, generator) for t in tensors] for tensors in more)]
    torchs = [computed_in(torchs_dtype, tensors) for tensors in drawn]
    exact = [computed_in(torch.float64, tensors) for tensors in drawn]
    # Where torch alone computes, its own result stands for ours, and the float64 result for one of float64.
    ours = [*(results for results, _ in runs), *(exact if dtype is torch.float64 else torchs)[len(runs) :]]
    for number in range(len(ours[0])):
        result, expected, truth = (
            torch.stack([values[number] for values in column]).detach() for column in (ours, torchs, exact)
        )
        assert result.dtype is dtype
        share = error_share(result, expected, truth)
        assert share <= 1, f"result {number} uses {share:.3g} of the error that is allowed"


def near(tensor: Tensor | None, generator: torch.Generator) -> Tensor | None:
    """A tensor whose elements are those of the given one, but for an eighth of each; integers stay."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return (tensor.double() * (0.875 + 0.25 * torch.rand(tensor.shape, generator=generator))).to(tensor.dtype)
