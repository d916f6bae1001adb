"""Batch norms in evaluation mode, folded into the convolutions before them by `fastops.promises`.

With weight w and bias b of the convolution, and weight g, bias a, mean m and variance v of the batch norm::

    w' = w g / sqrt(v + eps),   b' = (b - m) g / sqrt(v + eps) + a

The convolution with w' and b' is both at once, up to rounding. Nothing is remembered: w' and b' are computed in the
call that uses them, because no one can tell whether a tensor has changed. (Fused optimizers, collectives, writes
through ``.data`` and other processes leave its version counter alone.)
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from .dispatch import selected_backend
from .kernels import private
from .ops.accepts import PLAIN

# Folding passes over the weight instead of the output. It must be so much smaller to make up for the smaller steps:
# on an AMD EPYC with AVX-512 outputs 5 to 7 times as large cost 1 to 5 %, and 28 times saved 20 %.
SMALLER: Final = 12
_DIMENSIONS: Final = ((nn.BatchNorm1d, 3), (nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5))


def folded_weights(layer: Any, norm: Any, input: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with the batch norm behind it, or None where the two are to run on their own.

    They are where the batch norm uses the statistics of the batch or does not fit, where the output is not much larger
    than the weight, where a gradient or a tangent of the parameters may be wanted, under the transforms, tracers and
    compilers of torch, which see and fuse the two by themselves, and on backend ``"torch"``, which is eager to the bit.
    """
    if norm.training or torch.compiler.is_compiling() or selected_backend() == "torch":
        return None
    if private.forward_levels._current_level >= 0 or private.transforms_active() or private.tracing_state() is not None:
        return None
    try:
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if weight is None or weight.numel() * SMALLER > _positions(layer, input) * weight.shape[0]:
            return None
        scale, shift = norm._parameters["weight"], norm._parameters["bias"]
        mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    except KeyError:  # they are computed, by a parametrization say
        return None
    if mean is None or variance is None:
        return None
    statistics = [tensor for tensor in (scale, shift, mean, variance) if tensor is not None]
    present = [weight, *statistics] if bias is None else [weight, bias, *statistics]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return None
    if any(
        type(tensor) not in PLAIN or tensor.dtype != weight.dtype or tensor.device != weight.device
        for tensor in present
    ):
        return None
    dimensions = input.dim()
    fits = dimensions == weight.dim() and all(tensor.shape == weight.shape[:1] for tensor in statistics)
    if not (fits and (dimensions, True) in [(dim, isinstance(norm, kind)) for kind, dim in _DIMENSIONS]):
        return None
    with torch.no_grad():  # in float32 at least, as torch's batch norm computes
        wide = torch.promote_types(weight.dtype, torch.float32)
        factor = torch.rsqrt(variance.to(wide) + norm.eps)
        if scale is not None:
            factor = factor * scale
        moved = factor * (-mean if bias is None else bias - mean.to(wide))
        if shift is not None:
            moved = moved + shift
        scaled = weight * factor.view(-1, *[1] * (dimensions - 1))
        return scaled.to(weight.dtype), moved.to(weight.dtype)


def _positions(layer: Any, input: Tensor) -> int:
    """About how many the output of ``layer`` has, in all samples."""
    positions = input.shape[0] if input.dim() else 0
    for size, stride in zip(input.shape[2:], layer.stride, strict=False):  # wrong dimensions fail in the convolution
        positions *= size // stride
    return positions
