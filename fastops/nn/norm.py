"""Batch norms that `fastops.swap` may run as part of the convolution before them: by themselves they are torch's own.

The class is all that tells them apart, so that it travels with a copy and comes off with `fastops.unswap`.
"""

from __future__ import annotations

import torch


class BatchNorm1d(torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, folded where `fastops.swap` was called with ``fold_batchnorm=True``."""


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, folded where `fastops.swap` was called with ``fold_batchnorm=True``."""


class BatchNorm3d(torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, folded where `fastops.swap` was called with ``fold_batchnorm=True``."""
