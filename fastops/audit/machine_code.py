"""Compiles kernels for GPUs that are not here, and reads the machine code.

A compile that succeeds proves little: what counts is that no register spills to memory, that a matrix product uses the
matrix units, and that aligned accesses are 128 bits wide. Triton needs no driver for that. It must be imported without
`TRITON_INTERPRET`, and a compiler may crash: so all of it runs in worker processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from .targets import TARGETS, occupancy

Request: TypeAlias = dict[str, Any]

# Cycles that a scheduler takes for one instruction. One would be the least, but with two warps to choose from, each of
# which waits for its own results, it hardly ever is.
ISSUE_CYCLES = 2
PATIENCE = 300  # seconds that one kernel may take: some inputs keep ptxas busy for ever

MATRIX = re.compile(r"[A-Z]*MMA\b|v_(?:mfma|wmma)_\w+")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG)\b|(global|buffer|flat)_(load|store)_")
SHARED = re.compile(r"(LDS|STS|LDSM|STSM)\b|ds_(load|store|read|write)")
# A matrix instruction's shape: HMMA.16816, HGMMA.64x128x16, DMMA.884.
MMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4)}


class Machine(NamedTuple):
    """What the machine code of one kernel says."""

    registers: int  # per thread
    spilled_registers: int
    shared_memory: int  # bytes
    tensor_memory: int  # columns
    matrix_instructions: dict[str, int]
    accesses: dict[str, int]  # of global memory, by their width in bits
    occupancy: float
    loop: dict[str, int]  # instructions of the main loop: matrix, global, shared, other
    issue_bound: float | None  # share of the matrix units' rate that the loop leaves possible
    seconds: float  # of the compiler


class Failure(NamedTuple):
    """Why there is no machine code."""

    reason: str


def compiled(
    kernel: str,
    architecture: str,
    types: dict[str, str | list[str]],
    constants: dict[str, Any],
    unaligned: Sequence[str] = (),
    dump: str | None = None,
    **options: int,
) -> Machine:
    """Compile ``kernel``, "module:name", for ``architecture``.

    Args:
        types: Triton type of each argument that is no constant ("*bf16", "i32", "fp32"), a list of them for a tuple;
            "i32:1" for a number that is 1, which Triton makes a constant.
        constants: value of each constexpr argument, and 1 for strides that are 1.
        unaligned: arguments that are no multiple of 16; all others are, as Triton finds at a launch. Nothing is known
            of the numbers in a tuple.
        dump: file that the assembly is written to.
        options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.split(":")
    function = getattr(import_module(module), name)
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(function.arg_names):
        type_: Any = types.get(name, "constexpr")
        if type_ == "constexpr":
            value = constants[name]
            fixed[position,] = tuple(value) if isinstance(value, list) else value
        elif isinstance(type_, list):
            fixed |= {(position, index): 1 for index, part in enumerate(type_) if part == "i32:1"}
            type_ = tuple("constexpr" if part == "i32:1" else part for part in type_)
        elif name not in unaligned and not type_.startswith("fp"):
            attributes[position,] = [["tt.divisibility", 16]]
        signature[name] = type_
    backend, number = ("cuda", int(architecture[2:])) if architecture.startswith("sm") else ("hip", architecture)
    target = GPUTarget(backend, number, TARGETS[architecture].warp_size)
    start = time.perf_counter()
    result = triton.compile(ASTSource(function, signature, fixed, attributes), target, options)
    seconds = time.perf_counter() - start

    if "cubin" in result.asm:
        assembly, registers = _disassembled(result.asm["cubin"], Path(triton.__file__).parent)
    else:
        assembly = result.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
    if dump:
        Path(dump).write_text(assembly)
    warps, shared = result.metadata.num_warps, result.metadata.shared
    tensor_memory = getattr(result.metadata, "tmem_size", None) or 0
    code = _instructions(assembly)
    loop = _main_loop(code)
    tile = constants.get("BLOCK_M", 0), constants.get("BLOCK_N", 0)
    return Machine(
        registers=registers,
        spilled_registers=_spills(assembly, code),
        shared_memory=shared,
        tensor_memory=tensor_memory,
        matrix_instructions=dict(Counter(match[0] for _, text in code if (match := MATRIX.match(text)))),
        accesses=dict(Counter(str(_width(text)) for _, text in code if GLOBAL.match(text))),
        occupancy=occupancy(TARGETS[architecture], warps, registers, shared, tensor_memory),
        loop=dict(Counter(map(_kind, loop))),
        issue_bound=_issue_bound(loop, architecture, warps, tile),
        seconds=round(seconds, 2),
    )


def _disassembled(cubin: bytes, triton: Path) -> tuple[str, int]:
    """The assembly of an NVIDIA kernel, and its registers per thread."""
    tools = triton / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([str(tools / "nvdisasm"), "-c"], [str(tools / "cuobjdump"), "-res-usage"])
        text, usage = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return text, int(re.findall(r"REG:(\d+)", usage)[0])


def _instructions(assembly: str) -> list[tuple[str, str]]:
    """("", instruction) without its predicate, and (label, ""), in the order of the program."""
    line = re.compile(
        r"^(\.L\w+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*)|^\s+([a-z]\w+(?:\s[^;\n]*)?)", re.MULTILINE
    )
    return [(label, nvidia or amd) for label, nvidia, amd in line.findall(assembly)]


def _spills(assembly: str, code: list[tuple[str, str]]) -> int:
    """Spilled registers of AMD, loads and stores of local memory of NVIDIA."""
    counted = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    return sum(map(int, counted)) + sum(re.match(r"(LDL|STL)\b", text) is not None for _, text in code)


def _main_loop(code: list[tuple[str, str]]) -> list[str]:
    """The instructions of the innermost loop with the most matrix instructions; with accesses where there are none.

    All of the program if it has no such loop: a loop of few turns is unrolled.
    """
    program = [text for _, text in code if text]
    wanted = "matrix" if any(_kind(text) == "matrix" for text in program) else "global"
    labels = {label: place for place, (label, _) in enumerate(code) if label}
    loops: dict[tuple[int, int], list[str]] = {}
    for end, (_, text) in enumerate(code):
        branch = re.match(r"(?:BRA\b|s_c?branch).*?(\.L\w+)", text)
        start = labels.get(branch[1], end) if branch else end
        body = [text for _, text in code[start : end + 1] if text]
        if start < end and any(_kind(text) == wanted for text in body):
            loops[start, end] = body
    innermost = [
        body
        for (start, end), body in loops.items()
        if not any(start <= first and last <= end for first, last in loops if (first, last) != (start, end))
    ]
    return max(innermost, key=lambda body: sum(_kind(text) == wanted for text in body), default=program)


def _kind(instruction: str) -> str:
    if MATRIX.match(instruction):
        return "matrix"
    if GLOBAL.match(instruction):
        return "global"
    return "shared" if SHARED.match(instruction) else "other"


def _width(instruction: str) -> int:
    """Bits that one thread reads or writes."""
    name = instruction.split()[0]
    if name.startswith("UTMA"):
        return 128
    if nvidia := re.search(r"^[A-Z].*\.(?:[US]?)(8|16|64|128|256)\b", name):
        return int(nvidia[1])
    if words := re.search(r"_dwordx(\d)", name):
        return 32 * int(words[1])
    if bits := re.search(r"_[bui](\d+)", name):
        return int(bits[1])
    if "byte" in name:
        return 8
    return 16 if "short" in name else 32


def _issue_bound(loop: list[str], architecture: str, warps: int, tile: tuple[int, int]) -> float | None:
    """Cycles of the matrix units over the larger of them and the cycles that it takes to issue the loop.

    A multiprocessor of NVIDIA has four schedulers, each of which issues for its share of the warps.
    """
    rate = TARGETS[architecture].matrix_rate
    products = 0.0  # 16-bit multiply-adds of all warps, or what takes as long
    for text in loop:
        name = text.split()[0]
        if name.startswith("UTCHMMA"):  # its shape is in a descriptor; 32 bytes of the inner dimension
            products += tile[0] * tile[1] * 16
        elif match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # of four warps together
            products += int(match[1]) * int(match[2]) * int(match[3]) * warps / 4 * (2 if "TF32" in name else 1)
        elif (match := re.match(r"HMMA\.(\d+)", name)) and match[1] in MMA_SHAPES:
            m, n, k = MMA_SHAPES[match[1]]
            products += m * n * k * warps * (2 if "TF32" in name else 1)
    if not products or not rate:
        return None
    matrix, issue = products / rate, len(loop) * ISSUE_CYCLES * warps / 4
    return round(matrix / max(matrix, issue), 3)


# Workers --------------------------------------------------------------------------------------------------------------


def _serve(connection: Connection[Any, Any]) -> None:
    """The life of a worker process: a request in, a `Machine` or a `Failure` out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    os.environ.pop("TRITON_INTERPRET", None)
    while True:
        request = connection.recv()
        try:
            connection.send(compiled(**request))
        except Exception as error:
            connection.send(Failure(f"{type(error).__name__}: {error}"))


class _Worker:
    """A process that compiles, and another one after it died or did not answer."""

    def __init__(self) -> None:
        self.process: SpawnProcess | None = None

    def answer(self, request: Request) -> Machine | Failure:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        try:
            self.connection.send(request)
            if self.connection.poll(PATIENCE):
                answer: Machine | Failure = self.connection.recv()
                return answer
            reason = f"the compiler took more than {PATIENCE} seconds"
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"the compiler crashed with exit status {self.process.exitcode}"
        self.stop()
        return Failure(reason)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def machine_code(requests: Sequence[Request], jobs: int) -> Iterator[Machine | Failure]:
    """What each request, arguments of `compiled`, becomes; in their order. Equal ones are compiled once."""
    workers: SimpleQueue[_Worker] = SimpleQueue()
    own = [_Worker() for _ in range(jobs)]
    for worker in own:
        workers.put(worker)

    def answer(request: Request) -> Machine | Failure:
        worker = workers.get()
        try:
            return worker.answer(request)
        finally:
            workers.put(worker)

    pool = ThreadPoolExecutor(jobs)
    try:
        keys = [json.dumps(request, sort_keys=True) for request in requests]
        futures = {key: pool.submit(answer, request) for key, request in dict(zip(keys, requests, strict=True)).items()}
        for key in keys:
            yield futures[key].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in own:
            worker.stop()
