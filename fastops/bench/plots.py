"""Plots as inline SVG, in the colors of the page around them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Final, NamedTuple

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 60, 46, 24, 12
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#999999", "#8a2be2")


class Point(NamedTuple):
    """Where a figure is, how far it may be from there, and what it is."""

    x: float
    y: float
    low: float
    high: float
    name: str


class Axis(NamedTuple):
    """A logarithmic axis."""

    title: str
    low: float
    high: float

    def share(self, value: float) -> float:
        """How far along it a value is, from 0 to 1."""
        inside = min(max(value, self.low), self.high)
        return (math.log(inside) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self) -> list[float]:
        """Round numbers on it: powers of ten and, on a short one, 1, 2, 5 and what is between."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = {0: (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), 1: (1.0, 2.0, 5.0)}.get(
            int(math.log10(self.high / self.low)), (1.0,)
        )
        return [
            step * 10.0**decade for decade in decades for step in steps if self.low <= step * 10.0**decade <= self.high
        ]


def axis(title: str, values: Sequence[float]) -> Axis:
    """One on which all of these positive values are."""
    return Axis(title, min(values) / 1.15, max(values) * 1.15)


def plot(
    title: str,
    x: Axis,
    y: Axis,
    series: Mapping[str, Sequence[Point]],
    joined: bool = False,
    level: float | None = None,
) -> str:
    """Points with their intervals, one color for each series; ``joined`` by lines, and a line at a ``level``."""

    def across(value: float) -> float:
        return LEFT + x.share(value) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - y.share(value) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(title)}"'
        ' font-size="12" fill="currentColor" stroke="none">',
        f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x.title)}</text>',
        f'<text transform="translate(12 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y.title)}</text>',
    ]
    for value in x.ticks():
        at = across(value)
        parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, "currentColor", 'stroke-opacity=".15"'))
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    for value in y.ticks():
        at = up(value)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "currentColor", 'stroke-opacity=".15"'))
        parts.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    if level is not None:
        parts.append(_line(LEFT, up(level), WIDTH - RIGHT, up(level), "currentColor", 'stroke-dasharray="4 3"'))
    for color, points in zip(COLORS, series.values(), strict=False):
        ordered = sorted(points)
        if joined:
            for first, then in pairwise(ordered):
                parts.append(_line(across(first.x), up(first.y), across(then.x), up(then.y), color))
        for point in ordered:
            at = across(point.x)
            parts.append(_line(at, up(point.low), at, up(point.high), color))
            parts.append(
                f'<circle cx="{at:.1f}" cy="{up(point.y):.1f}" r="4" fill="{color}">'
                f"<title>{escape(point.name)}</title></circle>"
            )
    names = (
        f'<span style="color:{color}">&#9679;</span> {escape(name)}'
        for color, name in zip(COLORS, series, strict=False)
    )
    return "".join([*parts, f"</svg><figcaption>{' &nbsp; '.join(names)}</figcaption></figure>"])


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {more}/>'
