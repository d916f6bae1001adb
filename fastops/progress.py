"""Progress bars."""

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], total: int, describe: Callable[[T], str]) -> Iterator[T]:
    """The items, with a bar on stderr that says which of them is at work, if that is a terminal and rich is there."""
    if not (sys.stderr.isatty() and find_spec("rich")):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Lines that are printed meanwhile appear above the bar; if they go elsewhere they are left alone.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        bar = bars.add_task("", total=total)
        for item in items:
            bars.update(bar, description=describe(item))
            yield item
            bars.advance(bar)
