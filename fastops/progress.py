"""Progress bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr while the block runs, if that is a terminal.

    Gives what is called at the beginning of each of the ``total`` steps, with what it is about.
    """
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Lines that are printed meanwhile appear above the bar; if they go elsewhere they are left alone.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        bar, begun = bars.add_task("", total=total), iter(range(total + 1))
        yield lambda what: bars.update(bar, completed=next(begun), description=what)
