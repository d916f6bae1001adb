"""``fastops qualify``: check and time all of fastops on the GPU that is here, within minutes, and write a report."""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from fastops import dispatch
from fastops.cli import CommandError
from fastops.cli.environment import check_file, make_folder, pick_device, run_interpreted
from fastops.progress import tracked
from fastops.qualify.cases import PARTS, cases_of, on_a_gpu
from fastops.qualify.processes import Pool
from fastops.qualify.report import Report

# Until which share of the time each part may go on. What is left of the first two comes again at the end.
PLAN = (("kernels", 0.35), ("models", 0.5), ("compilations", 0.6), ("speed", 1.0), ("kernels", 1.0), ("models", 1.0))
SIDE_BY_SIDE = ("kernels", "models", "compilations")  # parts that time nothing
MOST_PROCESSES = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastops qualify``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to a file, part by part")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report to a file, part by part")
    parser.add_argument(
        "--table", type=Path, metavar="FOLDER", help="write which way won to a file for this kind of GPU in a folder"
    )
    parser.add_argument("--minutes", type=_minutes, default=8.0, metavar="N", help="when to stop; default 8")
    parser.add_argument(
        "--case", nargs="+", metavar="TEXT", default=[""], help="only the cases whose name contains one of these texts"
    )
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda:1 and so on; default: the accelerator, if any")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 2**20:
        raise argparse.ArgumentTypeError(f"{text!r} is no time")
    return minutes


def run(args: argparse.Namespace) -> int:
    """Run all parts and write each out before the next one begins; return 1 if a case failed."""
    start = time.monotonic()
    device = pick_device(args.device)
    if not dispatch.triton_installed:
        raise CommandError("there is nothing to qualify without Triton: pip install 'torch-fastops[triton]'")
    for file in (args.json, args.html):
        check_file(file)
    if args.table is not None:
        make_folder(args.table)
    status = run_interpreted(args, "triton", device)
    if status is not None:
        return status
    names = {
        part: [case.name for case in cases_of(part, device) if any(text in case.name for text in args.case)]
        for part in PARTS
    }
    if not any(names.values()):
        raise CommandError(f"no case contains {' or '.join(map(repr, args.case))}")
    report = Report(device, args.minutes, args.json, args.html, args.table)
    with tempfile.TemporaryDirectory() as cache:
        # What the user tuned does not count, and stays as it is.
        environment = {"FASTOPS_CACHE_DIR": cache, "FASTOPS_BACKEND": "auto"}
        begun = set()
        for part, share in PLAN:
            deadline = start + share * 60 * args.minutes
            if names[part] and (part not in begun or time.monotonic() < deadline):
                _run_part(part, names[part], Pool(part, device, deadline, environment), report, device)
                names[part] = report.left[part]
                begun.add(part)
    report.finish()
    return 1 if report.failed() else 0


def _run_part(part: str, names: list[str], pool: Pool, report: Report, device: torch.device) -> None:
    """Run the cases that there is time for."""
    processes = 1
    if on_a_gpu(device) and part in SIDE_BY_SIDE:
        processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    report.begin(part, names)
    try:
        for result in tracked(pool.results(names, processes), len(names), lambda result: result.name):
            report.add(part, result)
    finally:  # an interrupted run has what came before
        report.end(part)
