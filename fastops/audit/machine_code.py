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
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import groupby, islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from elftools.elf.elffile import ELFFile

from .targets import TARGETS, occupancy

Request: TypeAlias = dict[str, Any]

# Cycles that a scheduler takes for one instruction. One would be the least, but with two warps to choose from, each of
# which waits for its own results, it hardly ever is.
ISSUE_CYCLES = 2
PATIENCE = 300  # seconds that one kernel may take: some inputs keep ptxas busy for ever
BATCH = 32  # kernels at a time for a disassembler that takes 0.3 seconds to start, and 0.01 for each

MATRIX = re.compile(r"[A-Z]*MMA\b|v_(?:mfma|wmma)_\w+")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG)\b|(global|buffer|flat)_(load|store)_")
SHARED = re.compile(r"(LDS|STS|LDSM|STSM)\b|ds_(load|store|read|write)")
INSTRUCTION = 16  # bytes of each one of NVIDIA
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


class Compiled(NamedTuple):
    """What the compiler made of one request."""

    code: bytes | str  # machine code of NVIDIA, assembly of AMD
    registers: int
    num_warps: int
    shared_memory: int
    tensor_memory: int
    seconds: float


def gpu_target(architecture: str) -> Any:
    """Triton's description of a GPU."""
    from triton.backends.compiler import GPUTarget

    backend, number = ("cuda", int(architecture[2:])) if architecture.startswith("sm") else ("hip", architecture)
    return GPUTarget(backend, number, TARGETS[architecture].warp_size)


def source(
    kernel: str, architecture: str, types: dict[str, str], constants: dict[str, Any], attributes: dict[str, str]
) -> Any:
    """What Triton compiles for ``kernel``, "module:name", on ``architecture``.

    Args:
        types: Triton's type of each argument that is no constant: "*bf16", "i32", "fp32".
        constants: value of each constexpr, and of each number that Triton makes one: 1 for strides that are 1.
        attributes: Triton's letters for what else it knows of an argument: "D" if it is divisible by 16, "S" if 32-bit
            offsets reach all of a tensor.
    """
    from triton.compiler import ASTSource, make_backend

    module, name = kernel.split(":")
    function = getattr(import_module(module), name)
    places = {name: (position,) for position, name in enumerate(function.arg_names)}
    parse = make_backend(gpu_target(architecture)).parse_attr
    return ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in places},
        {places[name]: tuple(value) if isinstance(value, list) else value for name, value in constants.items()},
        {places[name]: parse(letters) for name, letters in attributes.items()},
    )


def compiled(architecture: str, **request: Any) -> Compiled:
    """Compile the `source` of a request for ``architecture``; what `source` does not take are compiler options."""
    import triton

    words = {name: request.pop(name) for name in ("kernel", "types", "constants", "attributes")}
    program = source(architecture=architecture, **words)
    start = time.perf_counter()
    result = triton.compile(program, gpu_target(architecture), request)
    seconds = time.perf_counter() - start

    code: bytes | str
    if "cubin" in result.asm:
        code, registers = _code_and_registers(result.asm["cubin"])
    else:
        assembly: str = result.asm["amdgcn"]
        code, registers = assembly, int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
    metadata = result.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    return Compiled(code, registers, metadata.num_warps, metadata.shared, tensor_memory, round(seconds, 2))


def _code_and_registers(cubin: bytes) -> tuple[bytes, int]:
    """The instructions in an ELF file of NVIDIA, and how many registers a thread takes."""
    sections = {section.name: section.data() for section in ELFFile(BytesIO(cubin)).iter_sections()}
    code = b"".join(data for name, data in sections.items() if name.startswith(".text."))
    # EIATTR_REGCOUNT: size, function, registers
    registers = re.findall(rb"\x04\x2f\x08\0.{4}(.{4})", sections[".nv.info"], re.DOTALL)
    return code, max(int.from_bytes(number, "little") for number in registers)


def _disassembled(codes: Sequence[bytes], architecture: str) -> list[str]:
    """The assembly of each of some kernels of NVIDIA, which stand one behind the other: that is where addresses start.

    A disassembler for each kernel would take as long as the compiler.
    """
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    nvdisasm = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    name = architecture.upper() + ("a" if int(architecture[2:]) >= 90 else "")
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        text = subprocess.run([nvdisasm, "-b", name, file.name], capture_output=True, text=True, check=True).stdout
    lines = iter(line for line in text.splitlines(keepends=True) if "/*" in line)
    return ["".join(islice(lines, len(code) // INSTRUCTION)) for code in codes]


def _machine(request: Request, result: Compiled, assembly: str) -> Machine:
    architecture, constants = request["architecture"], request["constants"]
    code = _instructions(assembly)
    loop = _main_loop(code)
    tile = constants.get("BLOCK_M", 0), constants.get("BLOCK_N", 0)
    needs = result.num_warps, result.registers, result.shared_memory, result.tensor_memory
    return Machine(
        registers=result.registers,
        spilled_registers=_spills(assembly, code),
        shared_memory=result.shared_memory,
        tensor_memory=result.tensor_memory,
        matrix_instructions=dict(Counter(match[0] for _, text in code if (match := MATRIX.match(text)))),
        accesses=dict(Counter(str(_width(text)) for _, text in code if GLOBAL.match(text))),
        occupancy=occupancy(TARGETS[architecture], *needs),
        loop=dict(Counter(map(_kind, loop))),
        issue_bound=_issue_bound(loop, architecture, request.get("num_warps", result.num_warps), tile),
        seconds=result.seconds,
    )


def _instructions(assembly: str) -> list[tuple[str, str]]:
    """(label or address, instruction without its predicate), in the order of the program; AMD's labels without one."""
    if assembly.lstrip().startswith("/*"):
        line = re.compile(r"^\s+/\*0*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*)", re.MULTILINE)
        return [("0x" + address, text) for address, text in line.findall(assembly)]
    line = re.compile(r"^(\.L\w+):|^[ \t]+([a-z]\w+(?:[ \t][^;\n]*)?)", re.MULTILINE)
    return line.findall(assembly)


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
        branch = re.match(r"(?:BRA\b|s_c?branch).*?(\.L\w+|0x[0-9a-f]+)", text)
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


def _serve(connection: Connection[Any, Any], environment: dict[str, str]) -> None:
    """The life of a worker process: a request in, a `Compiled` or a `Failure` out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    os.environ.clear()  # the fork server has what was set when it started
    os.environ.update(environment)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the same code, a sixth sooner
    while True:
        request = connection.recv()
        try:
            connection.send(compiled(**request))
        except Exception as error:
            connection.send(Failure(f"{type(error).__name__}: {error}"))


class _Worker:
    """A process that compiles, and another one after it died or did not answer."""

    def __init__(self) -> None:
        self.process: ForkServerProcess | None = None

    def answer(self, request: Request) -> Compiled | Failure:
        if self.process is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # and with it torch, once for all workers, but no Triton
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other, dict(os.environ)), daemon=True)
            self.process.start()
            other.close()
        try:
            self.connection.send(request)
            if self.connection.poll(PATIENCE):
                answer: Compiled | Failure = self.connection.recv()
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


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Requests for one architecture each, no more than ``size``."""
    for _, group in groupby(requests, lambda request: request["architecture"]):
        while batch := list(islice(group, size)):
            yield batch


def machine_code(requests: Sequence[Request], jobs: int) -> Iterator[Machine | Failure]:
    """What each request becomes; in their order. Equal ones are compiled once.

    A request holds arguments of `compiled`, and may name a file for the assembly as "dump".
    """
    workers: SimpleQueue[_Worker] = SimpleQueue()
    own = [_Worker() for _ in range(jobs)]
    for worker in own:
        workers.put(worker)

    def answers(batch: list[Request]) -> list[Machine | Failure]:
        worker = workers.get()
        try:
            results = [worker.answer({key: request[key] for key in request if key != "dump"}) for request in batch]
        finally:
            workers.put(worker)
        codes = [result.code for result in results if isinstance(result, Compiled) and isinstance(result.code, bytes)]
        disassembled = iter(_disassembled(codes, batch[0]["architecture"]) if codes else ())
        found: list[Machine | Failure] = []
        for request, result in zip(batch, results, strict=True):
            if isinstance(result, Failure):
                found.append(result)
                continue
            assembly = result.code if isinstance(result.code, str) else next(disassembled)
            if "dump" in request:
                Path(request["dump"]).write_text(assembly)
            found.append(_machine(request, result, assembly))
        return found

    pool = ThreadPoolExecutor(jobs)
    try:
        keys = [json.dumps(request, sort_keys=True) for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        one_by_one = any("dump" in request for request in requests)  # each with addresses from 0
        size = 1 if one_by_one else min(BATCH, -(-len(unique) // jobs))
        places: list[tuple[Future[list[Machine | Failure]], int]] = []
        for batch in _batches(list(unique.values()), size):
            future = pool.submit(answers, batch)
            places += [(future, number) for number in range(len(batch))]
        place_of = dict(zip(unique, places, strict=True))
        for key in keys:
            future, number = place_of[key]
            yield future.result()[number]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in own:
            worker.stop()
