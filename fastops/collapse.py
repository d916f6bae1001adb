"""Makes one line of rows that differ in numbers alone: ``layer{1-4}.{0,1}.conv{1,2}``."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

_Cells = tuple[str, str, str]  # name, layer and outcome


def collapsed(rows: Iterable[_Cells]) -> list[_Cells]:
    """The rows in their order: those with one layer and outcome, and names alike, as one.

    A name in braces stands for exactly the names of the rows, each as often as all others of the line.
    """
    alike: dict[tuple[tuple[str, ...], str, str], Counter[tuple[str, ...]]] = {}
    for name, layer, outcome in rows:
        parts = re.split("([0-9]+)", name)  # words and numbers in turns
        alike.setdefault((tuple(parts[::2]), layer, outcome), Counter())[tuple(parts[1::2])] += 1
    lines = []
    for (words, layer, outcome), numbers in alike.items():
        for times in dict.fromkeys(numbers.values()):
            for sets in _products([each for each in numbers if numbers[each] == times]):
                name = words[0] + "".join(map("".join, zip(map(_braces, sets), words[1:], strict=True)))
                count = times * math.prod(map(len, sets))
                lines.append((name, layer, f"{outcome} ({count} alike)".lstrip() if count > 1 else outcome))
    return lines


def _products(tuples: list[tuple[str, ...]]) -> Iterator[tuple[list[str], ...]]:
    """Lists whose products are the tuples, each of them once."""
    if not tuples[0]:
        yield ()
        return
    rests = dict[str, list[tuple[str, ...]]]()
    for first, *rest in tuples:
        rests.setdefault(first, []).append(tuple(rest))
    same = dict[tuple[tuple[str, ...], ...], list[str]]()
    for first, found in rests.items():
        same.setdefault(tuple(found), []).append(first)
    for found_rest, firsts in same.items():
        for others in _products(list(found_rest)):
            yield firsts, *others


def _braces(numbers: list[str]) -> str:
    """``3`` or ``{0,1,5-9}``."""
    runs = list[list[str]]()
    for number in numbers:
        if runs and number == str(int(last := runs[-1][-1]) + 1).zfill(len(last)):
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = itertools.chain(*(run if len(run) < 3 else [f"{run[0]}-{run[-1]}"] for run in runs))
    return numbers[0] if len(numbers) == 1 else f"{{{','.join(parts)}}}"
