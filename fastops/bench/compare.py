"""Whether fastops became slower since an earlier run: its ratios to eager, which a slower machine does not change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastops.cli import CommandError

from .contestants import OURS, OURS_COMPILED
from .measure import Row

SCHEMA: Final = 2
MARGIN: Final = 1.15  # two processes place the same tensors and code differently in memory
FEWEST_TURNS: Final = 15  # of which nearly all must be slower than nearly all of the other run's
MAY_DIFFER: Final = ("fastops",)


class Change(NamedTuple):
    """A row that changed clearly."""

    old: Mapping[str, Any]
    new: Mapping[str, Any]

    def __str__(self) -> str:
        old, new = self
        way = f", way {old['way'] or '-'} then {new['way'] or '-'}" if old["way"] != new["way"] else ""
        return (
            f"{new['case']}, {new['contestant']}: {old['ratio']:.2f} ({_shown(old)}) of eager's time then, "
            f"{new['ratio']:.2f} ({_shown(new)}) now{way}"
        )


class Comparison(NamedTuple):
    """What is clearly slower or faster; how many rows were judged, and how many not: few turns, or in one run alone."""

    slower: list[Change]
    faster: list[Change]
    judged: int
    unjudged: int


def _shown(row: Mapping[str, Any]) -> str:
    low, high = row["spread"]
    return f"{low:.2f} - {high:.2f}"


def content(
    environment: Mapping[str, Any], rows: Sequence[Row], left_out: Sequence[Any], rates: Mapping[str, float]
) -> dict[str, Any]:
    """What a file has, as JSON has it."""
    found = {
        "schema": SCHEMA,
        "environment": environment,
        "peaks": rates,
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def text_of(found: Mapping[str, Any]) -> str:
    """The text of a file, with a line for each row."""
    head = json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(row)}" for row in found["rows"])
    return f'{head},\n "rows": [\n{rows}\n ]\n}}\n'


def read(path: Path, environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run. `CommandError` unless it was of this schema and in this environment."""
    try:
        found = json.loads(path.read_text())
        schema = found.get("schema", 1)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{path} is no file of `fastops bench --json`") from error
    if schema != SCHEMA:
        raise CommandError(f"{path} has schema {schema}, and this version compares schema {SCHEMA}: measure it again")
    try:
        old, rows = found["environment"], found["rows"]
        names = [name for name in {**environment, **old} if name not in MAY_DIFFER]
        for row in rows:
            _check(Row(**row))
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is no file of `fastops bench --json`") from error
    others = [f"{n} {old.get(n)!r} and {environment.get(n)!r}" for n in names if old.get(n) != environment.get(n)]
    if others:
        raise CommandError(f"{path} is of another environment: {'; '.join(others)}")
    return list(rows)


def _check(row: Row) -> None:
    """Raise `ValueError` if what is compared of a row is of another type than it is written with."""
    words, numbers = (row.case, row.contestant, row.dtype), [row.ratio, row.turns, *(row.spread or (0, 0))]
    if not all(isinstance(word, str) for word in words) or len(numbers) != 4:
        raise ValueError
    if not all(isinstance(number, (int, float)) and number >= 0 for number in numbers):
        raise ValueError


def key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What is the same in two runs."""
    return row["case"], row["contestant"], row["dtype"]


def compare(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> Comparison:
    """The rows of fastops in both runs. One changed if its medians and nearly all turns of both agree about that."""
    ours = (OURS, OURS_COMPILED)
    before, now = ({key(row): row for row in rows if row["contestant"] in ours} for rows in (old, new))
    both = [Change(before[one], now[one]) for one in before if one in now]
    judged = [pair for pair in both if all(row["spread"] and row["turns"] >= FEWEST_TURNS for row in pair)]
    slower = [pair for pair in judged if _clearly_more(pair.new, pair.old)]
    faster = [pair for pair in judged if _clearly_more(pair.old, pair.new)]
    return Comparison(slower, faster, len(judged), len(now) - len(judged))


def _clearly_more(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["spread"][0] > other["spread"][1] and one["ratio"] > MARGIN * other["ratio"])
