"""`fastops verify --matrix`, and that docs/matrix.md shows what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastops.cli import matrix
from fastops.ops import OPS as RECORDS

PAGE = (Path(__file__).parents[1] / "docs" / "matrix.md").read_text()
WAYS = ("triton", "onednn", "torch")
IN_EVERY_RUN = ("linear_relu", "conv_relu2d", "mse_loss", "cross_entropy")
OPS = [pytest.param(op, marks=() if op in IN_EVERY_RUN else pytest.mark.nightly, id=op) for op in RECORDS]
Tables = dict[str, dict[str, dict[str, str]]]


def tables(text: str) -> Tables:
    """What Markdown says: by family, operation and property."""
    found: Tables = {}
    family, heading = "", []
    for line in text.partition(" cells: ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("**"):
            family, heading = line.strip("*"), []
            found[family] = {}
        elif line.startswith("|") and not heading:
            heading = cells
        elif line.startswith("|") and not cells[0].startswith("-"):
            found[family][cells[0]] = dict(zip(heading[1:], cells[1:], strict=True))
    return found


def test_the_page_has_every_cell() -> None:
    page = tables(PAGE)
    assert {family: list(properties) for family, properties in matrix.FAMILIES.items()} == {
        family: list(next(iter(rows.values()))) for family, rows in page.items() if family != "ways"
    }
    assert all(list(rows) == list(RECORDS) for rows in page.values())


@pytest.mark.parametrize("op", OPS)
def test_the_page_shows_what_the_command_prints(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = matrix.run([op], WAYS, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert {family: rows[op] for family, rows in tables(printed).items()} == {
        family: rows[op] for family, rows in tables(PAGE).items()
    }


def test_a_defect_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = RECORDS["linear_relu"].gradients

    def wrong(*arguments: Any) -> Any:
        return tuple(2 * gradient for gradient in original(*arguments))

    monkeypatch.setattr(RECORDS["linear_relu"], "gradients", wrong)
    monkeypatch.setattr(matrix, "FAMILIES", {"higher order": matrix.FAMILIES["higher order"]})
    assert matrix.run(["linear_relu"], WAYS, torch.device("cpu")) == 1
    printed = capsys.readouterr().out
    row = tables(printed)["higher order"]["linear_relu"]
    assert row["backward"] == "yes"
    assert row["create_graph"] == "NOT ON triton, onednn"
    assert "FAILED higher order / create_graph / linear_relu / triton: AssertionError" in printed


@pytest.mark.parametrize(("who", "cell"), [("both", "not in torch"), ("torch", "NOT ON triton")])
def test_what_torch_lacks(
    who: str, cell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds if fastops says so too."""

    def lacking(subject: matrix.Subject) -> torch.Tensor:
        raise NotImplementedError("no such derivative")

    ours = lacking if who == "both" else lambda subject: torch.ones(())
    monkeypatch.setattr(matrix, "FAMILIES", {"family": {"property": matrix.Property(ours, lacking)}})
    assert matrix.run(["add_relu"], ["triton"], torch.device("cpu")) == (who == "torch")
    assert tables(capsys.readouterr().out)["family"]["add_relu"]["property"] == cell


def test_one_way_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(matrix, "FAMILIES", {"precision": matrix.FAMILIES["precision"]})
    assert matrix.run(["linear"], ["auto"], torch.device("cpu")) == 0
    assert "2 cells: 2 hold, 0 do not" in capsys.readouterr().out
