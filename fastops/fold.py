"""Batch norms in evaluation mode, folded into the convolutions before them.

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
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .kernels import private
from .ops.accepts import PLAIN

# Folding passes over the weight instead of the output. It must be so much smaller to make up for the smaller steps.
SMALLER: Final = 4
_DIMENSIONS: Final = ((nn.BatchNorm1d, 3), (nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5))


def folded_weights(layer: Any, norm: Any, input: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with the batch norm behind it, or None where the two are to run on their own.

    They are where the batch norm uses the statistics of the batch or does not fit, where the output is not much larger
    than the weight, where a gradient or a tangent of the parameters may be wanted, and under the transforms and
    compilers of torch, which see and fuse the two by themselves.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None or torch.compiler.is_compiling():
        return None
    if private.forward_levels._current_level >= 0 or private.transforms_active():
        return None
    weight, statistics = layer.weight, (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    present = [tensor for tensor in (weight, layer.bias, *statistics) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return None
    if any(
        type(tensor) not in PLAIN or tensor.dtype != weight.dtype or tensor.device != weight.device
        for tensor in present
    ):
        return None
    fits = all(tensor is None or tensor.shape == weight.shape[:1] for tensor in statistics)
    if not (fits and (input.dim(), True) in [(dim, isinstance(norm, kind)) for kind, dim in _DIMENSIONS]):
        return None
    positions = input.shape[0]
    for size, stride in zip(input.shape[2:], layer.stride, strict=True):
        positions *= size // stride
    if weight.numel() * SMALLER > positions * weight.shape[0]:
        return None
    with torch.no_grad():
        return fuse_conv_bn_weights(
            weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
