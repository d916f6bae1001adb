"""Drop-in `torch.nn.Module` replacements, one file per family."""

from .conv import Conv1d, Conv2d, Conv3d, ConvReLU1d, ConvReLU2d, ConvReLU3d
from .linear import Linear, LinearReLU
from .loss import BCEWithLogitsLoss, CrossEntropyLoss, LinearCrossEntropyLoss, LinearCrossEntropyOptions, MSELoss

__all__ = [
    "BCEWithLogitsLoss",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "CrossEntropyLoss",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "LinearReLU",
    "MSELoss",
]
