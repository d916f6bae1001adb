"""The page of ``fastops bench --html``: the answer first, plots, tables; one file, for phones and in the dark."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastops import html
from fastops.bench.compare import SCHEMA, content
from fastops.bench.measure import Row
from fastops.bench.page import page
from fastops.bench.plots import Point, axis, plot

ROOT = Path(__file__).resolve().parent.parent
STEP = Row(
    "Net-8x3/step",
    "fastops",
    "float32",
    "onednn",
    2.0,
    21,
    0.8,
    (0.78, 0.83),
    (0.7, 0.9),
    "faster",
    1000,
    7,
    4096,
    10**9,
)
HEAD = "linear_cross_entropy/1024x256-{}/forward+backward"


def head(classes: int, contestant: str, peak: int, **changes: Any) -> Row:
    return replace(STEP, case=HEAD.format(classes), contestant=contestant, peak_bytes=peak, **changes)


def made(*rows: Row, peaks: dict[str, float] | None = None, left_out: tuple[Any, ...] = ()) -> str:
    return page(content({"device": "a <b>"}, rows, left_out, peaks or {}))


def eager(row: Row, milliseconds: float = 2.5) -> Row:
    return replace(row, contestant="eager", way="", milliseconds=milliseconds, ratio=1.0, quartiles=(1, 1), verdict="")


def test_the_documents_show_what_was_measured() -> None:
    """As `python docs/benchmark_table.py` writes it, of a file that has every case which it says it measured."""
    script = runpy.run_path(str(ROOT / "docs" / "benchmark_table.py"))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert script["page"](text) == text
    found = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    assert found["schema"] == SCHEMA and all(
        Row(**row).verdict or row["contestant"] == "eager" for row in found["rows"]
    )
    table = script["table"](found)
    models = {row["case"] for row in found["rows"] if row["case"].count("/") == 1}
    assert models and all(f"| {case} | " in table for case in models)


class Checker(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        assert tag == "line"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def whole() -> str:
    """Of a model, of heads, and of a GPU."""
    rows = [STEP, eager(STEP)]
    for classes in (2000, 16000):
        own = head(classes, "fastops", 5 << 20)
        rows += [eager(head(classes, "eager", classes * 4096)), own]
    unknown = {"bytes": "code of a compiler, or of another package, is not seen"}
    rows.append(replace(STEP, contestant="torch.compile", ratio=0.7, bytes=None, launches=None, unknown=unknown))
    left_out = (("Net-8x3/step", "Liger", "it is not <installed>"),)
    return made(*rows, peaks={"copy": 1e12, "float32": 2e13}, left_out=left_out)


def test_it_is_one_well_formed_file(whole: str) -> None:
    checker = Checker()
    checker.feed(whole)
    assert checker.open == []
    assert not re.search(r"(https?:|src=|href=|url\(|@import)", whole)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in whole
    assert "color-scheme: light dark" in whole and "prefers-color-scheme: dark" in whole
    assert "a &lt;b&gt;" in whole and "not &lt;installed&gt;" in whole


def test_nothing_is_wider_than_a_phone(whole: str) -> None:
    """Tables scroll in a box of their own, plots shrink, and words break."""
    assert whole.count("<table>") == whole.count('<div class="wide"><table>') == 2
    assert ".wide { overflow-x: auto }" in whole and "svg { max-width: 100%; height: auto }" in whole
    assert "overflow-wrap: anywhere" in whole


def test_the_answer_comes_first(whole: str) -> None:
    first = whole[whole.index("<body>") : whole.index("<svg")]
    assert '<b class="faster">faster: 1.25 times as fast.</b> Net-8x3/step, float32: 0.80 of eager\'s time' in (
        first.replace("&#x27;", "'")
    )
    assert "half of 21 turns between 0.78 and 0.83; fastest here: torch.compile, 0.70" in first
    assert HEAD.format(2000) not in first  # models are what is asked for


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("unclear", ['<b class="unclear">unclear.</b>', "this run cannot tell"]),
        ("same code", ['<b class="code">same code.</b>', "what looks faster is noise"]),
        ("same code, slower", ["same code, slower: 1.25 times", "fastops took longer to get there"]),
        ("slower", ["slower: 1.25 times as fast", "three quarters of the turns were slower"]),
    ],
)
def test_what_is_not_clear_is_no_speed_up(verdict: str, words: list[str]) -> None:
    text = made(eager(STEP), replace(STEP, verdict=verdict))
    assert all(word in text for word in words)
    assert "faster:" not in text


def test_without_a_model_operations_answer() -> None:
    own = head(2000, "fastops", 10)
    text = made(eager(own), own)
    assert f"</b> {HEAD.format(2000)}, float32" in text[: text.index("<svg")]
    assert "No row." in made()


def test_plots(whole: str) -> None:
    assert whole.count("<svg") == 3
    for title in ("Ratio against size", "Memory of a head against its vocabulary, 1024x256", "Roofline"):
        assert f'aria-label="{title}' in whole
    assert f"{HEAD.format(16000)}, eager: 62.5 MiB" in whole
    assert "Net-8x3/step, fastops: 0.5 TFLOP/s" in whole and "limit: 20 TFLOP/s" in whole


def test_plots_are_absent_where_there_is_nothing_to_plot() -> None:
    assert "Roofline" not in made(eager(STEP), STEP)  # no GPU
    own = head(2000, "fastops", 10)
    assert "Memory of a head" not in made(eager(own), own)  # one size
    assert "<svg" not in made(replace(eager(STEP), bytes=None), replace(STEP, bytes=None))


def test_a_plot_puts_points_where_they_belong() -> None:
    points = [Point(1.0, 0.5, 0.4, 0.6, "a"), Point(100.0, 2.0, 1.9, 2.1, "b <c>")]
    text = plot("Title", axis("x", [1.0, 100.0]), axis("y", [0.4, 2.1]), {"one": points}, level=1.0)
    (x1, y1), (x2, y2) = (map(float, found) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text))
    assert 60 < x1 < x2 < 628 and 24 < y2 < y1 < 274
    assert "b &lt;c&gt;" in text and "stroke-dasharray" in text
    assert axis("x", [1.0, 100.0]).ticks() == [1.0, 10.0, 100.0]
    assert axis("y", [0.4, 2.1]).ticks() == pytest.approx([0.5, 0.7, 1.0, 1.5, 2.0])


DOM = """
const cell = text => ({ textContent: text });
const table = { rows: [] };
const body = { append: row => { table.rows.splice(table.rows.indexOf(row), 1); table.rows.push(row) } };
const row = (...texts) => ({ cells: texts.map(cell), parentNode: body });
table.rows = [row("name", "ms"), row("b", "10.0"), row("a", "9.5"), row("c", "-")];
const heads = [0, 1].map(cellIndex => ({ cellIndex, dataset: {}, closest: () => table }));
const document = { querySelectorAll: () => heads };
"""
CLICKS = """
const order = () => table.rows.map(row => row.cells[0].textContent).join("");
for (const at of [0, 0, 1, 1]) { heads[at].onclick(); console.log(order()) }
"""


def test_a_click_sorts() -> None:
    """By words or numbers, and the other way at a second click; the headings stay."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node to run JavaScript")
    done = subprocess.run([node, "-e", DOM + html.SORT + CLICKS], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == ["nameabc", "namecba", "nameabc", "namecba"]
