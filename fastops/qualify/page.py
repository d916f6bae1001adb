"""The report as one page of HTML, which needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from fastops.timing import shown

from .cases import FAILED, NOT_RUN, PARTS

STYLE: Final = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums } .failed { color: #b00020 }
"""
CONTESTANTS: Final = ("fastops", "triton", "torch.compile", "Liger")


def page(data: dict[str, Any]) -> str:
    """All of it."""
    gpu = data["gpu"] or "no GPU: Triton's interpreter, tiny sizes, no times"
    body = [f"<h1>fastops on {escape(gpu)}</h1>", *_failures(data), "<h2>Machine</h2>"]
    body += _table(("", ""), data["doctor"].items())
    body += _list("Not installed", (f"{name}: {use}" for name, use in data["missing"].items()))
    body += _list("The way of each op", data["ways"])
    for part, title in PARTS.items():
        results = data["parts"][part]
        body.append(f"<h2>{escape(title)}</h2>")
        body += {"kernels": _errors, "models": _figures, "compilations": lambda _: [], "speed": _speed}[part](results)
        body += _list("Not run", (f"{r['name']}: {r['reason']}" for r in results if r["outcome"] == NOT_RUN))
        body += _list("No time was left for", data["left"][part])
    if data["rates"]:
        body.append("<h2>What the device reaches</h2>")
        rows = [(name, f"{rate / 1e12:.3g}") for name, rate in data["rates"].items()]
        body += _table(("copy, or product in", "TB/s, or TFLOP/s"), rows)
    if data["table"]:
        body.append("<h2>Which way won</h2>")
        body += _table(("class", "rule", "won", "microseconds"), map(_won, data["table"]["won"]))
    title = f"<title>fastops on {escape(gpu)}</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>'
    return "\n".join([head, *body, "</html>\n"])


def _failures(data: dict[str, Any]) -> list[str]:
    results = [result for part in data["parts"].values() for result in part]
    failed = [f"{result['name']}: {result['reason']}" for result in results if result["outcome"] == FAILED]
    ran = sum(result["outcome"] != NOT_RUN for result in results)
    lines = [f"<p>{ran} cases ran, {len(failed)} failed.</p>"]
    return lines + [f'<p class="failed">{escape(line)}</p>' for line in failed]


def _errors(results: list[dict[str, Any]]) -> list[str]:
    """Errors of kernels in units of torch's, by arrangement."""
    found = [(r["name"], r["figures"]["errors in units of torch's"]) for r in results if r["figures"]]
    arrangements = list(dict.fromkeys(name for _, errors in found for name in errors))
    rows = ((name, *(f"{errors[one]:.2f}" if one in errors else "" for one in arrangements)) for name, errors in found)
    return _table(("largest error in units of torch's own", *arrangements), rows)


def _figures(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        for name, value in result["figures"].items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            rows.append((result["name"], f"{name} {shown}"))
    return _table(("case", "found"), rows)


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
    return [*_table(headings, rows), *_list("Left out of comparisons", left_out), *_list("fastops.tune", tuned)]


def _won(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    op, gradients, dtype, precision, layouts, options = entry["class"]
    sizes = " ".join("x".join(map(str, layout[0])) or "-" for layout in layouts)
    shown = f"{op} {dtype.removeprefix('torch.')} {precision} {sizes} {options} {'with gradients' * gradients}"
    seconds = ", ".join(f"{way} {1e6 * value:.1f}" for way, value in entry["seconds"].items())
    return shown, entry["rule"], entry["way"], seconds


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"<tr>{''.join(f'<td{_number(cell)}>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    if not lines:
        return []
    return [
        "<table><tr>" + "".join(f"<th>{escape(heading)}</th>" for heading in headings) + "</tr>",
        *lines,
        "</table>",
    ]


def _number(cell: object) -> str:
    return ' class="number"' if str(cell)[:1].isdigit() else ""


def _list(title: str, lines: Iterable[str]) -> list[str]:
    items = [f"<li>{escape(str(line))}</li>" for line in lines]
    return (
        [f"<details><summary>{escape(title)}: {len(items)}</summary><ul>", *items, "</ul></details>"] if items else []
    )
