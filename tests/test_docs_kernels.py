"""The pages of the kernels: their pictures can be read, and their tables are what `bench/kernel_traffic.py` counts."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
import triton
import triton.language as tl
from forked import run_counting
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from fastops.kernels.matmul import tile_of_program

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "kernels").glob("*.md"))}
IMAGES = re.compile(r"!\[([^\]]*)\]\(\.\./_build/figures/(\w+)\.svg\)")


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    found = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with matplotlib.rc_context(module.STYLE):
        yield module


def luminance(color: str) -> float:
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    """As the Web Content Accessibility Guidelines have it."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_pages_show_each_picture_once_and_say_what_it_shows(figures: ModuleType) -> None:
    shown = [image for text in PAGES.values() for image in IMAGES.findall(text)]
    assert Counter(name for _, name in shown) == Counter(figures.FIGURES.keys())
    assert all(len(words) > 40 for words, _ in shown)
    assert sum(text.count("![") for text in PAGES.values()) == len(shown)


def test_pictures_are_the_same_each_time(figures: ModuleType, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        figures.draw(tmp_path / folder)
    for name in figures.FIGURES:
        one, other = ((tmp_path / folder / f"{name}.svg").read_bytes() for folder in ("one", "other"))
        assert one == other
        assert ElementTree.fromstring(one).tag.endswith("svg")


def test_words_can_be_read_on_every_ground(figures: ModuleType) -> None:
    """Each picture has a ground of its own, so what is around it does not count."""
    grounds = figures.GROUND, figures.BLUE, figures.ORANGE, figures.GREEN, figures.RED, figures.GREY
    assert all(contrast(figures.INK, ground) >= 7 for ground in grounds)
    assert all(contrast(line, figures.GROUND) >= 3 for line in figures.LINES)
    for make in figures.FIGURES.values():
        whole = make()
        assert to_rgb(whole.get_facecolor()) == to_rgb(figures.GROUND)
        assert all(to_rgb(text.get_color()) == to_rgb(figures.INK) for text in whole.findobj(Text) if text.get_text())


def test_no_word_is_cut_off_or_runs_into_another(figures: ModuleType) -> None:
    for name, make in figures.FIGURES.items():
        whole = make()
        canvas = FigureCanvasAgg(whole)
        canvas.draw()
        edge, renderer = whole.bbox, canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for plane in whole.axes for text in plane.texts if text.get_text()]
        for box in boxes:
            assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1, name
        for one, other in product(boxes, boxes):
            assert one is other or not one.overlaps(other), name
        for patch in whole.findobj(Rectangle):  # a word that begins in a cell ends in it
            cell = patch.get_window_extent(renderer)
            for box in boxes:
                middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
                if cell.contains(*middle) and cell.width < edge.width and patch.get_fill():
                    assert cell.x0 <= box.x0 and box.x1 <= cell.x1, name


@triton.jit
def order_kernel(place_ptr, M, N, GROUP_M: tl.constexpr):
    row, column = tile_of_program(tl.program_id(0), M, N, 1, 1, GROUP_M)
    tl.store(place_ptr + row * N + column, tl.program_id(0))


def test_order_of_tiles_on_the_page_is_the_kernels(figures: ModuleType) -> None:
    (block,) = re.findall(r"^```python\n(def tile_of_program.*?)^```$", PAGES["linear"], re.MULTILINE | re.DOTALL)
    exec(block, own := {})
    for rows, columns, group in ((20, 32, 8), (6, 6, 3), (7, 3, 4), (1, 5, 8)):
        place = torch.full((rows, columns), -1)
        order_kernel[(rows * columns,)](place, rows, columns, GROUP_M=group)
        for of_page in (own["tile_of_program"], figures.tile_of_program):
            found = [of_page(program, rows, columns, group) for program in range(rows * columns)]
            assert [place[each].item() for each in found] == list(range(rows * columns))


def test_tables_are_what_is_counted() -> None:
    done = run_counting(ROOT / "bench" / "kernel_traffic.py")
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^(\w+)\n((?:\|.*\n)+)", done.stdout, re.MULTILINE)
    tables = re.compile(r"^\| forward and backward, float32 \|.*\n\|[-|]*\|\n((?:\|.*\n)+)", re.MULTILINE)
    assert sorted(printed) == [(page, rows) for page, text in PAGES.items() for rows in tables.findall(text)]
    assert len(printed) == 8
