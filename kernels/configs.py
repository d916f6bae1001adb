"""The one table of tile configurations: (architecture, dtype, shape) to tile, warps and pipeline stages.

A table, not `triton.autotune`: the same call gives the same bits in every run and on every rank, and nothing is timed
inside a training step. Entries were compiled offline for their architecture and show no register spills.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch


class MatmulConfig(NamedTuple):
    """Tile ``BLOCK_M`` x ``BLOCK_N`` of the result, ``BLOCK_K`` of the inner dimension per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class PersistentConfig(NamedTuple):
    """Tile of a persistent kernel: each program computes many tiles, with tensor descriptors for loads and stores.

    ``HALVES``: the left and the right half of a result tile are stored one after the other, which takes half the shared
    memory. ``WARP_SPECIALIZE``: some warps load and multiply while ``num_warps`` others store the previous tile.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    HALVES: bool
    WARP_SPECIALIZE: bool


# Each row has its largest tile first. The first one is taken of which a result has enough (`_fills`), else the last.
_HALF_PRECISION: dict[str, tuple[MatmulConfig, ...]] = {
    "sm75": (MatmulConfig(32, 64, 32, 4, 2),),
    "sm80": (
        MatmulConfig(128, 256, 32, 8, 3),
        MatmulConfig(128, 128, 64, 8, 3),
        MatmulConfig(64, 128, 64, 4, 4),
        MatmulConfig(64, 64, 64, 4, 4),
    ),
    "sm86": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(64, 128, 64, 4, 3), MatmulConfig(64, 64, 64, 4, 3)),
    "sm90": (
        MatmulConfig(128, 256, 64, 8, 3),
        MatmulConfig(128, 128, 64, 8, 3),
        MatmulConfig(64, 128, 64, 4, 4),
        MatmulConfig(64, 64, 128, 4, 4),
    ),
    "sm100": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(64, 128, 64, 4, 3)),
    "sm120": (MatmulConfig(128, 128, 64, 8, 3), MatmulConfig(64, 128, 64, 4, 3), MatmulConfig(64, 64, 64, 4, 3)),
    "gfx942": (MatmulConfig(128, 128, 64, 8, 2), MatmulConfig(64, 64, 64, 4, 2)),
    "gfx90a": (MatmulConfig(128, 128, 64, 8, 2), MatmulConfig(64, 128, 32, 4, 2)),
    "gfx950": (MatmulConfig(128, 128, 64, 8, 2), MatmulConfig(64, 128, 32, 4, 2)),
    "gfx1100": (MatmulConfig(128, 128, 32, 8, 2), MatmulConfig(64, 128, 32, 4, 2)),
}
_FLOAT32 = (MatmulConfig(64, 64, 16, 4, 3),)
# float32 where torch's setting is "tf32": Triton's name of the reduced precision, and the tiles. "bf16x3" writes each
# operand as a sum of two bfloat16 numbers and multiplies three times; it is more exact than tf32. Architectures that
# are not listed compute in float32: they have no tf32, and bfloat16 is missing (sm75), no faster (gfx1100), or flushes
# subnormal numbers to zero (gfx90a).
_TF32 = "tf32", (MatmulConfig(128, 128, 32, 8, 3), MatmulConfig(64, 64, 32, 4, 3))
_AMD_REDUCED = (MatmulConfig(128, 128, 32, 8, 2), MatmulConfig(64, 64, 32, 4, 2))
_REDUCED_FLOAT32: dict[str, tuple[str, tuple[MatmulConfig, ...]]] = {
    "sm80": _TF32,
    "sm86": _TF32,
    "sm90": _TF32,
    "sm100": _TF32,
    "sm120": _TF32,
    "gfx942": ("tf32", _AMD_REDUCED),
    "gfx950": ("bf16x3", _AMD_REDUCED),
}
_FLOAT64 = (MatmulConfig(32, 32, 16, 4, 2),)
_RDNA = {torch.float32: (MatmulConfig(64, 64, 16, 8, 3),), torch.float64: (MatmulConfig(32, 32, 16, 4, 1),)}
# Tiles of the persistent kernel, for GPUs with tensor descriptors: of 16-bit operands, and of float32 rounded to tf32.
_PERSISTENT: dict[str, tuple[PersistentConfig, ...]] = {
    "sm90": (PersistentConfig(128, 256, 64, 8, 3, True, False), PersistentConfig(128, 128, 64, 8, 5, False, False)),
    "sm100": (PersistentConfig(128, 256, 64, 8, 3, True, True), PersistentConfig(128, 128, 64, 8, 3, False, True)),
    "sm120": (PersistentConfig(128, 128, 64, 8, 2, True, True),),
}
_PERSISTENT_TF32: dict[str, tuple[PersistentConfig, ...]] = {
    "sm90": (PersistentConfig(128, 128, 32, 8, 3, False, False),),
    "sm100": (PersistentConfig(128, 128, 32, 8, 3, False, True),),
    "sm120": (PersistentConfig(128, 128, 32, 8, 2, True, True),),
}
# The interpreter pays per operation first, then per element: few large tiles, or one small one.
_INTERPRETED = (MatmulConfig(128, 128, 128, 1, 1), MatmulConfig(16, 16, 64, 1, 1))
_INTERPRETED_POSITIONS = 1024  # of a convolution, at a time


def architecture(device: torch.device) -> str:
    """Key of this device in the tables."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return listed(name)
    if device.type != "cuda":
        return "sm80"
    major, minor = torch.cuda.get_device_capability(device)
    return listed(f"sm{major * 10 + minor}")


def listed(name: str) -> str:
    """The nearest entry of the tables that is no newer than GPU ``name`` and of its line, or the oldest of that line.

    AMD has two lines, CDNA (gfx9..) and RDNA (gfx1...), with other matrix instructions and warps of another size.
    """

    def line_and_age(key: str) -> tuple[str, int, int]:
        if key.startswith("sm"):
            return "sm", 0, int(key[2:])
        return "gfx", len(key), int(key[3:], 16)

    *line, age = line_and_age(name)
    older = {own: key for key in _HALF_PRECISION for *its, own in [line_and_age(key)] if its == line}
    return older[max((own for own in older if own <= age), default=min(older))]


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; one of the interpreter."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 32))


def reduced_precision(architecture_name: str) -> str:
    """Triton's name of how a matrix product may round float32 operands where torch's setting is "tf32"."""
    return _REDUCED_FLOAT32[architecture_name][0] if architecture_name in _REDUCED_FLOAT32 else "ieee"


def matmul_candidates(architecture_name: str, dtype: torch.dtype, precision: str) -> tuple[MatmulConfig, ...]:
    """All entries for one architecture and dtype, largest tile first."""
    if architecture_name == "interpreter":
        return _INTERPRETED
    if architecture_name == "gfx1100" and dtype in _RDNA:
        return _RDNA[dtype]
    if dtype is torch.float64:
        return _FLOAT64
    if dtype is torch.float32:
        return _FLOAT32 if precision == "ieee" else _REDUCED_FLOAT32[architecture_name][1]
    return _HALF_PRECISION[architecture_name]


def persistent_candidates(architecture_name: str, dtype: torch.dtype, precision: str) -> tuple[PersistentConfig, ...]:
    """All entries for one architecture and dtype, largest tile first; none where the pointer kernels do all."""
    if dtype.itemsize == 2:
        return _PERSISTENT.get(architecture_name, ())
    return _PERSISTENT_TF32.get(architecture_name, ()) if precision == "tf32" else ()


Tile: TypeAlias = MatmulConfig | PersistentConfig
Kind: TypeAlias = tuple[torch.device, torch.dtype, str]  # of a product's operands; how float32 may be rounded
Product = tuple[torch.device, torch.dtype, str, int, int]  # device, dtype, precision, M, N of a product, rows aligned
measured: dict[Product, Tile] = {}  # tiles that `fastops.tune` measured to be faster than the table's
met: set[Product] | None = None  # while `fastops.tune` collects products: those that asked for a tile; else None
plans: dict[Any, Any] = {}  # the results of `planned` functions; replaced by an empty one when `measured` changes
_PLANS_AT_MOST = 1 << 14  # then all are dropped, so that ever new shapes do not fill the memory
_UNKNOWN = object()
P = ParamSpec("P")
T = TypeVar("T")


def planned(choose: Callable[P, T]) -> Callable[P, T]:
    """Cache the results of ``choose``, whose arguments are hashable: to choose takes longer than to launch.

    Equal arguments get the same plan, so ``choose`` must not tell 1, 1.0 and True apart.
    """

    @functools.wraps(choose)
    def kept(*arguments: P.args, **options: P.kwargs) -> T:
        key = (choose, arguments, *options.items()) if options else (choose, arguments)
        kept_now = plans  # if another thread replaces `plans` meanwhile, an outdated plan goes into the old dictionary
        if met is None and (known := kept_now.get(key, _UNKNOWN)) is not _UNKNOWN:
            return known
        chosen = choose(*arguments, **options)
        if len(kept_now) >= _PLANS_AT_MOST:
            kept_now.clear()
        kept_now[key] = chosen
        return chosen

    return kept


def forget_plans() -> None:
    """Drop all plans: the next calls choose anew."""
    global plans
    plans = {}


def set_tiles(tiles: Mapping[Product, Tile | None]) -> None:
    """Use these tiles from now on; None: the table's."""
    for product, tile in tiles.items():
        if tile is None:
            measured.pop(product, None)
        else:
            measured[product] = tile
    forget_plans()


def _measured(*product: Any) -> Tile | None:
    wanted = met  # read once: another thread may set it to None at any time
    if wanted is not None:
        wanted.add(product)
    return measured.get(product)


def matmul_config(
    device: torch.device, dtype: torch.dtype, precision: str, M: int, N: int, access: int
) -> MatmulConfig:
    """The largest tile of which an ``M`` x ``N`` result has one for nearly every multiprocessor of ``device``.

    Operands are loaded ``access`` bytes at a time. Below 16 more addresses take registers: tiles of more than 128 x 128
    would spill, and where each element has its own address, so would others than the largest that is left, in short
    steps. The interpreter runs programs one after the other: it gets the smallest tile if that holds the result, else
    the largest.
    """
    candidates = matmul_candidates(architecture(device), dtype, precision)
    if access == 16 and isinstance(tile := _measured(device, dtype, precision, M, N), MatmulConfig):
        return tile
    if device.type == "cpu":
        return candidates[-1] if max(M, N) <= candidates[-1].BLOCK_M else candidates[0]
    if access < 16:
        candidates = tuple(tile for tile in candidates if tile.BLOCK_M * tile.BLOCK_N <= 128 * 128)
    if access == dtype.itemsize:
        return candidates[0]._replace(BLOCK_K=min(candidates[0].BLOCK_K, 32), num_warps=8)
    return next((tile for tile in candidates if _fills(device, tile, M, N)), candidates[-1])


def _fills(device: torch.device, tile: Tile, M: int, N: int) -> bool:
    """Whether an ``M`` x ``N`` result has tiles for seven of eight multiprocessors: more, but smaller ones take longer.

    On an H100, which has 132, 128 tiles of 128 x 256 took 0.86 of the time of 256 of 128 x 128.
    """
    return -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N) >= multiprocessors(device) * 7 // 8


def narrow_config(device: torch.device, dtype: torch.dtype, precision: str) -> MatmulConfig:
    """The tile where something beside the product takes registers, and operands are not loaded 16 bytes at a time."""
    smallest = matmul_candidates(architecture(device), dtype, precision)[-1]
    return smallest._replace(BLOCK_K=min(smallest.BLOCK_K, 32), num_warps=8)


def persistent_config(
    device: torch.device, dtype: torch.dtype, precision: str, M: int, N: int
) -> PersistentConfig | None:
    """The largest tile of which an ``M`` x ``N`` result has one for nearly every multiprocessor, if there is one."""
    if (tile := _measured(device, dtype, precision, M, N)) is not None:
        return tile if isinstance(tile, PersistentConfig) else None
    candidates = persistent_candidates(architecture(device), dtype, precision)
    return next((tile for tile in candidates if _fills(device, tile, M, N)), None)


class ConvConfig(NamedTuple):
    """Tile of a convolution. ``FLAT``: the channels are no multiple of the block, so one block spans several taps."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    FLAT: bool


_AnyTile = TypeVar("_AnyTile", Tile, ConvConfig)


def narrowed(config: _AnyTile, device: torch.device) -> _AnyTile:
    """The tile, with fewer columns if so many results in each thread and what an activation takes would spill."""
    target = architecture(device)
    threads = config.num_warps * (64 if target.startswith("gfx9") else 32)
    most = threads * (64 if target.startswith(("sm80", "sm90", "gfx9")) else 32)
    while device.type != "cpu" and config.BLOCK_M * config.BLOCK_N > most:
        config = config._replace(BLOCK_N=config.BLOCK_N // 2)
    return config


def _power_of_2_within(size: int, limit: int) -> int:
    """The largest power of 2 that is at most ``size`` and ``limit``, but no less than the 16 that a dot needs."""
    return max(16, min(limit, 1 << (size.bit_length() - 1)))


def _channel_block(channels: int, block: int) -> tuple[int, bool]:
    """``(block, FLAT)``: the greatest common divisor of both and False; if that is below 32, the block and True."""
    divisor = math.gcd(channels, block)
    return (divisor, False) if divisor >= min(32, block) else (block, True)


def conv_config(kind: Kind, positions: int, columns: int, products: int, channels: int, aligned: bool) -> ConvConfig:
    """Tile of ``products`` products [positions, taps x channels] x [taps x channels, columns].

    The tile of `matmul_config`, no wider than the ``columns`` and with steps that divide the ``channels``.
    """
    on_cpu = kind[0].type == "cpu"
    tile = matmul_config(*kind, positions, columns * products, 16) if aligned or on_cpu else narrow_config(*kind)
    if on_cpu:
        tile = tile._replace(BLOCK_M=_power_of_2_within(2 * positions - 1, _INTERPRETED_POSITIONS))
    block_k, flat = _channel_block(channels, tile.BLOCK_K)
    block_n = _power_of_2_within(columns, tile.BLOCK_N)
    # Addresses of single elements take registers, of AMD's scalar ones too: as many warps as the tile has share them.
    warps = _warps(tile, tile.BLOCK_M * block_n) if aligned or on_cpu else tile.num_warps
    return ConvConfig(tile.BLOCK_M, block_n, block_k, warps, tile.num_stages, flat)


def conv_grad_weight_config(
    kind: Kind, positions: int, rows: int, channels: int, taps: int, aligned: bool
) -> ConvConfig:
    """Tile of a product [rows, positions] x [positions, taps x channels], whose sum over positions is split.

    The split keeps all multiprocessors busy, so the largest tile is taken.
    """
    device, dtype, precision = kind
    candidates = matmul_candidates(architecture(device), dtype, precision)
    tile = candidates[0] if aligned else candidates[-1]._replace(num_warps=8)
    # The second operand is gathered, and each address takes a dozen instructions: it gets the shorter side of the tile.
    tile = tile._replace(BLOCK_M=max(tile[:2]), BLOCK_N=min(tile[:2]))
    if device.type == "cpu":
        tile = candidates[0]._replace(BLOCK_K=_power_of_2_within(2 * positions - 1, _INTERPRETED_POSITIONS))
    block_m = _power_of_2_within(rows, tile.BLOCK_M)
    block_n, flat = _channel_block(channels, tile.BLOCK_N)
    if flat:
        block_n = _power_of_2_within(taps * channels, tile.BLOCK_N)
    return ConvConfig(block_m, block_n, tile.BLOCK_K, _warps(tile, block_m * block_n), tile.num_stages, flat)


def _warps(tile: MatmulConfig, elements: int) -> int:
    """How many warps: at most four where these hold the tile's accumulators in registers, 128 x 64 of them."""
    return tile.num_warps if elements > 128 * 64 else min(4, tile.num_warps)


def register_limit(device: torch.device, everywhere: bool = False) -> dict[str, int]:
    """Compiler options for GPUs where ptxas spills before it has used all of a thread's 255 registers.

    It does so ``everywhere`` on NVIDIA's in a product with an epilogue that takes many, or without matrix instructions.
    """
    spilling = ("sm",) if everywhere else ("sm75", "sm100", "sm120")
    return {"maxnreg": 255} if architecture(device).startswith(spilling) else {}


def inner_splits(device: torch.device, tiles: int, steps: int, partial: int, operands: int) -> int:
    """Into how many parts to split the sum over a product's inner dimension: two programs for every multiprocessor.

    Fewer if a part would have less than four ``steps``, or if writing and reading the partial results, of ``partial``
    bytes each, would move more bytes than the ``operands`` have. The interpreter counts as one multiprocessor.
    """
    wanted = 2 * (1 if device.type == "cpu" else multiprocessors(device)) // tiles
    return max(1, min(wanted, steps // 4, operands // (2 * partial)))


def class_splits(device: torch.device, row_tiles: int, class_tiles: int) -> int:
    """How many programs share the classes of a block of rows: two for every multiprocessor in all, or fewer."""
    if device.type == "cpu":  # the interpreter gains nothing: two, so that tests merge results
        return min(2, class_tiles)
    return max(1, min(2 * multiprocessors(device) // row_tiles, class_tiles))
