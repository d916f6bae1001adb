"""The GPUs that kernels are compiled for, with the limits that the compiler does not know."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """One architecture. A multiprocessor is a compute unit of AMD; a warp is a wavefront."""

    warp_size: int
    shared_memory: int  # bytes that one program may have
    shared_memory_total: int  # bytes of a multiprocessor
    shared_memory_reserved: int  # bytes of it that each program costs on top of its own
    registers: int  # of 32 bits per thread slot: all registers of a multiprocessor over its warp size
    register_granule: int  # registers per thread are handed out in multiples of this
    warps: int  # that a multiprocessor holds
    programs: int  # that a multiprocessor holds
    matrix_rate: int  # 16-bit multiply-adds per cycle and multiprocessor, accumulated in float32; 0: not modelled
    matrix_units: bool = True  # whether kernels must use them
    bfloat16: bool = True


TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor of sm100
K = 1 << 10
TARGETS = {
    "sm75": Target(32, 64 * K, 64 * K, 0, 2048, 8, 32, 16, 512, matrix_units=False, bfloat16=False),
    "sm80": Target(32, 163 * K, 164 * K, K, 2048, 8, 64, 32, 1024),
    "sm86": Target(32, 99 * K, 100 * K, K, 2048, 8, 48, 16, 512),
    "sm89": Target(32, 99 * K, 100 * K, K, 2048, 8, 48, 24, 512),
    "sm90": Target(32, 227 * K, 228 * K, K, 2048, 8, 64, 32, 2048),
    "sm100": Target(32, 227 * K, 228 * K, K, 2048, 8, 64, 32, 4096),
    "sm120": Target(32, 99 * K, 100 * K, K, 2048, 8, 48, 24, 512),
    "gfx90a": Target(64, 64 * K, 64 * K, 0, 2048, 8, 32, 32, 0),
    "gfx942": Target(64, 64 * K, 64 * K, 0, 2048, 8, 32, 32, 0),
    "gfx950": Target(64, 160 * K, 160 * K, 0, 2048, 8, 32, 32, 0),
    "gfx1100": Target(32, 64 * K, 64 * K, 0, 3072, 24, 32, 32, 0),
}


def occupancy(target: Target, num_warps: int, registers: int, shared_memory: int, tensor_memory: int) -> float:
    """Share of the warps of a multiprocessor that programs with these needs can fill."""
    per_warp = -(-max(registers, 1) // target.register_granule) * target.register_granule
    shared = shared_memory + target.shared_memory_reserved
    programs = min(
        target.registers // per_warp // num_warps,
        target.warps // num_warps,
        target.programs,
        target.shared_memory_total // shared if shared else target.programs,
        TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else target.programs,
    )
    return programs * num_warps / target.warps
