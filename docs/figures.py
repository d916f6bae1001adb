"""Draws the pictures of `docs/kernels/`, one function each: `python docs/figures.py FOLDER` writes them as SVG.

The documentation's build does it by itself. Each picture has a light ground of its own, so that it can be read on a
dark page too, and says the same each time, byte by byte.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

GROUND, INK, FAINT = "#fafafa", "#1f2430", "#c9ced8"
BLUE, ORANGE, GREEN, RED, GREY = "#9cc3eb", "#f5c27a", "#a9d6a0", "#eda3a0", "#e4e7ec"
STYLE = {
    "svg.hashsalt": "fastops",
    "svg.fonttype": "path",  # letters look the same wherever the page is read
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": GROUND,
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
}
FIGURES: dict[str, Callable[[], Figure]] = {}


def figure(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Lists a function under its name, that of its file too."""
    FIGURES[draw.__name__] = draw
    return draw


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, and all of it as one plane without axes: a unit is half an inch, y goes down."""
    whole = Figure((width, height))
    plane = whole.add_axes((0, 0, 1, 1))
    plane.set(xlim=(0, 2 * width), ylim=(2 * height, 0))
    plane.axis("off")
    return whole, plane


def cell(
    plane: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    color: str = GROUND,
    text: object = "",
    size: float = 8,
) -> None:
    """A box with words in it."""
    plane.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.7))
    plane.text(x + width / 2, y + height / 2, str(text), ha="center", va="center", fontsize=size)


def arrow(plane: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    plane.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.9})


@figure
def edges() -> Figure:
    """Three ways to end a dimension of 10 in tiles of 4: the last tile of each."""
    whole, plane = canvas(7, 2.4)
    ways = (  # what the four lanes of the last tile load, and the first lane that is its own
        ("masked", (8, 9, None, None), 0, "what lies outside is not read: each load has a mask"),
        ("tile_positions", (8, 9, 8, 9), 0, "the last unit, here 2, is repeated; only the store has a mask"),
        ("covering_tile", (6, 7, 8, 9), 2, "the tile is moved back; sums count the fresh lanes alone"),
    )
    plane.text(0.3, 0.6, "dimension, tiles of 4", va="center")
    for position in range(10):
        cell(plane, 3.4 + 0.6 * position, 0.3, 0.6, 0.6, (BLUE, ORANGE, GREEN)[position // 4], position)
    for line, (name, positions, first, words) in enumerate(ways):
        y = 1.5 + 1.15 * line
        plane.text(0.3, y + 0.3, name, va="center", family="monospace")
        for lane, place in enumerate(positions):
            color = GREEN if first <= lane < first + 2 else GREY
            cell(plane, 3.4 + 0.6 * lane, y, 0.6, 0.6, color, "" if place is None else place)
        plane.text(6.1, y + 0.3, words, va="center", fontsize=8)
    return whole


def draw(folder: Path, kind: str = "svg") -> None:
    """Write all pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            make().savefig(folder / f"{name}.{kind}", metadata={"Date": None} if kind == "svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), *sys.argv[2:])
