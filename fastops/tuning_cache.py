"""What `fastops.tune` measured: which way won each call, and which tile each matrix product, kept on disk for one
device and one set of versions.

A call is known by its op, whether gradients are recorded, dtype, shapes, strides and options. Nothing is read until
something was once tuned for this user, and then once for each device.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import re
import warnings
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .files import replacing
from .kernels import configs

Key = tuple[Any, ...]
Winners = dict[Key, str]
Ways = Mapping[Key, str | None]  # None: what the rule says
Tiles = dict[configs.Product, configs.Tile | None]  # None: what the table says

WAYS = ("triton", "onednn", "torch")


def folder() -> Path:
    """``$FASTOPS_CACHE_DIR``, or ``fastops`` in the user's cache folder; ``RuntimeError`` if there is no home."""
    if own := os.environ.get("FASTOPS_CACHE_DIR"):
        return Path(own)
    try:
        from platformdirs import user_cache_path
    except ImportError:  # its rule on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastops"
    return user_cache_path("fastops", appauthor=False)


def anything() -> bool:
    """Whether this user ever tuned, for any device."""
    try:
        return any(folder().glob("*.json"))
    except (OSError, RuntimeError):  # there is no home
        return False


def key(op: str, arguments: tuple[Any, ...]) -> Key | None:
    """What decides how long a call takes, as far as a decision may look; None if its options are not plain numbers."""
    first = arguments[0]
    recorded, layouts, options = False, [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            recorded = recorded or argument.requires_grad
            layouts.append(tuple(argument.shape) + argument.stride())
        else:
            layouts.append(())
            options.append(argument)
    setting: Any = torch.backends.cudnn.conv if op.startswith("conv") else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    precision = setting.fp32_precision if first.is_cuda and first.dtype is torch.float32 else ""
    try:
        plain = tuple(map(_plain, options))
    except TypeError:
        return None
    return op, recorded and torch.is_grad_enabled(), str(first.dtype), precision, tuple(layouts), plain


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, float, NoneType)):
        return value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else operator.index(value)


def tuples(value: Any) -> Any:
    """A key as JSON gives it back, as it was."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
    for package in ("torch-fastops", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def processor() -> str:
    """The name of the CPU."""
    return str(torch.cpu.get_capabilities()["cpu_name"]) if hasattr(torch.cpu, "get_capabilities") else "CPU"


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def path(device: torch.device) -> Path:
    """The file for this device and these versions."""
    name = _device(device)
    digest = sha256(json.dumps([name, _versions()]).encode()).hexdigest()[:8]
    return folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{digest}.json"


def of(device: torch.device) -> Winners:
    """The ways that won on this device, read at the first call with the tiles; `add` changes what everybody has."""
    return _of(device, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _of(device: torch.device, threads: int) -> Winners:
    try:
        ways, tiles = _read(path(device), device)
    except RuntimeError:  # there is no home
        return {}
    configs.set_tiles(tiles)
    return ways


def candidates(device: torch.device, dtype: torch.dtype, precision: str) -> tuple[configs.Tile, ...]:
    """The tiles of the tables that a product can have."""
    words = configs.architecture(device), dtype, precision
    return *configs.matmul_candidates(*words), *configs.persistent_candidates(*words)


def _read(file: Path, device: torch.device) -> tuple[Winners, Tiles]:
    try:
        saved = json.loads(file.read_text())
        ways = {tuples(entry["call"]): WAYS[WAYS.index(entry["way"])] for entry in saved["winners"]}
        tiles: Tiles = {}
        for entry in saved["tiles"]:
            name, precision, M, N = entry["product"]
            dtype = getattr(torch, name)
            for tile in candidates(device, dtype, precision):
                if list(tile) == entry["tile"]:
                    tiles[device, dtype, precision, M, N] = tile
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{file} is damaged and counts for nothing until fastops.tune mends it: {error!r}", stacklevel=2)
        return {}, {}
    return ways, tiles


def add(device: torch.device, ways: Ways, tiles: Tiles) -> Path | None:
    """Remember winners from now on, beside what other processes have written meanwhile.

    Returns:
        The file; None, after a warning, where it cannot be written: then they count in this process alone.
    """
    known = of(device)
    for call, way in ways.items():
        known.pop(call, None)
        if way is not None:
            known[call] = way
    configs.set_tiles(tiles)
    try:
        from filelock import FileLock

        file = path(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            all_ways, all_tiles = _read(file, device)
            saved = {
                "device": _device(device),
                "versions": _versions(),
                "winners": [
                    {"call": call, "way": way} for call, way in {**all_ways, **ways}.items() if way is not None
                ],
                "tiles": [
                    {"product": [str(dtype).removeprefix("torch."), *rest], "tile": tile}
                    for (_, dtype, *rest), tile in (all_tiles | tiles).items()
                    if tile is not None
                ],
            }
            with replacing(file) as new:
                new.write(json.dumps(saved, indent=1).encode())
    except (ImportError, OSError, RuntimeError) as error:  # no filelock, no such folder can be, or there is no home
        warnings.warn(f"what was measured counts in this process alone: {error}", stacklevel=3)
        return None
    return file
