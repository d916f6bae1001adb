"""Puts small defects into kernels and ops, one at a time, and asks the tests whether they notice: `make mutants`.

    python tests/mutants.py --count 300 --seed 0 --jobs 2 --json mutants.json

A mutant is one changed comparison, operator, constant, branch, mask or term in a file of ``kernels/`` or
``fastops/ops/``. It lies in a copy of the tree, where tests run until one fails, which has to pass without the mutant:
then it is killed. First come those that have killed mutants of the same file, then fuzzing, the file's own, and general
ones. Survivors are listed as differences, to be judged by a person: equivalent, or in want of a test.

Neither mutmut nor cosmic-ray does this here: the one rewrites functions whose source Triton reads, the other knows one
test command for all files, which would take minutes for each mutant.
"""

from __future__ import annotations

import os

# Of all tests, and before they are imported, once: each run of tests is a fork of this process.
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}

import argparse
import ast
import difflib
import json
import multiprocessing
import random
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
import triton  # noqa: F401

ROOT = Path(__file__).parent.parent
HANGS = 120  # seconds in which no test ends
# What only the speed depends on, tables of versions, and what commands draw, time and audit: no test is to see these.
LEFT_OUT = {"kernels/configs.py", "kernels/private.py", "fastops/ops/examples.py"}
IDLE = {
    *("timed", "timed_pairs", "_make", "_example", "_examples", "register_limit", "narrowed", "tile_of_program"),
    *("elementwise_config", "cross_entropy_config", "_lanes", "_vector", "parts_of", "results_per_warp"),
}
FASTER = {
    "GROUP_M",
    "num_warps",
    "num_stages",
    "maxnreg",
    "BLOCK",
    "schema",
    "backward_schema",
    "timed",
    "examples",
    "strict",
}
COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.LShift: ">>",
    ast.RShift: "<<",
}
SWAPPED = {"minimum": "maximum", "maximum": "minimum", "max": "min", "min": "max", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """The text from ``begin`` to ``end`` of a file becomes ``text``."""

    file: str
    line: int
    begin: int
    end: int
    text: str

    def applied(self, source: str) -> str:
        return source[: self.begin] + self.text + source[self.end :]

    def difference(self) -> str:
        source = (ROOT / self.file).read_text()
        lines = difflib.unified_diff(source.splitlines(), self.applied(source).splitlines(), n=0, lineterm="")
        return f"{self.file}:{self.line}\n" + "\n".join(list(lines)[3:])


def mutants_of(file: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    source = (ROOT / file).read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    assert source.isascii() or all(ord(c) < 0x10000 for c in source)

    def position(line: int, column: int) -> int:
        text = source[starts[line - 1] :].split("\n", 1)[0]
        return starts[line - 1] + len(text.encode()[:column].decode())

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset)

    def change(node: ast.expr, text: str) -> Mutant:
        return Mutant(file, node.lineno, *span(node), text)

    def text_of(node: ast.expr) -> str:
        begin, end = span(node)
        return f"({source[begin:end]})"

    def visit(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name not in IDLE and not node.name.startswith("_audit"):
                for child in node.body:
                    yield from visit(child)
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from visit(node.value)
            return
        if isinstance(node, ast.keyword) and node.arg in FASTER:
            return
        if isinstance(node, ast.keyword) and node.arg == "mask" and not isinstance(node.value, ast.Constant):
            yield change(node.value, "None")
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = text_of(node.left), text_of(node.comparators[0])
            yield change(node, f"({left} {COMPARISONS[type(node.ops[0])]} {right})")
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not isinstance(node.left, ast.JoinedStr):
            yield change(node, f"({text_of(node.left)} {OPERATORS[type(node.op)]} {text_of(node.right)})")
            yield change(node, text_of(node.left))  # without the other term
        if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield change(node, repr(not node.value) if isinstance(node.value, bool) else repr(node.value + 1))
        if isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield change(node, "(" + word.join(map(text_of, node.values)) + ")")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert, ast.USub)):
            yield change(node, text_of(node.operand))
        if isinstance(node, ast.IfExp):
            yield change(node, f"({text_of(node.orelse)} if {text_of(node.test)} else {text_of(node.body)})")
        if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, ast.Compare):
            yield change(node.test, f"(not {text_of(node.test)})")
        if isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Mult)):
            begin, end = span(node.target)[1], span(node.value)[0]
            yield Mutant(file, node.lineno, begin, end, " = ")
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in SWAPPED:
                end = span(node.func)[1]
                yield Mutant(file, node.lineno, end - len(name), end, SWAPPED[name])
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from visit(node)


# Running --------------------------------------------------------------------------------------------------------------

GENERAL = {
    "kernels": ("functional", "autograd"),
    "ops": ("functional", "autograd", "semantics", "tensor_kinds", "func", "errors", "flops", "failures", "compile"),
}
# Files of one family of ops: only tests with such words in their names are asked, beside the file's own.
FAMILIES = {
    ("pair_loss", "pair", "mse", "l1", "smooth_l1", "huber"): "mse or l1 or huber",
    ("bce",): "binary or bce",
    ("cross_entropy", "cross_entropy_device"): "cross_entropy",
    ("chunked_logits",): "cross_entropy",
    ("linear_cross_entropy",): "linear_cross_entropy",
    ("conv", "conv_act", "conv_device", "depthwise", "depthwise_device", "channels_last"): "conv",
    ("geometry",): "conv or batch_norm or pool",
    ("batch_norm", "batch_norm_device"): "batch_norm",
    ("max_pool",): "pool",
    ("add_relu",): "add_relu",
    ("linear", "linear_act"): "linear",
    ("matmul", "onednn"): "linear or conv",
}


@cache
def groups_of(file: str) -> tuple[tuple[str, ...], ...]:
    """Arguments of pytest for a file, group after group: fuzzing, the tests of its own, then general ones."""
    names = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    stem = Path(file).stem
    words = next((words for stems, words in FAMILIES.items() if stem in stems), "")
    chosen = ("-k", words) if words else ()
    subjects = {stem.removesuffix("_device"), *words.split(" or ")} - {""}
    stems = {name: Path(name).stem for name in names if "swap" not in name}
    own = tuple(name for name, stem in stems.items() if any(subject in stem for subject in subjects))
    kernels = tuple(name for name in names if name.startswith("tests/interpreter") and name not in own)
    general = tuple(f"tests/test_{name}.py" for name in GENERAL[Path(file).parent.name])
    ways = ("tests/test_dispatch.py",) if "ops" in file else ()
    groups = [("tests/test_fuzz.py", *chosen), own, () if words or own else kernels, (*general, *chosen), ways]
    return tuple(group for group in groups if group)


class Teller:
    """Writes into a pipe whenever a test has ended: nothing, or its name if it failed."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        os.write(self.pipe, f"{report.nodeid if report.failed else ''}\n".encode())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        os.write(self.pipe, f"{report.nodeid.split('::')[0] if report.failed else ''}\n".encode())


def failing(folder: Path, arguments: tuple[str, ...]) -> str | None:
    """The first test that fails in that copy of the tree, "one that hangs", or None if all pass."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        sys.path.insert(0, str(folder))
        code = 1
        try:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
            code = pytest.main([*options, *arguments], plugins=[Teller(writing)])
        finally:
            os._exit(0 if code in (0, pytest.ExitCode.NO_TESTS_COLLECTED) else 1)
    os.close(writing)
    told = b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], HANGS)[0]:
            if not (more := pipe.read(4096)):
                break
            told += more
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "one that hangs"
    status = os.waitpid(child, 0)[1]
    names = [line for line in told.decode().splitlines() if line]
    return names[0] if names else "the start of all" if status else None


def _work(jobs: multiprocessing.Queue, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "_build", "__pycache__")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
        passing: set[str] = set()
        killers: dict[str, dict[str, None]] = {}  # of the mutants of a file so far, the last one first
        while (mutant := jobs.get()) is not None:
            path, killer = folder / mutant.file, None
            source = path.read_text()
            path.write_text(mutant.applied(source))
            before = killers.setdefault(mutant.file, {})
            if before and (killer := failing(folder, tuple(before))) == "the start of all":
                killer = None  # a mutant may have changed the name of one of these
            for group in groups_of(mutant.file):
                killer = killer or failing(folder, group)
            path.write_text(source)
            if killer is not None and "::" in killer and killer not in passing:
                if failing(folder, (killer,)) is not None:
                    results.put((mutant, f"{killer}, which fails without any mutant"))
                    raise SystemExit(1)
                passing.add(killer)
            if killer in passing:
                killers[mutant.file] = {killer: None} | before
            results.put((mutant, killer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--files", nargs="*", default=[], help="only of these files")
    parser.add_argument("--json", type=Path, help="write results there, and go on where that file ends")
    arguments = parser.parse_args()
    # It knows its source by size and second: mutants of one size may follow at once.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"

    paths = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "fastops" / "ops").glob("*.py")]
    files = sorted({str(path.relative_to(ROOT)) for path in paths} - LEFT_OUT)
    known = [mutant for file in arguments.files or files for mutant in mutants_of(file)]
    drawn = random.Random(arguments.seed).sample(known, min(arguments.count, len(known)))

    for mutant in drawn:
        compile(mutant.applied((ROOT / mutant.file).read_text()), mutant.file, "exec")

    found: list[tuple[Mutant, str | None]] = []
    if arguments.json and arguments.json.exists():
        killers = {
            tuple(r[name] for name in Mutant._fields): r["killer"] for r in json.loads(arguments.json.read_text())
        }
        found = [(mutant, killers[mutant]) for mutant in drawn if mutant in killers]
        drawn = [mutant for mutant in drawn if mutant not in killers]
    wanted = len(found) + len(drawn)

    context = multiprocessing.get_context("fork")
    jobs, results = context.Queue(), context.Queue()
    for mutant in [*drawn, *[None] * arguments.jobs]:
        jobs.put(mutant)
    workers = [context.Process(target=_work, args=(jobs, results)) for _ in range(arguments.jobs)]
    for worker in workers:
        worker.start()
    while len(found) < wanted:
        mutant, killer = results.get()
        found.append((mutant, killer))
        if killer is None or killer.endswith("without any mutant"):
            print(f"{'survived' if killer is None else f'not killed by {killer}'}: {mutant.difference()}\n", flush=True)
        if arguments.json:
            records = [each._asdict() | {"difference": each.difference(), "killer": by} for each, by in found]
            arguments.json.write_text(json.dumps(records, indent=1))
        if killer is not None and killer.endswith("without any mutant"):
            for worker in workers:
                worker.terminate()
            raise SystemExit(1)
        survivors = sum(by is None for _, by in found)
        print(f"{len(found)} of {wanted} (there are {len(known)}), {survivors} survived", flush=True)
    print(f"killed {len(found) - survivors} of {len(found)}: {1 - survivors / len(found):.1%}")


if __name__ == "__main__":
    main()
