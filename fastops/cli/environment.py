"""What the machine offers to a command: devices, backends, folders to write to."""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.cli import CommandError
from fastops.files import replacing


def positive_integer(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return number


def seed(text: str) -> int:
    """The type of an option that seeds torch's generators."""
    try:
        number = int(text)
        torch.Generator().manual_seed(number)
    except (ValueError, RuntimeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 64 bits") from None
    return number


def learning_rate(text: str) -> float:
    """The type of an option that takes a learning rate."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate")
    return rate


def pick_device(name: str | None) -> torch.device:
    """The device asked for, else the accelerator if there is one, else the CPU. ``CommandError`` if it is not there."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cpu" and device.index:  # torch takes it, and counts no CPUs
            raise RuntimeError("there is but one, cpu")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each kind of device has its own
        raise CommandError(f"cannot use device {name!r}: {_first_line(error)}") from error
    return device


def check_backend(device: torch.device) -> None:
    """Raise ``CommandError`` if the backend in force cannot work on this device."""
    try:
        FF.linear(torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device))
    except RuntimeError as error:
        raise CommandError(_first_line(error)) from error


def run_interpreted(args: argparse.Namespace, backend: str, device: torch.device) -> int | None:
    """Run the same command in a process of its own, whose Triton kernels are interpreted, if they must be.

    Whether they are is decided when they are imported. Returns the exit status, or None if this process will do.
    """
    if backend != "triton" or device.type != "cpu" or dispatch._INTERPRETER:
        return None
    if not dispatch.triton_installed:
        raise CommandError(
            "backend 'triton' is selected but Triton is not installed: pip install 'torch-fastops[triton]'"
        )
    print("no GPU here: the same kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)", flush=True)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    with subprocess.Popen([sys.executable, "-m", "fastops", *args.words], env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            try:
                status = process.wait(timeout=5)  # a terminal interrupts both processes
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                status = process.wait()
    return status if status >= 0 else 128 - status  # as a shell has it: a signal ended it


def backend_lines(model: nn.Module, rows: int, device: torch.device) -> list[str]:
    """Say of each layer which backend takes a batch of ``rows`` rows, and why."""
    lines = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            inputs = torch.zeros(rows, layer.in_features, device=device)
            choice = fastops.explain("linear", inputs, layer.weight, layer.bias)
            size = f"{rows}x{layer.in_features} to {layer.out_features}"
            lines.append(f"{name} ({size}) runs on {choice.backend}: {choice.reason}")
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            sizes = (d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
            inputs = torch.zeros(rows, layer.in_channels, *sizes, device=device)
            options = (layer.stride, 0, layer.dilation, layer.groups)
            choice = fastops.explain(f"conv{len(options[0])}d", inputs, layer.weight, layer.bias, *options)
            size = f"{rows}x{layer.in_channels} to {layer.out_channels} channels"
            lines.append(f"{name} ({size}) runs on {choice.backend}: {choice.reason}")
    return lines


def make_folder(path: Path) -> None:
    """Create a folder for results if it is not there. ``CommandError`` unless files can be written to it."""
    with _reported(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_file(path: Path | None) -> None:
    """``CommandError`` unless `writing` to ``path`` is possible, which leaves what is there as it is."""
    if path is not None and path.is_dir():
        raise CommandError(f"cannot write to {path}: it is a folder")
    if path is not None and (path.is_file() or not path.exists()):
        with _reported(path):
            tempfile.TemporaryFile(dir=path.resolve().parent).close()


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """What `replacing` gives; ``CommandError`` if the file cannot be written."""
    with _reported(path), replacing(path) as file:
        yield file


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write to {path}: {error.strerror or error}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
