"""Reference models: plain torch.nn code, the existing models that ``fastops.swap`` is shown on."""

from fastops.models.cifar_net import CIFAR_CLASSES, CIFARNet
from fastops.models.fashion_mlp import FASHION_CLASSES, FashionMLP
from fastops.models.lenet import LeNet
from fastops.models.linear_regression import LinearRegression
from fastops.models.logistic import Logistic
from fastops.models.two_layer_net import TwoLayerNet

__all__ = [
    "CIFAR_CLASSES",
    "FASHION_CLASSES",
    "CIFARNet",
    "FashionMLP",
    "LeNet",
    "LinearRegression",
    "Logistic",
    "TwoLayerNet",
]
