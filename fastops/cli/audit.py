"""``fastops audit``: compile every kernel for GPUs that need not be here, and hold the machine code against rules."""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastops.audit.targets import TARGETS
from fastops.cli import CommandError
from fastops.cli.environment import check_file, make_folder, positive_integer, writing
from fastops.cli.table import Table
from fastops.progress import tracked

COLUMNS = {
    "target": 7,
    "kernel": 32,
    "dtype": 5,
    "shape": 41,
    "tile": 19,
    "registers": -9,
    "spills": -6,
    "shared": -7,
    "tmem": -4,
    "matrix": -6,
    "128 64 less": -11,
    "occupancy": -9,
    "loop": -13,
    "bound": -5,
    "seconds": -7,
}
SHARED = 4  # the first columns, which are a line of their own unless all fits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--target", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}; default: all of them")
    parser.add_argument("--op", nargs="+", metavar="OP", help="one for each file of kernels; default: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to FILE")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the assembly of every kernel into DIR")
    parser.add_argument("--jobs", type=positive_integer, default=os.cpu_count() or 1, help="compilers side by side")


def run(args: argparse.Namespace) -> int:
    """Print a row for each compilation; 1 if one breaks a rule or does not compile."""
    if find_spec("triton") is None:
        raise CommandError('this command needs triton: pip install "torch-fastops[audit]"')
    from fastops.audit.launches import AUDITED, launches
    from fastops.audit.machine_code import Failure, machine_code
    from fastops.audit.rules import RULES, broken_rules

    targets = _chosen("target", args.target, list(TARGETS))
    ops = _chosen("op", args.op, list(AUDITED))
    found = [launch for target in targets for launch in launches(target, ops)]
    requests = [launch.request for launch in found]
    if args.dump:
        make_folder(args.dump)
        names = (f"{n:04} {launch.target} {launch.kernel} {launch.dtype}" for n, launch in enumerate(found))
        requests = [
            request | {"dump": str(args.dump / f"{name.replace(' ', '-')}.s")}
            for name, request in zip(names, requests, strict=True)
        ]
    check_file(args.json)
    table, rows, counts, start = Table(COLUMNS, SHARED), [], Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        compiled = zip(found, machine_code(requests, args.jobs), strict=True)
        for launch, machine in tracked(compiled, len(found), lambda pair: f"{pair[0].target} {pair[0].kernel}"):
            if isinstance(machine, Failure):
                broken, figures = {"compile": machine.reason}, {}
            else:
                broken, figures = broken_rules(launch, machine), machine._asdict()
            counts.update(broken.keys())
            row = {
                "target": launch.target,
                "op": launch.op,
                "kernel": launch.kernel,
                "dtype": launch.dtype,
                "tile": launch.config,
                "shape": launch.shape,
                "shared_memory_limit": TARGETS[launch.target].shared_memory,
                **figures,
                "broken": broken,
            }
            rows.append(row)
            table.row(_cells(row))
            for name, how in broken.items():
                print(f"  broken: {name}: {' '.join(how.split())[:300]}")
    if args.json:
        rules = {rule.name: rule.explanation for rule in RULES}
        with writing(args.json) as file:
            file.write(json.dumps({"rules": rules, "rows": rows}, indent=1).encode())
    seconds = time.perf_counter() - start
    print(f"\n{len(rows)} compilations for {', '.join(targets)} in {seconds:.0f} s")
    for name, explanation in [("compile", "the compiler takes it"), *((rule.name, rule.explanation) for rule in RULES)]:
        print(f"{name}: {explanation}: {f'broken by {counts[name]}' if counts[name] else 'holds'}")
    return 1 if counts else 0


def _chosen(kind: str, words: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    for word in words or ():
        if word not in known:
            raise CommandError(f"unknown {kind} {word!r}: expected one of {', '.join(known)}")
    return words or known


def _cells(row: dict[str, Any]) -> list[str]:
    first = [str(row[name]) for name in ("target", "kernel", "dtype", "shape", "tile")]
    if "registers" not in row:
        return [*first, *[""] * (len(COLUMNS) - 5)]
    accesses = Counter[str]()
    for bits, count in row["accesses"].items():
        accesses["wide" if int(bits) >= 128 else "half" if int(bits) == 64 else "less"] += count
    return [
        *first,
        str(row["registers"]),
        str(row["spilled_registers"]),
        str(row["shared_memory"]),
        str(row["tensor_memory"]),
        str(sum(row["matrix_instructions"].values())),
        f"{accesses['wide']} {accesses['half']} {accesses['less']}",
        f"{row['occupancy']:.0%}",
        "+".join(str(row["loop"].get(kind, 0)) for kind in ("matrix", "global", "shared", "other")),
        "" if row["issue_bound"] is None else f"{row['issue_bound']:.2f}",
        f"{row['seconds']:.1f}",
    ]
