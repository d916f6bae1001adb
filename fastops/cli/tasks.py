"""What each reference model is trained on, and with which settings."""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastops.cli import CommandError
from fastops.cli.data import CIFAR_SHAPE, DIGIT_SHAPE, Images, digits, folder
from fastops.models import CIFARNet, FashionMLP, LeNet, LinearRegression, TwoLayerNet
from fastops.models.cifar_net import random_images
from fastops.models.lenet import random_image
from fastops.models.linear_regression import points
from fastops.models.two_layer_net import random_batch

PASSES = 100  # A task that trains on one batch repeats it so often in an epoch.


class Batches(Sized, Iterable[list[Tensor]], Protocol):
    """Batches of inputs and targets."""


@dataclass(frozen=True)
class Data:
    """Batches to train on and, where accuracy means something, batches to test on and the names of the classes.

    ``generator`` shuffles the training batches; its state is what a resumed run must restore.
    """

    name: str
    train: Batches
    generator: torch.Generator
    test: Batches | None = None
    classes: list[str] | None = None


@dataclass(frozen=True)
class Task:
    """A reference model, its loss function, its data and the settings of its tutorial (SGD)."""

    model: Callable[[], nn.Module]
    loss_function: Callable[[], nn.Module]
    data: Callable[[Path | None, int, torch.Generator], Data]
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0


def _points(directory: Path | None, batch_size: int, generator: torch.Generator) -> Data:
    _refuse_folder(directory)
    loader = DataLoader(TensorDataset(*points()), batch_size=batch_size, generator=generator)
    return Data("x = 1, 2, 3 and y = 2, 4, 6", loader, generator)


def _random_rows(directory: Path | None, batch_size: int, generator: torch.Generator) -> Data:
    _refuse_folder(directory)
    batch = list(random_batch(batch_size, generator))
    return Data(f"{PASSES} passes over one random batch", [batch] * PASSES, generator)


def _random_image(directory: Path | None, batch_size: int, generator: torch.Generator) -> Data:
    _refuse_folder(directory)
    if batch_size != 1:
        raise CommandError("lenet trains on one random image: --batch-size must be 1")
    return Data(f"{PASSES} passes over one random image", [list(random_image(generator))] * PASSES, generator)


def _digits_or_folder(directory: Path | None, batch_size: int, generator: torch.Generator) -> Data:
    images = digits() if directory is None else folder(directory)
    if images.shape != DIGIT_SHAPE:
        raise CommandError(f"{images.name} has images of 3x32x32, for cifar-net; fashion-mlp takes 28x28 grey ones")
    return _loaders(images, batch_size, generator)


def _random_or_cifar(directory: Path | None, batch_size: int, generator: torch.Generator) -> Data:
    if directory is None:
        batch = list(random_images(batch_size, generator))
        return Data(f"{PASSES} passes over one random batch", [batch] * PASSES, generator)
    images = folder(directory)
    if images.shape != CIFAR_SHAPE:
        raise CommandError(f"{images.name} has grey images of 28x28, for fashion-mlp; cifar-net takes 3x32x32")
    return _loaders(images, batch_size, generator)


def _loaders(images: Images, batch_size: int, generator: torch.Generator) -> Data:
    return Data(
        images.name,
        DataLoader(images.train, batch_size=batch_size, shuffle=True, generator=generator),
        generator,
        DataLoader(images.test, batch_size=1000),
        images.classes,
    )


def _refuse_folder(directory: Path | None) -> None:
    if directory is not None:
        raise CommandError("this model makes its own data: --data is only for fashion-mlp and cifar-net")


def squared_error() -> nn.Module:
    """The sum of the squared errors of a batch."""
    return nn.MSELoss(reduction="sum")


TASKS = {
    "linear-regression": Task(LinearRegression, squared_error, _points, epochs=10, batch_size=1, lr=0.01),
    "two-layer-net": Task(TwoLayerNet, squared_error, _random_rows, epochs=5, batch_size=64, lr=1e-6),
    "fashion-mlp": Task(FashionMLP, nn.CrossEntropyLoss, _digits_or_folder, epochs=5, batch_size=64, lr=1e-3),
    "lenet": Task(LeNet, nn.MSELoss, _random_image, epochs=1, batch_size=1, lr=0.01),
    "cifar-net": Task(CIFARNet, nn.CrossEntropyLoss, _random_or_cifar, epochs=2, batch_size=4, lr=1e-3, momentum=0.9),
}
