"""Draws the pictures of `docs/kernels/`, one function each: `python docs/figures.py FOLDER` writes them as SVG.

The documentation's build does it by itself. Each picture has a light ground of its own, so that it can be read on a
dark page too, and says the same each time, byte by byte.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fastops.kernels.activation import PARAMETERS
from fastops.ops.activations import applied

GROUND, INK, FAINT = "#fafafa", "#1f2430", "#c9ced8"
BLUE, ORANGE, GREEN, RED, GREY = "#9cc3eb", "#f5c27a", "#a9d6a0", "#eda3a0", "#e4e7ec"
LINES = "#2f6db3", "#c2600c", "#3f8a34", "#8a4fa8"
STYLE: dict[Any, Any] = {
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


@figure
def elementwise() -> Figure:
    """A vector in blocks, and the sums of a loss."""
    whole, plane = canvas(7, 2.6)
    size, block, across = 22, 8, 0.5
    for lane in range(24):
        color = GREY if lane >= size else (BLUE, ORANGE, GREEN)[lane // block]
        cell(plane, 0.8 + across * lane, 0.5, across, 0.6, color, lane if lane < size else "", 7)
    for program in range(3):
        middle = 0.8 + across * block * (program + 0.5)
        cell(plane, middle - 1.2, 1.9, 2.4, 0.6, text=f"program {program}")
        arrow(plane, (middle, 1.15), (middle, 1.85))
        cell(plane, middle - 0.9, 3.1, 1.8, 0.6, GREY, f"sum {program}")
        arrow(plane, (middle, 2.5), (middle, 3.05))
        arrow(plane, (middle, 3.7), (6.8, 4.25))
    cell(plane, 5.3, 4.3, 3, 0.6, RED, "total_kernel, in order")
    plane.text(12.3, 0.3, "no elements", ha="center", fontsize=7)
    plane.text(9.2, 4.6, "of a loss alone", va="center", fontsize=8)
    return whole


def tile_of_program(program: int, tiles_m: int, tiles_n: int, group_m: int) -> tuple[int, int]:
    """As in `kernels/matmul.py`."""
    group, within = divmod(program, group_m * tiles_n)
    rows = min(tiles_m - group * group_m, group_m)
    return group * group_m + within % rows, within // rows


@figure
def linear() -> Figure:
    """The order of a product's tiles, and what one of them reads."""
    whole, plane = canvas(7, 4.6)
    left, top, side, chosen = 4.6, 3.6, 0.9, (1, 3)
    for program in range(36):
        row, column = tile_of_program(program, 6, 6, 3)
        color = RED if (row, column) == chosen else BLUE if program < 9 else GREY
        cell(plane, left + side * column, top + side * row, side, side, color, program)
    for step in range(3):
        cell(plane, 1.5 + side * step, top + side * chosen[0], side, side, ORANGE, f"step {step}", 7)
        cell(plane, left + side * chosen[1], 0.5 + side * step, side, side, GREEN, f"step {step}", 7)
    plane.text(1.5, top + 0.7, "A: a row of tiles, along K", fontsize=8)
    plane.text(left + side * 4.2, 1.5, "B: a column of tiles, along K", fontsize=8)
    plane.text(10.5, top + 0.5, "C: a program\nfor each tile", va="center")
    plane.text(10.5, top + 2.0, "blue: the first nine\nread 3 rows of A and\n3 columns of B", va="center", fontsize=8)
    plane.plot([left - 0.3, left + 6 * side + 0.3], [top + 3 * side] * 2, color=INK, linewidth=1.6)
    plane.text(10.5, top + 3 * side + 0.55, "next group of\nGROUP_M = 3 rows", va="center", fontsize=8)
    return whole


@figure
def split_sum() -> Figure:
    """Few tiles and a long sum."""
    whole, plane = canvas(7, 2.7)
    for part in range(16):
        x = 0.8 + 0.68 * part
        for step in range(4):
            cell(plane, x + 0.17 * step, 0.9, 0.17, 0.7, (ORANGE, GREEN)[part % 2])
        for tile in range(2):
            cell(plane, x + 0.06, 2.5 + 0.65 * tile, 0.5, 0.5, BLUE)
        arrow(plane, (x + 0.34, 1.65), (x + 0.34, 2.4))
    plane.text(0.8, 0.6, "K: 64 steps in 16 parts of 4")
    plane.text(11.8, 3.0, "2 tiles of 16\npartial results", va="center", fontsize=8)
    arrow(plane, (6.2, 3.75), (6.2, 4.35))
    cell(plane, 2.2, 4.4, 7.7, 0.6, RED, "sum_of_splits_kernel: 0 + 1 + ... + 15, bias, activation, rounding")
    for tile in range(2):
        cell(plane, 10.6 + 0.65 * tile, 4.45, 0.5, 0.5, BLUE)
    arrow(plane, (9.9, 4.7), (10.55, 4.7))
    plane.text(12.1, 4.7, "C", va="center")
    return whole


def curves(plane: Axes, x: Tensor, lines: dict[str, Tensor], title: str, words: int = 8) -> None:
    """Lines over x, with a legend if there are several."""
    for color, (name, y) in zip(LINES, lines.items(), strict=False):
        plane.plot(x, y, color=color, linewidth=1.4, label=name)
    plane.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    plane.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    plane.set_title(title, fontsize=words, family="monospace" if words == 8 else None)
    plane.tick_params(labelsize=6, length=2)


@figure
def activations() -> Figure:
    """All of them, each with its slope."""
    whole = Figure((7.4, 4.4), layout="constrained")
    planes = whole.subplots(3, 5).flat
    for plane, (name, parameters) in zip(planes, PARAMETERS.items(), strict=False):
        x = torch.linspace(-5, 8 if name == "relu6" else 5, 401, requires_grad=True)
        y = applied((name, *parameters.values()), x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        curves(plane, x.detach(), {"value": y.detach(), "slope": slope}, name)
        plane.set_ylim(-1.3, 6.6 if name == "relu6" else 3.3)
    for plane in whole.axes[len(PARAMETERS) :]:
        plane.axis("off")
    whole.legend(*whole.axes[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.93, 0.15))
    return whole


@figure
def pair_losses() -> Figure:
    """The four losses and their slopes."""
    whole = Figure((7, 2.6), layout="constrained")
    left, right = whole.subplots(1, 2)
    d = torch.linspace(-3, 3, 601)
    names = "mse_loss", "l1_loss", "smooth_l1_loss, beta 0.5", "huber_loss, delta 2"
    values = d**2, d.abs(), F.smooth_l1_loss(d, 0 * d, reduction="none", beta=0.5), F.huber_loss(d, 0 * d, "none", 2)
    slopes = 2 * d, d.sign(), (d / 0.5).clamp(-1, 1), d.clamp(-2, 2)
    curves(left, d, dict(zip(names, values, strict=True)), "f(d)", 9)
    curves(right, d, dict(zip(names, slopes, strict=True)), "f'(d)", 9)
    left.set_ylim(-0.2, 4)
    right.set_ylim(-3, 3)
    left.legend(fontsize=6.5, loc="upper center")
    return whole


@figure
def bce() -> Figure:
    """The loss of a logit for three targets, and its slope."""
    whole = Figure((7, 2.4), layout="constrained")
    left, right = whole.subplots(1, 2)
    x = torch.linspace(-5, 5, 401)
    targets = {"target 0": 0.0, "target 1/2": 0.5, "target 1": 1.0}
    curves(left, x, {name: (1 - y) * x - F.logsigmoid(x) for name, y in targets.items()}, "loss over the logit", 9)
    curves(right, x, {name: x.sigmoid() - y for name, y in targets.items()}, "slope", 9)
    left.legend(fontsize=7, loc="upper center")
    return whole


@figure
def conv() -> Figure:
    """The implicit matrix of a convolution: one of its rows."""
    whole, plane = canvas(7, 3.3)
    for row in range(7):
        for column in range(7):
            padding = not (0 < row < 6 and 0 < column < 6)
            met = 2 <= row < 5 and column < 3
            color = ORANGE if met and not padding else RED if met else GREY if padding else BLUE
            number = 0 if padding else 5 * (row - 1) + column - 1
            cell(plane, 0.6 + 0.6 * column, 0.9 + 0.6 * row, 0.6, 0.6, color, number, 7)
    plane.text(0.6, 0.6, "input and its padding of zeros", fontsize=8)
    met_now = [(2 + tap // 3, tap % 3) for tap in range(9)]
    plane.text(5.6, 0.6, "[positions, taps x channels], gathered", fontsize=8)
    for line in range(5):
        for tap, (row, column) in enumerate(met_now):
            own = line == 2
            color = GREY if not own else RED if column == 0 else ORANGE
            text = "" if not own else 0 if column == 0 else 5 * (row - 1) + column - 1
            cell(plane, 5.6 + 0.5 * tap, 1.6 + 0.6 * line, 0.5, 0.6, color, text, 7)
    arrow(plane, (4.85, 3.1), (5.5, 3.1))
    plane.text(10.35, 3.1, "x", va="center")
    for tap in range(9):
        for output in range(2):
            cell(plane, 10.8 + 0.5 * output, 0.9 + 0.5 * tap, 0.5, 0.5, GREEN)
    plane.text(10.6, 0.6, "weight", fontsize=8)
    plane.text(12.05, 3.1, "=", va="center")
    for line in range(5):
        for output in range(2):
            cell(plane, 12.5 + 0.5 * output, 1.6 + 0.6 * line, 0.5, 0.6, BLUE if line == 2 else GREY)
    plane.text(12.3, 1.3, "output", fontsize=8)
    plane.text(5.6, 6.0, "a row for each position, a column for each tap; red: taps in the padding", fontsize=8)
    return whole


@figure
def conv_residues() -> Figure:
    """Which taps of a kernel of 3 by 3 with padding 1 input positions meet at stride 2."""
    whole, plane = canvas(7, 3)
    colors = {(0, 0): BLUE, (0, 1): ORANGE, (1, 0): GREEN, (1, 1): RED}
    for row in range(8):
        for column in range(8):
            cell(plane, 0.6 + 0.6 * column, 0.8 + 0.6 * row, 0.6, 0.6, colors[row % 2, column % 2])
    plane.text(0.6, 0.5, "input positions by (row % 2, column % 2)", fontsize=8)
    for number, (residue, color) in enumerate(colors.items()):
        x, y = 6.6 + 3.7 * (number % 2), 0.8 + 2.6 * (number // 2)
        met = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if all((a + 1 - k) % 2 == 0 for a, k in zip(residue, (r, c), strict=True))
        ]
        for r in range(3):
            for c in range(3):
                cell(plane, x + 0.55 * c, y + 0.55 * r, 0.55, 0.55, color if (r, c) in met else GROUND)
        plane.text(x + 1.85, y + 0.8, f"class {residue}\nmeets {len(met)} of\n9 taps", va="center", fontsize=8)
    return whole


@figure
def depthwise() -> Figure:
    """Sources and targets of a patch."""
    whole, plane = canvas(7, 2.5)
    for source in range(8):
        own = 1 <= source < 7
        cell(plane, 2.6 + 1.1 * source, 0.5, 1.1, 0.7, ORANGE if own else GREY, f"x{source}" if own else "")
    for target in range(4):
        cell(plane, 4.8 + 1.1 * target, 3.2, 1.1, 0.7, BLUE, f"z{target}")
        for tap in range(3):
            arrow(plane, (4.25 + 1.1 * (target + tap), 1.25), (5.35 + 1.1 * target, 3.15))
    plane.text(0.4, 0.85, "row of the input:\neach loaded once", va="center", fontsize=8)
    plane.text(0.4, 3.55, "patch of 4 targets,\nsums in registers", va="center", fontsize=8)
    plane.text(0.4, 2.2, "12 products,\n6 loads", va="center", fontsize=8)
    plane.text(7, 4.4, "a thread does this for as many channels as 16 bytes hold", ha="center", fontsize=8)
    return whole


@figure
def batch_norm() -> Figure:
    """From lanes to strips to the statistics of a channel."""
    whole, plane = canvas(7, 3.9)
    for strip in range(3):
        for unit in range(2):
            for line in range(2):
                for channel in range(6):
                    own = channel < 3
                    color = (BLUE, ORANGE, GREEN)[strip] if own else GREY
                    y = 1.0 + 2.0 * strip + 0.95 * unit + 0.4 * line
                    cell(plane, 0.9 + 0.5 * channel, y, 0.5, 0.4, color)
    plane.text(0.9, 0.6, "[positions, channels]", fontsize=8)
    plane.text(0.35, 3.9, "three strips of two units", va="center", ha="center", rotation=90, fontsize=8)
    for strip in range(3):
        y = 1.0 + 2.0 * strip
        arrow(plane, (4.0, y + 0.85), (5.0, y + 0.85))
        for line in range(2):
            for channel in range(3):
                color = (BLUE, ORANGE, GREEN)[strip]
                cell(plane, 5.1 + 0.75 * channel, y + 0.35 + 0.5 * line, 0.75, 0.5, color, "k, S, Q", 6)
        arrow(plane, (7.4, y + 0.85), (8.3, y + 0.85))
        for channel in range(3):
            cell(plane, 8.4 + 0.75 * channel, y + 0.6, 0.75, 0.5, (BLUE, ORANGE, GREEN)[strip], "m, M", 7)
        arrow(plane, (10.7, y + 0.85), (11.4, 3.85))
    plane.text(5.1, 0.6, "lanes: sums around\ntheir first value k", va="center", fontsize=8)
    plane.text(8.4, 0.6, "strips: mean and\nsquares around it", va="center", fontsize=8)
    for channel in range(3):
        cell(plane, 11.5 + 0.7 * channel, 3.6, 0.7, 0.5, RED, "m, s", 7)
    plane.text(11.4, 3.1, "channels", fontsize=8)
    plane.text(0.9, 7.5, "statistics_kernel: a program has a tile of channels and a strip", fontsize=8)
    plane.text(11.2, 4.5, "merge_statistics\n_kernel", va="top", fontsize=7, family="monospace")
    return whole


@figure
def max_pool() -> Figure:
    """Windows that overlap, their taps, and what one position gathers."""
    whole, plane = canvas(7, 3.1)
    values = "1420312", "0251021", "3106210", "2015403", "1420312", "0251021", "3106210"
    for row in range(7):
        for column in range(7):
            color = RED if (row, column) == (3, 3) else GROUND
            cell(plane, 0.8 + 0.7 * column, 0.9 + 0.7 * row, 0.7, 0.7, color, values[row][column], 7)
    for j, color in zip(((1, 1), (1, 2), (2, 1), (2, 2)), ("#2f6db3", "#b8741a", "#3f8a34", "#b0403b"), strict=True):
        x, y = 0.8 + 0.7 * (2 * j[1] - 1), 0.9 + 0.7 * (2 * j[0] - 1)
        inset = 0.05 * (2 * j[0] + j[1] - 2)
        box = Rectangle(
            (x + inset, y + inset), 2.1 - 2 * inset, 2.1 - 2 * inset, fill=False, edgecolor=color, linewidth=1.8
        )
        plane.add_patch(box)
    plane.text(0.8, 0.55, "input, windows of 3 by 3 at stride 2", fontsize=8)
    for row in range(4):
        for column in range(4):
            best = max(
                (int(values[r][c]), -(3 * i + k))
                for i in range(3)
                for k in range(3)
                if 0 <= (r := 2 * row - 1 + i) < 7 and 0 <= (c := 2 * column - 1 + k) < 7
            )
            meets = row in (1, 2) and column in (1, 2)
            cell(plane, 7.0 + 0.8 * column, 1.3 + 0.8 * row, 0.8, 0.8, ORANGE if meets else GREY, -best[1])
    plane.text(7.0, 0.95, "taps: the place of each maximum", fontsize=8)
    plane.text(10.6, 2.0, "The red position is\nplace 8, 6, 2 and 0 of\nits four windows.", va="center", fontsize=8)
    plane.text(10.6, 3.9, "Two have that tap: it\ngets their gradients.", va="center", fontsize=8)
    plane.text(7.0, 5.2, "DEAD (255) where the maximum is not above 0", fontsize=8)
    return whole


@figure
def cross_entropy() -> Figure:
    """A row in tiles of classes, and the statistics of its lanes."""
    whole, plane = canvas(7, 2.8)
    for tile in range(3):
        for row in range(2):
            for lane in range(4):
                x = 1.8 + 3.0 * tile + 0.65 * lane
                cell(plane, x, 0.9 + 0.65 * row, 0.65, 0.65, (BLUE, ORANGE, GREEN)[tile], f"x{4 * tile + lane}", 7)
        plane.text(3.1 + 3.0 * tile, 0.6, f"tile {tile}", ha="center", fontsize=8)
        if tile < 2:
            arrow(plane, (4.45 + 3.0 * tile, 1.55), (4.75 + 3.0 * tile, 1.55))
    plane.text(0.4, 1.55, "a program's\nrows", va="center", fontsize=8)
    for lane in range(4):
        cell(plane, 4.2 + 1.2 * lane, 3.0, 1.2, 0.6, GREY, "m, e, d, T", 7)
    plane.text(0.4, 3.3, "each lane, over all tiles:", va="center", fontsize=8)
    arrow(plane, (6.6, 2.25), (6.6, 2.95))
    arrow(plane, (6.6, 3.65), (6.6, 4.35))
    cell(plane, 4.6, 4.4, 4, 0.7, RED, "log-sum-exp and loss of a row")
    plane.text(9.3, 3.3, "a new maximum scales e and moves d", va="center", fontsize=8)
    plane.text(9.0, 4.75, "one number a row is kept for backward", va="center", fontsize=8)
    return whole


@figure
def linear_cross_entropy() -> Figure:
    """Shares of the classes forward, blocks of the logits' gradient backward."""
    whole, plane = canvas(7, 3.5)
    plane.text(0.6, 0.5, "forward: no logit is written", fontsize=9)
    for block in range(4):
        for tile in range(6):
            x, y = 0.6 + 0.75 * tile + 0.25 * (tile // 3), 1.2 + 0.75 * block
            cell(plane, x, y, 0.75, 0.75, (BLUE, ORANGE)[tile // 3] if block == 1 else GREY)
    plane.text(0.6, 0.95, "rows x classes, in two shares", fontsize=8)
    for share in range(2):
        arrow(plane, (1.7 + 2.5 * share, 2.75), (1.7 + 2.5 * share, 4.75))
        cell(plane, 0.65 + 2.5 * share, 4.8, 2.1, 0.6, (BLUE, ORANGE)[share], "m, e, d, T, z at y", 7)
        arrow(plane, (1.7 + 2.5 * share, 5.45), (2.95, 5.95))
    cell(plane, 1.7, 6.0, 2.5, 0.6, RED, "merged: the loss")
    plane.text(7.4, 0.5, "backward: a block at a time, within the budget", fontsize=9)
    for block in range(2):
        for part in range(3):
            own = (block, part) == (0, 1)
            text = "gz" if own else ""
            cell(plane, 7.4 + 1.5 * part, 1.2 + 1.5 * block, 1.5, 1.5, ORANGE if own else GREY, text, 10)
    plane.text(7.4, 0.95, "gradient of the logits", fontsize=8)
    cell(plane, 12.1, 1.55, 1.6, 0.8, BLUE, "gx += gz w", 7)
    arrow(plane, (10.4, 1.95), (12.05, 1.95))
    cell(plane, 8.85, 5.0, 1.7, 0.8, GREEN, "gw += gz' x", 7)
    arrow(plane, (9.65, 2.7), (9.65, 4.95))
    plane.text(11.0, 5.4, "sums in float32,\nrounded once", va="center", fontsize=8)
    return whole


def draw(folder: Path, kind: str = "svg") -> None:
    """Write all pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            make().savefig(folder / f"{name}.{kind}", metadata={"Date": None} if kind == "svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), *sys.argv[2:])
