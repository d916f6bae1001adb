"""The one table of tile configurations: (architecture, dtype, shape) to tile, warps and pipeline stages.

A table, not `triton.autotune`: the same call gives the same bits in every run and on every rank, and nothing is timed
inside a training step. Entries were compiled offline for their architecture and show no register spills.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class MatmulConfig(NamedTuple):
    """Tile ``BLOCK_M`` x ``BLOCK_N`` of the result, ``BLOCK_K`` of the inner dimension per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Largest tile first: the first one that still gives every multiprocessor a program is taken, else the last.
_HALF_PRECISION: dict[str, tuple[MatmulConfig, ...]] = {
    "sm75": (MatmulConfig(32, 64, 32, 4, 2),),
    "sm80": (
        MatmulConfig(128, 256, 32, 8, 3),
        MatmulConfig(128, 128, 64, 8, 3),
        MatmulConfig(64, 128, 64, 4, 4),
        MatmulConfig(64, 64, 64, 4, 4),
    ),
    "sm86": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(128, 128, 32, 4, 4), MatmulConfig(64, 64, 64, 4, 3)),
    "sm90": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(64, 128, 64, 4, 4), MatmulConfig(64, 64, 128, 4, 4)),
    "sm100": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(64, 128, 64, 4, 3)),
    "sm120": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(64, 128, 64, 4, 3), MatmulConfig(64, 64, 64, 4, 3)),
    "gfx942": (MatmulConfig(128, 128, 64, 8, 2), MatmulConfig(64, 64, 64, 4, 2)),
    "gfx90a": (MatmulConfig(128, 128, 64, 8, 2), MatmulConfig(64, 128, 32, 4, 2)),
    "gfx950": (MatmulConfig(128, 128, 64, 8, 2), MatmulConfig(64, 128, 32, 4, 2)),
    "gfx1100": (MatmulConfig(128, 128, 32, 8, 2), MatmulConfig(64, 128, 32, 4, 2)),
}
_TF32 = (MatmulConfig(128, 128, 32, 8, 3), MatmulConfig(64, 64, 32, 4, 3))
_FLOAT32 = (MatmulConfig(64, 64, 16, 4, 3),)
_FLOAT64 = (MatmulConfig(32, 32, 16, 4, 2),)
# The interpreter pays per operation first, then per element: few large tiles, or one small one.
_INTERPRETED = (MatmulConfig(128, 128, 128, 1, 1), MatmulConfig(16, 16, 64, 1, 1))


def architecture(device: torch.device) -> str:
    """Key of this device in the tables; a device that is not listed gets the nearest older entry of its vendor."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in _HALF_PRECISION else "gfx90a"
    if device.type != "cuda":
        return "sm80"
    major, minor = torch.cuda.get_device_capability(device)
    capability = major * 10 + minor
    listed = [int(name[2:]) for name in _HALF_PRECISION if name.startswith("sm")]
    return f"sm{max((known for known in listed if known <= capability), default=75)}"


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 32))


def matmul_candidates(architecture_name: str, dtype: torch.dtype, precision: str) -> tuple[MatmulConfig, ...]:
    """All entries for one architecture and dtype, largest tile first."""
    if architecture_name == "interpreter":
        return _INTERPRETED
    if dtype is torch.float64:
        return _FLOAT64
    if dtype is torch.float32:
        return _TF32 if precision == "tf32" else _FLOAT32
    return _HALF_PRECISION[architecture_name]


def matmul_config(
    device: torch.device, dtype: torch.dtype, precision: str, M: int, N: int, aligned: bool
) -> MatmulConfig:
    """The largest tile that gives every multiprocessor of ``device`` a tile of an ``M`` x ``N`` result.

    Operands that are not ``aligned`` are loaded element by element, each with an address of its own: registers spill
    but for the smallest tile shared by more warps.
    The interpreter runs programs one by one: it gets the smallest tile if that holds the result, else the largest.
    """
    candidates = matmul_candidates(architecture(device), dtype, precision)
    if device.type == "cpu":
        return candidates[-1] if max(M, N) <= candidates[-1].BLOCK_M else candidates[0]
    if not aligned:
        return candidates[-1]._replace(num_warps=8)
    wanted = multiprocessors(device)
    for config in candidates:
        if -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N) >= wanted:
            return config
    return candidates[-1]
