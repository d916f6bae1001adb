"""Writes what docs/benchmarks.json says into docs/benchmarks.md: `python docs/benchmark_table.py`.

The JSON is of `fastops bench --json`. The table has every model, and the operations that are clearly faster or
slower by at least an eighth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE, FOUND = HERE / "benchmarks.md", HERE / "benchmarks.json"
BEGIN, END = "<!-- of benchmarks.json -->\n", "<!-- end -->"
LEAST = 0.125


def table(found: dict[str, Any]) -> str:
    """In Markdown, below the facts about the machine."""
    facts = found["environment"]
    cells = [("case", "way", "eager ms", "ratio", "quartiles", "verdict"), ("---", "---", "--:", "--:", "---", "---")]
    eager = {row["case"]: row for row in found["rows"] if row["contestant"] == "eager"}
    turns = set()
    for row in found["rows"]:
        model, changed = row["case"].count("/") == 1, abs(row["ratio"] - 1) >= LEAST
        if row["contestant"] == "fastops" and (model or (changed and row["verdict"] not in ("unclear", "same code"))):
            turns.add(row["turns"])
            time = eager[row["case"]]["milliseconds"]
            times = f"{time:.3g}" if time < 1000 else f"{time:.0f}", f"{row['ratio']:.2f}"
            cells.append((row["case"], row["way"], *times, "{:.2f} - {:.2f}".format(*row["quartiles"]), row["verdict"]))
    machine = f"{facts['processor']} ({facts['cpu_capability']}), {facts['threads']} threads, torch {facts['torch']}"
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([f"{machine}, medians of {max(turns)} turns:", "", *lines, ""])


def page(text: str) -> str:
    """The page with the table of now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table(json.loads(FOUND.read_text()))}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
