"""Pages of HTML that need no other file: for a phone and in the dark too, with tables that a click sorts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --good: #0a7a3d; --bad: #b00020 }
@media (prefers-color-scheme: dark) { :root { --good: #5fd38d; --bad: #ff8a94 } }
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
body { overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1em 0; overflow-wrap: normal }
td, th { padding: .2em .7em; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { cursor: pointer } td.number { text-align: right; font-variant-numeric: tabular-nums }
.failed, .slower { color: var(--bad) } .faster { color: var(--good) } svg { max-width: 100%; height: auto }
figure { margin: 1em 0 }
"""
# A click on a heading sorts the rows behind it, by numbers where there are any, and the other way at a second click.
SORT: Final = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table"), at = head.cellIndex, down = head.dataset.down = head.dataset.down ? "" : "1";
  const value = row => { const text = row.cells[at].textContent, number = parseFloat(text);
    return isNaN(number) ? text : number };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  const rows = [...body.rows].slice(1).sort((a, b) => (down ? 1 : -1) * order(value(a), value(b)));
  rows.forEach(row => row.parentNode.append(row));
};
"""


def document(title: str, body: Iterable[str]) -> str:
    """The page."""
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    top = f"{head}{view}<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
    return "\n".join([top, *body, f"<script>{SORT}</script></body></html>\n"])


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Nothing if there are no rows. What begins with a digit is aligned as a number."""
    lines = [f"<tr>{''.join(f'<td{_class(cell)}>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    if not lines:
        return []
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return [f'<div class="wide"><table><tr>{head}</tr>', *lines, "</table></div>"]


def _class(cell: object) -> str:
    text = str(cell)
    name = "number" if text[:1].isdigit() else text.split()[-1] if text.endswith(("faster", "slower")) else ""
    return f' class="{name}"' if name else ""


def listing(title: str, lines: Iterable[str]) -> list[str]:
    """A list that opens; nothing if it is empty."""
    items = [f"<li>{escape(str(line))}</li>" for line in lines]
    if not items:
        return []
    return [f"<details><summary>{escape(title)}: {len(items)}</summary><ul>", *items, "</ul></details>"]
