"""The accuracy rule that every operation is held to: at most twice torch's own error, plus one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, torch's settings for float32 products and convolutions on a GPU are "ieee" or "tf32".

    cuDNN's is set for convolutions and recurrent networks at once, by its older name: torch refuses to read that where
    the two differ.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.allow_tf32
    matmul.fp32_precision, cudnn.allow_tf32 = precision, precision == "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.allow_tf32 = before


def error_share(result: Tensor, expected: Tensor, exact: Tensor) -> float:
    """The share of its allowed error that ``result`` uses: accurate enough if at most 1.

    Element by element the rule is ``|result - exact| <= 2 max|expected - exact| + one rounding of exact``. Where
    torch's own result is infinite or NaN, ``result`` must be the same.

    Args:
        result: what is judged; any shape, any floating dtype.
        expected: torch's result for the same values, in the dtype of ``result``. In float64 torch is the reference
            itself and has no error to compare with: pass its float32 result, whose error is scaled to float64's.
        exact: torch's float64 result for the same values. For a float64 ``result`` it has torch's own error, which is
            allowed on top: three times in all.

    Returns:
        0 or more; ``inf`` where ``result`` is infinite or NaN and torch is not, or the other way round.
    """
    assert result.shape == expected.shape == exact.shape and exact.dtype is torch.float64
    precision = torch.finfo(result.dtype)
    scale = precision.eps / torch.finfo(expected.dtype).eps
    result, expected = result.double(), expected.double()
    finite = expected.isfinite()
    if not torch.allclose(result[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    result, expected, exact = result[finite], expected[finite], exact[finite]
    one_rounding = precision.eps / 2 * exact.abs().clamp(min=precision.tiny)
    times = 3 if precision.eps == torch.finfo(exact.dtype).eps else 2
    allowed = times * scale * (expected - exact).abs().max() + one_rounding
    error = (result - exact).abs()
    return torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def times_torchs(result: Tensor, expected: Tensor, exact: Tensor) -> float:
    """The largest error of ``result`` in units of torch's own, or of one rounding if torch's is less.

    Takes what `error_share` takes. Elements where any of the three is infinite or NaN do not count.
    """
    precision = torch.finfo(result.dtype)
    scale = precision.eps / torch.finfo(expected.dtype).eps
    finite = result.isfinite() & expected.isfinite() & exact.isfinite()
    result, expected, exact = (tensor[finite].double() for tensor in (result, expected, exact))
    if not exact.numel():
        return 0.0
    one_rounding = precision.eps / 2 * exact.abs().max()
    unit = torch.maximum(scale * (expected - exact).abs().max(), one_rounding).clamp(min=precision.tiny)
    return ((result - exact).abs().max() / unit).item()
