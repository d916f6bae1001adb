"""Compiles kernels for GPUs that are not here, and reads the machine code.

A compile that succeeds proves little: what counts is that no register spills to memory, that a matrix product uses the
matrix units, and that aligned accesses are 128 bits wide. Triton needs no driver for that. It must be imported without
`TRITON_INTERPRET`, so tests run this file as a script, in a process of its own: JSON requests in, JSON results out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"[A-Z]*MMA\b|v_mfma_\w+|v_wmma_\w+")
WIDE_ACCESS = re.compile(r"(LDG|STG|LDGSTS)\S*\.128|(global|buffer)_(load|store)_dwordx4")
ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\b|\b(global|buffer)_(load|store)_\w+")


class Machine(NamedTuple):
    """What the machine code of one kernel says."""

    spilled_registers: int
    shared_memory: int
    matrix_instructions: dict[str, int]
    accesses: int
    wide_accesses: int


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm"):
        return GPUTarget("cuda", int(architecture[2:]), 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def disassembled(cubin: bytes) -> tuple[list[str], int]:
    """The instructions of an NVIDIA kernel, and how many of them spill: loads and stores of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA_TOOLS / "nvdisasm", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    return instructions, sum(name.split(".")[0] in ("LDL", "STL") for name in instructions)


def inspect(assembly: dict[str, Any], shared_memory: int) -> Machine:
    if "cubin" in assembly:
        instructions, spilled = disassembled(assembly["cubin"])
    else:
        text = assembly["amdgcn"]
        instructions = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
        spilled = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    matrix = Counter(match[0] for name in instructions if (match := MATRIX_INSTRUCTION.match(name)))
    accesses = sum(ACCESS.search(name) is not None for name in instructions)
    wide = sum(WIDE_ACCESS.search(name) is not None for name in instructions)
    return Machine(spilled, shared_memory, dict(matrix), accesses, wide)


def compiled(
    kernel: Any,
    architecture: str,
    types: dict[str, str | list[str]],
    constants: dict[str, Any],
    unaligned: tuple[str, ...] = (),
    **options: int,
) -> Machine:
    """Compile ``kernel`` for ``architecture``.

    Args:
        types: Triton type of each argument that is no constant ("*bf16", "i32", "fp32"), a list of them for a tuple;
            "i32:1" for a number that is 1, which Triton makes a constant.
        constants: value of each constexpr argument, and 1 for strides that are 1.
        unaligned: arguments that are no multiple of 16; all others are, as Triton finds at a launch. Nothing is known
            of the numbers in a tuple.
        options: num_warps, num_stages.
    """
    signature, fixed, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        type_ = types.get(name, "constexpr")
        if type_ == "constexpr":
            value = constants[name]
            fixed[position,] = tuple(value) if isinstance(value, list) else value
        elif isinstance(type_, list):
            fixed |= {(position, index): 1 for index, part in enumerate(type_) if part == "i32:1"}
            type_ = tuple("constexpr" if part == "i32:1" else part for part in type_)
        elif name not in unaligned and not type_.startswith("fp"):
            attributes[position,] = [["tt.divisibility", 16]]
        signature[name] = type_
    result = triton.compile(ASTSource(kernel, signature, fixed, attributes), target(architecture), options)
    return inspect(result.asm, result.metadata.shared)


def main() -> None:
    from importlib import import_module

    for request in json.load(sys.stdin):
        module, name = request.pop("kernel").split(":")
        machine = compiled(getattr(import_module(module), name), **request)
        print(json.dumps(machine._asdict()), flush=True)


if __name__ == "__main__":
    main()
