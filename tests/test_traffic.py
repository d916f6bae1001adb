"""Counted bytes and launches: that the page shows what the script prints, and what must hold of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_counting

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def printed() -> str:
    done = run_counting(ROOT / "bench" / "traffic.py")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_shows_what_the_script_prints(printed: str) -> None:
    assert printed in (ROOT / "docs" / "traffic.md").read_text()


def test_bytes_and_launches(printed: str) -> None:
    """In passes over the largest tensor where an operation does little else, in MB beside eager's elsewhere."""
    table: dict[str, list[float]] = {}
    for line in printed.splitlines()[2:]:
        name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        table[name] = [float(number) for number in numbers]
    eager, ours, *_ = table["Cross-entropy, 256 x 4096"]
    logits = 256 * 4096 * 4 / 1e6
    assert (eager / logits > 7.9) and ours / logits <= 3.05
    eager, ours, *_ = table["MSE, 512 x 2048"]
    assert ours / (512 * 2048 * 4 / 1e6) <= 5.05
    for name in table:
        if "and ReLU" in name:
            assert table[name][1] < table[name][0]
    assert table["Linear and ReLU, 512 x 1024 to 768"][1] <= 25.6
    (conv,) = (numbers for name, numbers in table.items() if name.startswith("Convolution and ReLU"))
    assert conv[1] <= 15.0 and conv[4] <= 6
    assert table["FashionMLP, a training step at batch 64"][4] <= 14
    lenet = table["LeNet, a training step at batch 8"]
    assert lenet[1] <= 4.5 and lenet[4] <= 32
