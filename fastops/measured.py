"""Which way won on a kind of GPU: the tables in kernels/measured, which ``fastops qualify`` writes and which ship.

A table knows classes of shapes, not single ones: sizes up to 8 as they are and larger ones to the nearest power of two,
and the order of the dimensions in memory. What `fastops.tune` measured on this very GPU goes before it; bare
products, calls that save too little (`Op.saved_bytes`) and those that it has no entry for go by the rule.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from .tuning_cache import Key, tuples

FOLDER: Final = Path(__file__).with_name("kernels") / "measured"
WAYS: Final = ("triton", "vendor", "torch")  # as in `fastops.ops.op.Explanation.way`
EXACT: Final = 8  # up to here a size is its own class


def anything() -> bool:
    """Whether there is a table of any GPU."""
    return any(FOLDER.glob("*.json"))


def file_name(gpu: str) -> str:
    """Of the table of a GPU that goes by this name."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


def name_of(device: torch.device) -> str:
    """The name of a GPU, which all of its kind have."""
    return str(torch.get_device_module(device).get_device_name(device))


def shape_class(key: Key) -> Key:
    """The class of a call that `fastops.tuning_cache.key` describes."""
    op, gradients, dtype, precision, layouts, options = key
    return op, gradients, dtype, precision, tuple(map(_layout, layouts)), options


def _layout(layout: Sequence[int]) -> tuple[Any, ...]:
    sizes, strides = layout[: len(layout) // 2], layout[len(layout) // 2 :]
    order = tuple(sorted(range(len(strides)), key=lambda dimension: -strides[dimension]))
    return tuple(map(_rounded, sizes)), order


def _rounded(size: int) -> int:
    return size if size <= EXACT else 2 ** round(math.log2(size))


@functools.cache
def of(device: torch.device) -> Mapping[Key, str]:
    """The way of each class in the table of this kind of GPU; nothing where there is none."""
    file = FOLDER / file_name(name_of(device))
    try:
        return {
            tuples(entry["class"]): WAYS[WAYS.index(entry["way"])] for entry in json.loads(file.read_bytes())["won"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        warnings.warn(f"{file} is damaged and counts for nothing: {error!r}", stacklevel=2)
        return {}


def table(gpu: str, facts: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a table, of entries that have a ``class``, its ``way`` and the ``seconds`` of each way.

    Of a class of which entries disagree there is none.
    """
    kept: dict[Key, Mapping[str, Any] | None] = {}
    for entry in entries:
        name = tuples(entry["class"])
        same = name not in kept or (kept[name] or {}).get("way") == entry["way"]
        kept[name] = entry if same else None
    return {"gpu": gpu, **facts, "won": [entry for entry in kept.values() if entry is not None]}
