"""Tables keep their figures however narrow the terminal is, and progress bars keep out of what is printed."""

import io
import sys
from collections.abc import Callable

import pytest

from fastops.cli import audit
from fastops.cli.table import PIPED, Table
from fastops.progress import tracked

COLUMNS = {"group": 20, "name": 60, "one": -8, "two": -8, "words": 40}
CELLS = ["the group", "a name " * 8, "12345.67", "9.876e-5", "what else there is to say"]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """What is printed for two equal rows on so many columns, or into a pipe."""

    def printed(width: int | None) -> list[str]:
        monkeypatch.delenv("COLUMNS", raising=False)
        if width is not None:
            monkeypatch.setenv("COLUMNS", str(width))
        table = Table(COLUMNS, shared=1)
        for _ in range(2):
            table.row(CELLS)
        return capsys.readouterr().out.splitlines()

    return printed


@pytest.mark.parametrize("width", [60, 80, None])
def test_narrow(lines: Callable[[int | None], list[str]], width: int | None) -> None:
    """The group is said once; words go on in the next line; every figure is whole, and below its heading."""
    printed = lines(width)
    assert max(map(len, printed)) <= (width or PIPED)
    assert printed.count("the group") == 1
    text = " ".join(printed).split()
    assert text.count("12345.67") == text.count("9.876e-5") == 2
    assert text.count("name") == 1 + 2 * 8 and text.count("say") == 2
    (heading,) = (line for line in printed if " one " in line)
    assert {line.index("12345.67") + 8 for line in printed if "12345.67" in line} == {heading.index("one") + 3}


def test_wide(lines: Callable[[int | None], list[str]]) -> None:
    heading, rule, *rows = lines(200)
    assert heading.split() == list(COLUMNS) and set(rule) == {"-", " "}
    assert [" ".join(row.split()) for row in rows] == [" ".join(" ".join(CELLS).split())] * 2


def test_audit_fits_a_piped_page() -> None:
    own = list(audit.COLUMNS.items())[audit.SHARED :]
    assert sum(abs(width) or len(name) for name, width in own) + 2 * (len(own) - 1) <= PIPED


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_bar_is_on_stderr_and_only_for_a_terminal(
    kind: type[io.StringIO], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr := kind())
        for word in tracked("ab", 2, str.upper):
            print(word)
    assert capsys.readouterr() == ("a\nb\n", "")
    shown = stderr.getvalue()
    assert "B" in shown if kind is Terminal else not shown
