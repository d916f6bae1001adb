"""The report as one page of HTML, which needs no other file."""

from __future__ import annotations

from html import escape
from typing import Any, Final

from fastops.html import document, listing, table
from fastops.timing import shown

from .cases import FAILED, NOT_RUN, PARTS

ERRORS: Final = "errors in units of torch's"
CONTESTANTS: Final = ("fastops", "triton", "torch.compile", "Liger")


def page(data: dict[str, Any]) -> str:
    """All of it."""
    gpu = data["gpu"] or "no GPU: Triton's interpreter, tiny sizes, no times"
    body = [*_failures(data), "<h2>Machine</h2>"]
    body += table(("", ""), data["doctor"].items())
    body += listing("Not installed", (f"{name}: {use}" for name, use in data["missing"].items()))
    body += listing("The way of each op", data["ways"])
    for part, title in PARTS.items():
        results = data["parts"][part]
        body.append(f"<h2>{escape(title)}</h2>")
        body += {"kernels": _errors, "models": _figures, "compilations": lambda _: [], "speed": _speed}[part](results)
        body += listing("Not run", (f"{r['name']}: {r['reason']}" for r in results if r["outcome"] == NOT_RUN))
        body += listing("No time was left for", data["left"][part])
    if data["rates"]:
        body.append("<h2>What the device reaches</h2>")
        rows = [(name, f"{rate / 1e12:.3g}") for name, rate in data["rates"].items()]
        body += table(("copy, or product in", "TB/s, or TFLOP/s"), rows)
    if data["table"]:
        body.append("<h2>Which way won</h2>")
        body += table(("class", "rule", "won", "microseconds"), map(_won, data["table"]["won"]))
    return document(f"fastops on {gpu}", body)


def _failures(data: dict[str, Any]) -> list[str]:
    results = [result for part in data["parts"].values() for result in part]
    failed = [f"{result['name']}: {result['reason']}" for result in results if result["outcome"] == FAILED]
    ran = sum(result["outcome"] != NOT_RUN for result in results)
    lines = [f"<p>{ran} cases ran, {len(failed)} failed.</p>"]
    return lines + [f'<p class="failed">{escape(line)}</p>' for line in failed]


def _errors(results: list[dict[str, Any]]) -> list[str]:
    """Errors of kernels in units of torch's, by arrangement."""
    found = [(r["name"], r["figures"][ERRORS]) for r in results if ERRORS in r["figures"]]
    others = [result for result in results if result["figures"] and ERRORS not in result["figures"]]
    arrangements = list(dict.fromkeys(name for _, errors in found for name in errors))
    rows = ((name, *(f"{errors[one]:.2f}" if one in errors else "" for one in arrangements)) for name, errors in found)
    return [*table(("largest error in units of torch's own", *arrangements), rows), *_figures(others)]


def _figures(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        for name, value in result["figures"].items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            rows.append((result["name"], f"{name} {shown}"))
    return table(("case", "found"), rows)


def _speed(results: list[dict[str, Any]]) -> list[str]:
    """Times, ratios to eager with quartiles, and shares of what the device reaches."""
    headings = ("case", "way", "eager ms", *CONTESTANTS, "of copy", "of matmul", "host us, eager", "host us, fastops")
    rows = []
    for result in results:
        times = result["figures"].get("times")
        if times:
            ours, eager = times["fastops"], times["eager"]
            ratios = (shown(times[name]["ratio"]) if name in times else "" for name in CONTESTANTS)
            shares = (f"{100 * ours[of]:.0f} %" if of in ours else "" for of in ("of copy", "of matmul"))
            hosts = (f"{1e6 * one['host']:.1f}" for one in (eager, ours))
            way = result["figures"].get("way", "")
            rows.append((result["name"], way, f"{1e3 * eager['seconds']:.4f}", *ratios, *shares, *hosts))
    left_out = (
        f"{result['name']}: {name}: {reason}"
        for result in results
        for name, reason in result["figures"].get("left out", {}).items()
    )
    tuned = (f"{r['name']}: {line}" for r in results for line in r["figures"].get("tuned", ()))
    return [*table(headings, rows), *listing("Left out of comparisons", left_out), *listing("fastops.tune", tuned)]


def _won(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    op, gradients, dtype, precision, layouts, options = entry["class"]
    sizes = " ".join("x".join(map(str, layout[0])) or "-" for layout in layouts)
    shown = f"{op} {dtype.removeprefix('torch.')} {precision} {sizes} {options} {'with gradients' * gradients}"
    seconds = ", ".join(f"{way} {1e6 * value:.1f}" for way, value in entry["seconds"].items())
    return shown, entry["rule"], entry["way"], seconds
