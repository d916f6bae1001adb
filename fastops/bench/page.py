"""The page of ``fastops bench --html``: first whether fastops is faster, by how much and how sure; then all figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

from fastops.html import document, listing, table

from .compare import Comparison
from .contestants import EAGER, OURS
from .measure import FASTER, OVERHEAD, SAME, SLOWER, UNCLEAR
from .plots import Axis, Point, axis, plot

Rows = list[dict[str, Any]]
MEANINGS: Final = {
    FASTER: "three quarters of the turns were faster than eager",
    SLOWER: "three quarters of the turns were slower than eager",
    UNCLEAR: "the quartiles are on both sides of 1, far apart, or of few turns: this run cannot tell",
    SAME: "fastops ran the operations that eager runs, so that what looks faster is noise",
    OVERHEAD: "the same, and in three quarters of the turns fastops took longer to get there",
}


def page(data: Mapping[str, Any], changes: Comparison | None = None) -> str:
    """All of a run, as `fastops.bench.compare.content` has it, and what changed since another."""
    rows: Rows = data["rows"]
    facts = data["environment"]
    body = [*_answer(rows), *_changes(changes)]
    body += [part for part in (_ratios(rows), _memory(rows), _roofline(rows, data["peaks"])) if part]
    body += ["<h2>Every row</h2>", *_table(rows)]
    body += listing("Why a figure is missing", _unknown(rows))
    body += listing("Left out", (f"{case}: {name}: {reason}" for case, name, reason in data["left_out"]))
    body += ["<h2>Machine</h2>", *table(("", ""), facts.items())]
    return document("Is fastops faster here?", body)


def _answer(rows: Rows) -> list[str]:
    """Of models if there are any, else of operations."""
    ours = [row for row in rows if row["contestant"] == OURS]
    models = [row for row in ours if row["case"].count("/") == 1]
    lines = []
    for row in models or ours:
        best = min((other for other in rows if other["case"] == row["case"]), key=lambda other: other["ratio"])
        beside = f"; fastest here: {best['contestant']}, {best['ratio']:.2f}" if best["contestant"] != OURS else ""
        head = f'<li><b class="{row["verdict"].split()[-1]}">{escape(_spoken(row))}</b>'
        low, high = row["quartiles"]
        lines.append(
            f"{head} {escape(row['case'])}, {row['dtype']}: {row['ratio']:.2f} of eager's time, half of "
            f"{row['turns']} turns between {low:.2f} and {high:.2f}{escape(beside)}</li>"
        )
    met = Counter(row["verdict"] for row in ours)
    keys = "; ".join(f"{count} {name}: {MEANINGS[name]}" for name, count in met.items())
    return (
        ["<ul>", *lines, "</ul>", f"<p>Of all {len(ours)} cases: {escape(keys)}.</p>"] if lines else ["<p>No row.</p>"]
    )


def _spoken(row: Mapping[str, Any]) -> str:
    if row["verdict"] not in (UNCLEAR, SAME):
        return f"{row['verdict']}: {1 / row['ratio']:.2f} times as fast."
    return f"{row['verdict']}."


def _changes(changes: Comparison | None) -> list[str]:
    if changes is None:
        return []
    found = [f'<p class="slower">Slower than then: {escape(str(change))}</p>' for change in changes.slower]
    found += [f'<p class="faster">Faster than then: {escape(str(change))}</p>' for change in changes.faster]
    return ["<h2>Beside the earlier run</h2>", *(found or [f"<p>Of {changes.judged} rows none changed clearly.</p>"])]


def _table(rows: Rows) -> list[str]:
    def figure(value: int | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:.2f}"

    headings = ("case", "contestant", "dtype", "way", "ms", "ratio", "quartiles", "turns", "verdict")
    cells = (
        (
            *(row[name] for name in headings[:4]),
            f"{row['milliseconds']:.4f}",
            f"{row['ratio']:.2f}",
            "{:.2f} - {:.2f}".format(*row["quartiles"]),
            row["turns"],
            row["verdict"],
            figure(row["bytes"], 1e6),
            "-" if row["launches"] is None else row["launches"],
            figure(row["peak_bytes"], 2**20),
        )
        for row in rows
    )
    return table((*headings, "MB moved", "launches", "peak MiB"), cells)


def _unknown(rows: Rows) -> Iterable[str]:
    found = (f"{what}, {row['contestant']}: {why}" for row in rows for what, why in row["unknown"].items())
    return dict.fromkeys(found)


def _ratios(rows: Rows) -> str:
    """Ratio against size, which is what eager moves."""
    sizes = {row["case"]: row["bytes"] for row in rows if row["contestant"] == EAGER and row["bytes"]}
    series: dict[str, list[Point]] = {}
    for row in rows:
        if row["case"] in sizes and row["contestant"] != EAGER:
            name = f"{row['case']}, {row['contestant']}: {row['ratio']:.2f}"
            low, high = row["quartiles"]
            point = Point(sizes[row["case"]] / 1e6, row["ratio"], low, high, name)
            series.setdefault(row["contestant"], []).append(point)
    points = [point for own in series.values() for point in own]
    if not points:
        return ""
    y = axis("time over eager's", [1.0, *(end for point in points for end in (point.y, point.low, point.high))])
    return plot("Ratio against size", axis("MB that eager moves", [p.x for p in points]), y, series, level=1.0)


def _memory(rows: Rows) -> str:
    """Peak memory of heads against their classes, for the rows and features with the most sizes."""
    heads: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        found = re.fullmatch(r"linear_cross_entropy/(\d+x\d+)-(\d+)/forward\+backward", row["case"])
        if found and row["peak_bytes"]:
            peak, name = row["peak_bytes"] / 2**20, f"{row['case']}, {row['contestant']}"
            point = Point(int(found[2]), peak, peak, peak, f"{name}: {peak:.1f} MiB")
            heads.setdefault(found[1], {}).setdefault(row["contestant"], []).append(point)
    shape = max(heads, key=lambda shape: max(map(len, heads[shape].values())), default=None)
    if shape is None or max(map(len, heads[shape].values())) < 2:
        return ""
    points = [point for own in heads[shape].values() for point in own]
    x, y = axis("classes", [point.x for point in points]), axis("peak MiB", [point.y for point in points])
    return plot(
        f"Memory of a head against its vocabulary, {shape}, forward and backward", x, y, heads[shape], joined=True
    )


def _roofline(rows: Rows, peaks: Mapping[str, float]) -> str:
    """Operations in a second beside what a copy and a product of this device reach, where that was measured."""
    if not peaks:
        return ""
    sizes = {row["case"]: row["bytes"] for row in rows if row["contestant"] == EAGER and row["bytes"]}
    series: dict[str, list[Point]] = {}
    for row in rows:
        top = peaks.get(row["dtype"])
        if top and row["flops"] and row["case"] in sizes:
            rate = row["flops"] / row["milliseconds"] / 1e9
            name = f"{row['case']}, {row['contestant']}: {rate:.3g} TFLOP/s"
            point = Point(row["flops"] / sizes[row["case"]], rate, rate, rate, name)
            series.setdefault(row["contestant"], []).append(point)
    points = [point for own in series.values() for point in own]
    if not points:
        return ""
    x = axis("operations per byte that eager moves", [point.x for point in points])
    (top,) = (rate for name, rate in peaks.items() if name != "copy")
    ends = [x.low, *([edge] if x.low < (edge := top / peaks["copy"]) < x.high else []), x.high]
    roof = [(value, min(top, value * peaks["copy"]) / 1e12) for value in ends]
    limit = {"limit": [Point(value, rate, rate, rate, f"limit: {rate:.3g} TFLOP/s") for value, rate in roof]}
    y: Axis = axis("TFLOP/s", [point.y for point in (*points, *limit["limit"])])
    shares = plot("Roofline: beside what a copy and a product reach here", x, y, series | limit)
    return shares
