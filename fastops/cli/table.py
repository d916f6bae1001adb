"""Tables printed row by row while a command works."""

import os
import sys
from collections.abc import Sequence

PIPED = 120  # columns, where there is no terminal to be as wide as and COLUMNS says nothing


class Table:
    """Prints its headings at once and each row as it comes.

    ``columns``: the width of each, 0 that of its heading. Negative ones have figures, aligned to the right and never
    narrower. The others have words, which go on in the next line where not all fits the terminal. There, so many of the
    first columns as ``shared`` says become a line of their own, above the rows that share them.
    """

    def __init__(self, columns: dict[str, int], shared: int = 0) -> None:
        from rich.console import Console  # here: a command without tables does without rich

        room = Console().width if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED
        widths = [width or len(name) for name, width in columns.items()]
        self._shared = shared if _total(widths) > room else 0
        widths = widths[self._shared :]
        excess, words = max(0, _total(widths) - room), sum(width for width in widths if width > 0)
        self._widths = [
            width if width < 0 else max(min(width, 12), width - -(-excess * width // words)) for width in widths
        ]
        self._above: list[str] = []
        self.row(list(columns))
        self._print(["-" * abs(width) for width in self._widths])

    def row(self, cells: Sequence[str]) -> None:
        """Print one row."""
        above, own = list(cells[: self._shared]), cells[self._shared :]
        if above != self._above:
            print("  ".join(above))
            self._above = above
        self._print(own)

    def _print(self, cells: Sequence[str]) -> None:
        from rich.console import Console
        from rich.table import Table as Grid

        grid = Grid.grid(padding=(0, 2))
        for width in self._widths:
            grid.add_column(width=abs(width), justify="right" if width < 0 else "left", overflow="fold")
        grid.add_row(*cells)
        console = Console(width=_total(self._widths), markup=False, emoji=False, highlight=False)
        with console.capture() as captured:
            console.print(grid)
        print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n", flush=True)


def _total(widths: Sequence[int]) -> int:
    """Columns of a row, with two between its cells."""
    return sum(map(abs, widths)) + 2 * (len(widths) - 1)


class MarkdownTable:
    """The same in Markdown, as wide as it is."""

    def __init__(self, columns: dict[str, int]) -> None:
        self._widths = [abs(width) or len(name) for name, width in columns.items()]
        self.row(list(columns))
        self.row(["-" * width for width in self._widths])

    def row(self, cells: Sequence[str]) -> None:
        """Print one row."""
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        print(f"| {' | '.join(padded)} |", flush=True)
