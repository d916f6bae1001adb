"""Checkpoints: everything that a run needs to go on as if it had not been interrupted."""

import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastops.cli import CommandError
from fastops.cli.environment import writing
from fastops.cli.training import Learner

FORMAT = "fastops checkpoint 1"


@dataclass(frozen=True)
class Settings:
    """What decides the course of a run."""

    model: str
    batch_size: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``epoch`` finished epochs. The file is a dictionary that ``torch.load(weights_only=True)`` reads."""

    format: str
    settings: dict[str, Any]
    data: str
    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    measured: dict[str, list[float]]
    random_state: Tensor
    shuffle_state: Tensor


def save(path: Path, settings: Settings, data: str, epoch: int, learner: Learner, generator: torch.Generator) -> None:
    """Write a checkpoint, as a whole or not at all; ``CommandError`` if it cannot be written."""
    checkpoint = Checkpoint(
        format=FORMAT,
        settings=asdict(settings),
        data=data,
        epoch=epoch,
        model=learner.model.state_dict(),
        optimizer=learner.optimizer.state_dict(),
        measured={name: getattr(learner, name) for name in ("losses", "seconds", "test_losses", "accuracies")},
        random_state=torch.get_rng_state(),
        shuffle_state=generator.get_state(),
    )
    with writing(path) as file:
        torch.save(vars(checkpoint), file)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; ``CommandError`` if the file is missing, damaged or something else."""
    damaged = CommandError(f"cannot read checkpoint {path}: damaged, or not a checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load itself does not look at the checksums
                raise damaged
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
        raise damaged from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CommandError(f"{path} was not written by fastops train --save")
    try:
        return Checkpoint(**content)
    except TypeError as error:
        raise damaged from error


def restore(checkpoint: Checkpoint, learner: Learner, generator: torch.Generator) -> None:
    """Put the learner, the global generator and the one that shuffles the data into the state of the checkpoint."""
    try:
        learner.model.load_state_dict(checkpoint.model)
        learner.optimizer.load_state_dict(checkpoint.optimizer)
        for name, values in checkpoint.measured.items():
            getattr(learner, name).extend(values)
        torch.set_rng_state(checkpoint.random_state)
        generator.set_state(checkpoint.shuffle_state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError("cannot resume: the checkpoint's content is damaged") from error
