"""A user's own model: ``package.module:factory``, and what it is called with."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastops.cli import CommandError

from .cases import DTYPES, Case, Contest, differentiable, mean_of, model_contest
from .contestants import one_line

KINDS: Final = DTYPES | {
    name: getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
SPELLED: Final = "sizes with commas between them, and a dtype if it is not float32: 8,3,224,224 or 8,128:int64"


def parse_input(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of ``8,3,224,224`` or ``8,128:int64``; `CommandError` for anything else."""
    sizes, colon, kind = text.partition(":")
    numbers = [size.strip() for size in sizes.split(",")]
    if not all(number.isdecimal() and 0 < int(number) < 2**31 for number in numbers):
        raise CommandError(f"--input {text!r} is no shape: {SPELLED}")
    if colon and kind not in KINDS:
        raise CommandError(f"--input {text!r} has an unknown dtype: one of {', '.join(KINDS)}")
    return tuple(map(int, numbers)), KINDS[kind] if colon else torch.float32


def load(name: str) -> nn.Module:
    """The module that ``package.module:factory`` is, or makes. `CommandError` for whatever goes wrong."""
    package, colon, path = name.partition(":")
    if not (package and colon and path):
        raise CommandError(f"{name!r} is no model: package.module:factory, where the factory makes an nn.Module")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(package)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise CommandError(f"cannot import {package}: {one_line(error)}") from error
    for word in path.split("."):
        if not hasattr(found, word):
            raise CommandError(f"{package} has no {path}")
        found = getattr(found, word)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise CommandError(f"{name} is no nn.Module and makes none: it is of type {type(found).__name__}")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise CommandError(f"{name}() raises {one_line(error)}") from error
    if not isinstance(found, nn.Module):
        raise CommandError(f"{name}() returns no nn.Module but {type(found).__name__}")
    if isinstance(found, torch.jit.ScriptModule):
        raise CommandError(f"{name} is scripted, which fastops cannot swap: hand over the module that it was made of")
    return found


def drawn(shape: tuple[int, ...], dtype: torch.dtype, model: nn.Module) -> Tensor:
    """Random numbers; integers that each embedding of the model has."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return torch.randint(min([*sizes, torch.iinfo(dtype).max] if sizes else [2]), shape).to(dtype)


def own_cases(name: str, texts: list[str], device: torch.device) -> list[Case]:
    """A step of training and inference, or inference alone where nothing can be trained.

    A step is the forward pass, the backward pass of the mean of all outputs, and SGD with a learning rate of 0, which
    does the same work as another and leaves the weights as they are.
    """
    kinds = [parse_input(text) for text in texts]
    model = load(name)
    try:
        model = copied(model).to(device)
        copied(model).eval()(*(drawn(*kind, model).to(device) for kind in kinds))
    except CommandError:
        raise
    except Exception as error:
        said = f"{name} fails with --input {' --input '.join(texts)} on {device}: {one_line(error)}"
        raise CommandError(said) from error
    try:
        trains = bool(differentiable(copied(model).train()(*(drawn(*kind, model).to(device) for kind in kinds))))
    except Exception as error:
        print(f"inference alone: {name} does not train with this input: {one_line(error)}")
        trains = False

    def case(kind: str, training: bool) -> Case:
        def prepare(device: torch.device, dtype: torch.dtype) -> Contest:
            inputs = tuple(drawn(*kind, model).to(device) for kind in kinds)
            return model_contest(model, inputs, None, lambda _: mean_of, training, dtype, copied, sgd={"lr": 0.0})

        return Case(f"{name.partition(':')[2]}-{'-'.join(_spelled(*kind) for kind in kinds)}/{kind}", prepare)

    return [*([case("step", True)] if trains else []), case("inference", False)]


def _spelled(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return "x".join(map(str, shape)) + (f":{str(dtype).removeprefix('torch.')}" if dtype is not torch.float32 else "")


def copied(model: nn.Module) -> nn.Module:
    """A copy; `CommandError` where there can be none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CommandError(f"the model cannot be copied for each contestant: {one_line(error)}") from error
