"""Tables printed row by row while a command works, with nothing but the standard library."""

from collections.abc import Sequence


class Table:
    """Prints its headings at once and each row as it comes. A negative width aligns its column to the
    right, 0 is that of the heading."""

    def __init__(self, columns: dict[str, int]) -> None:
        self.widths = [width or len(name) for name, width in columns.items()]
        self.row(list(columns))
        self.row(["-" * abs(width) for width in self.widths])

    def row(self, cells: Sequence[str]) -> None:
        """Print one line of the table."""
        padded = [
            cell.rjust(-width) if width < 0 else cell.ljust(width)
            for cell, width in zip(cells, self.widths, strict=True)
        ]
        print("  ".join(padded).rstrip(), flush=True)


class MarkdownTable(Table):
    """The same in Markdown."""

    def row(self, cells: Sequence[str]) -> None:
        """Print one line of the table."""
        padded = (cell.ljust(abs(width)) for cell, width in zip(cells, self.widths, strict=True))
        print(f"| {' | '.join(padded)} |", flush=True)
