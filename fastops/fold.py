"""Batch norms in evaluation mode, folded into the convolutions before them.

With weight w and bias b of the convolution, and weight g, bias a, mean m and variance v of the batch norm::

    w' = w g / sqrt(v + eps),   b' = (b - m) g / sqrt(v + eps) + a

The convolution with w' and b' is both at once, up to rounding. Parameters and buffers stay what and where they are; w'
and b' are kept beside the model, and computed anew after any of the tensors that they depend on has changed.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .ops.op import PLAIN


class _Folded(NamedTuple):
    eps: float
    sources: tuple[tuple[Any, int, int] | None, ...]
    weight: Tensor
    bias: Tensor


_folded: weakref.WeakKeyDictionary[nn.Module, _Folded] = weakref.WeakKeyDictionary()


def folded_weights(layer: Any, norm: Any) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with the batch norm behind it, or None where the two must run on their own.

    They must where the batch norm uses the statistics of the batch, where a gradient or a tangent of the parameters may
    be wanted, and under the transforms and compilers of torch, which see and fuse the two by themselves.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None or torch.compiler.is_compiling():
        return None
    tensors = (layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    present = [tensor for tensor in tensors if tensor is not None]
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return None
    first = present[0]
    if any(
        type(tensor) not in PLAIN or tensor.dtype != first.dtype or tensor.device != first.device for tensor in present
    ):
        return None
    # A batch norm changes its statistics unseen by their version counters; the count of its batches tells.
    batches = norm.num_batches_tracked
    if batches is None or any(tensor.is_inference() for tensor in (*present, batches)):  # nothing tells of changes
        return _fold(norm.eps, *tensors)
    watched = (*tensors, batches)
    known = _folded.get(layer)
    if known is None or known.eps != norm.eps or not all(map(_unchanged, watched, known.sources)):
        sources = tuple(None if t is None else (weakref.ref(t), t._version, t.data_ptr()) for t in watched)
        known = _folded[layer] = _Folded(norm.eps, sources, *_fold(norm.eps, *tensors))
    return known.weight, known.bias


def _unchanged(tensor: Tensor | None, source: tuple[Any, int, int] | None) -> bool:
    if tensor is None or source is None:
        return tensor is None and source is None
    reference, version, address = source
    return reference() is tensor and tensor._version == version and tensor.data_ptr() == address


def _fold(
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor]:
    # A normal tensor, also under inference_mode: it may be used outside of that, later.
    with torch.inference_mode(False), torch.no_grad():
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, eps, norm_weight, norm_bias)
        return fused[0].detach(), fused[1].detach()
