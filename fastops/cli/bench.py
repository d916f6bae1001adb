"""``fastops bench``: time fastops against eager PyTorch and others, call by call in turns, and print the ratios."""

import argparse
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

import fastops
from fastops import dispatch
from fastops.bench.cases import CASES, DTYPES, MODEL_CASES, QUICK, Case
from fastops.bench.compare import Comparison, compare, content, key, read, text_of
from fastops.bench.contestants import CONTESTANTS, OURS, NotRun
from fastops.bench.measure import Measured, Row, measure, peaks
from fastops.bench.own import own_cases
from fastops.bench.page import page
from fastops.cli import CommandError
from fastops.cli.doctor import facts, interpreting
from fastops.cli.environment import check_backend, check_file, pick_device, positive_integer, writing
from fastops.cli.table import Table
from fastops.ops import OPS
from fastops.progress import tracked

QUICK_SECONDS = 200.0  # of all cases together, within four minutes with what comes before and behind them
MODELS = tuple(dict.fromkeys(case.family.split("-")[0] for case in MODEL_CASES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastops bench``."""
    parser.add_argument("own", nargs="?", metavar="MODULE:FACTORY", help="a model of yours, or what makes it")
    parser.add_argument(
        "--input", action="append", default=[], metavar="SIZES", help="of your model: 8,3,224,224 or 8,128:int64"
    )
    parser.add_argument("--op", action="append", default=[], choices=OPS, metavar="NAME", help="only this operation")
    parser.add_argument(
        "--model", action="append", default=[], choices=MODELS, metavar="NAME", help=f"only {', '.join(MODELS)}"
    )
    parser.add_argument("--case", metavar="TEXT", default="", help="only the cases whose name contains this text")
    parser.add_argument(
        "--contestant", action="append", default=[], choices=CONTESTANTS, metavar="NAME", help="only this and eager"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of an operation; models run under autocast")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, metavar="NAME", help="of fastops; default: auto")
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda:1 and so on; default: the accelerator, if any")
    parser.add_argument(
        "--pairs", type=positive_integer, metavar="N", help="turns per case; default 50, or 21 if quick"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, or your model, within four minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows to a file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots and tables to a file")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="say what became slower since --json; then the status is 1"
    )


def run(args: argparse.Namespace) -> int:
    """Time the cases and print their rows; return 1 if fastops failed in one, became slower or was not compared."""
    refuse_interpreter()
    if args.json is not None and args.json == args.html:
        raise CommandError(f"--json and --html are both {args.json}")
    device = pick_device(args.device)
    backend = args.backend or dispatch.selected_backend()
    with fastops.backend(backend):
        check_backend(device)
    for file in (args.json, args.html):
        check_file(file)
    facts = environment(device) | {"backend": backend}
    old = None if args.compare is None else read(args.compare, facts)
    cases = chosen(args, device)
    dtype = str(DTYPES[args.dtype]).removeprefix("torch.")
    if old is not None and not {(row["case"], row["dtype"]) for row in old} & {(case.name, dtype) for case in cases}:
        raise CommandError(f"{args.compare} has none of these cases in {dtype}")
    for fact, value in facts.items():
        print(f"{fact}: {value}")
    print("\nmedians of turns; ratio: time over eager's in the same turn, faster below 1, and its quartiles")
    bench = Bench(args, device, backend)
    rows, left_out, failed = bench.run(cases)
    counts = Counter(row.verdict for row in rows if row.contestant == OURS)
    print(f"\nfastops: {', '.join(f'{count} {verdict}' for verdict, count in counts.items()) or 'not timed'}")
    for reason, names in _by_reason(left_out).items():
        print(f"left out, {reason}: {', '.join(names)}")
    if not rows:
        raise CommandError("nothing could be timed")
    changes = None
    if old is not None:
        changes = bench.confirmed(compare(old, [vars(row) for row in rows]), old, cases)
        _tell(changes, args.compare)
    rates = peaks(device, dtypes=[DTYPES[args.dtype]]) if args.html and device.type == "cuda" else {}
    found = content(facts, rows, left_out, rates)
    if args.json:
        with writing(args.json) as file:
            file.write(text_of(found).encode())
    if args.html:
        with writing(args.html) as file:
            file.write(page(found, changes).encode())
    return 1 if failed or (changes is not None and (changes.slower or not changes.judged)) else 0


def chosen(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases that the options name; `CommandError` if there are none."""
    if args.own is not None:
        if args.op or args.model or args.case:
            raise CommandError("a model of yours is timed alone: leave out --op, --model and --case")
        if not args.input:
            raise CommandError(f"say what {args.own} is called with: --input 8,3,224,224")
        return own_cases(args.own, args.input, device)
    if args.input:
        raise CommandError("--input is for a model of yours: fastops bench package.module:factory --input 8,3,224,224")
    named = {*args.op, *args.model}
    cases = [
        case
        for case in CASES
        if args.case in case.name
        and (not named or case.family in named or case.family.split("-")[0] in named)
        and (not args.quick or named or args.case or case.name in QUICK)
    ]
    if not cases:
        families = dict.fromkeys(case.family for case in CASES)
        raise CommandError(f"no case contains {args.case!r}: they begin with {', '.join(families)}")
    alone = args.quick and not (named or args.case)
    return sorted(cases, key=lambda case: QUICK.index(case.name)) if alone else cases


class Bench:
    """Measures cases as the options say, and prints a table of them."""

    def __init__(self, args: argparse.Namespace, device: torch.device, backend: str) -> None:
        self._args, self._device, self._backend = args, device, backend
        self._deadline = time.monotonic() + QUICK_SECONDS if args.quick else float("inf")
        self._pairs = args.pairs or (21 if args.quick else 50)

    def run(self, cases: list[Case]) -> tuple[list[Row], list[tuple[str, str, str]], bool]:
        """All rows; case, contestant and reason of what has none; and whether fastops failed anywhere."""
        rows: list[Row] = []
        left_out: list[tuple[str, str, str]] = []
        widths = {"case": max(len(case.name) for case in cases), "contestant": 22, "way": 8, "ms": -9, "ratio": -5}
        widths |= {"quartiles": -11, "verdict": 17, "MB": -8, "launches": -8, "peak MiB": -8}
        table = Table(widths, shared=1)
        failed = False
        for index, case in enumerate(tracked(cases, len(cases), lambda case: case.name)):
            try:
                found = self._measure(case, len(cases) - index)
            except NotRun as error:
                left_out.append((case.name, "all", str(error)))
                continue
            for row in found.rows:
                table.row(_cells(row))
            rows += found.rows
            left_out += [(case.name, name, reason) for name, reason in found.left_out.items()]
            failed = failed or OURS in found.left_out
        return rows, left_out, failed

    def _measure(self, case: Case, cases_left: int) -> Measured:
        """Within its share of the time that is left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise NotRun("no time was left")
        dtype = DTYPES[self._args.dtype]
        seconds = left / cases_left
        return measure(case, self._device, dtype, self._pairs, self._backend, self._args.contestant, seconds)

    def confirmed(self, found: Comparison, old: list[dict[str, object]], cases: list[Case]) -> Comparison:
        """Without what is not slower when its case is measured again."""
        names = {change.new["case"] for change in found.slower}
        again: set[object] = set()
        for case in (case for case in cases if case.name in names):
            self._deadline = max(self._deadline, time.monotonic() + QUICK_SECONDS / len(QUICK))
            with suppress(NotRun):
                rows = [vars(row) for row in self._measure(case, 1).rows]
                again |= {key(change.new) for change in compare(old, rows).slower}
        return found._replace(slower=[change for change in found.slower if key(change.new) in again])


def _cells(row: Row) -> list[str]:
    def figure(value: int | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:.2f}"

    times = [f"{row.milliseconds:.4f}", f"{row.ratio:.2f}", "{:.2f} - {:.2f}".format(*row.quartiles), row.verdict]
    launches = "-" if row.launches is None else str(row.launches)
    return [row.case, row.contestant, row.way, *times, figure(row.bytes, 1e6), launches, figure(row.peak_bytes, 2**20)]


def _by_reason(left_out: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case, contestant, reason in left_out:
        found.setdefault(f"{contestant}: {reason}", []).append(case)
    return found


def _tell(changes: Comparison, path: Path) -> None:
    for name, which in (("SLOWER", changes.slower), ("faster", changes.faster)):
        for change in which:
            print(f"{name} {change}")
    print(
        f"beside {path}: {len(changes.slower)} slower, {len(changes.faster)} faster, {changes.judged} rows judged, "
        f"{changes.unjudged} not (too few turns, or not in that file)"
    )


def environment(device: torch.device) -> dict[str, str | int]:
    """What the times depend on, besides the code."""
    return {"device": _device_name(device)} | facts()


def _device_name(device: torch.device) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # Apple's has none
    return f"{device} {name(device)}" if name else str(device)


def refuse_interpreter() -> None:
    """Raise ``CommandError`` if kernels would run in Triton's interpreter."""
    if interpreting():
        raise CommandError("Triton's interpreter is on, and its times mean nothing: unset TRITON_INTERPRET")
