"""The picture on the README's first screen shows the figures of the table below it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def overview() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "overview.py"))


def test_the_picture_is_what_the_script_draws(overview: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "overview.svg").read_text() == overview["drawn"]()


def test_its_figures_are_those_of_the_table(overview: dict[str, Any]) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    table = [
        line for line in lines if (line.startswith("| ") and "python bench/" in line) or "`fastops bench --case" in line
    ]
    assert len(table) == 5
    for _, eager, ours, ratio in overview["ROWS"]:
        (line,) = (line for line in table if f"**{ours}**" in line or f"in {ours} of" in line)
        assert eager in line and 0 < ratio < 1
