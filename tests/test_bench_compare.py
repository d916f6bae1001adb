"""``fastops bench --compare``: what became slower is flagged, two runs of the same code are not."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fail
from torch import Tensor

import fastops.functional as FF
from fastops.bench import cases, measure
from fastops.bench.compare import FEWEST_TURNS, MARGIN, compare, content, key, text_of
from fastops.bench.measure import SPREAD, Measured, Row
from fastops.cli import bench, main
from fastops.ops import OPS

CASE = "mse_loss/64x10/forward"
Rows = list[dict[str, Any]]


def row(ratios: np.ndarray, case: str = CASE, contestant: str = "fastops", way: str = "torch") -> dict[str, Any]:
    """As a run with these ratios would have it."""
    points = np.quantile(ratios, [SPREAD[0], 0.25, 0.5, 0.75, SPREAD[1]])
    low, lower, median, upper, high = (float(value) for value in points)
    found = Row(case, contestant, "float32", way, 1.0, len(ratios), median, (lower, upper), (low, high), "")
    return dict(vars(found))


# Noise ----------------------------------------------------------------------------------------------------------------


def noisy(generator: np.random.Generator, level: float, turns: int) -> np.ndarray:
    """Ratios of the shape that a shared machine gives: two tails, bursts in which one contestant shares its core for
    some turns, a drift that does not cancel, and a level that differs a little between two processes."""
    sigma = generator.choice([0.02, 0.05, 0.1, 0.2])
    ratios = np.exp(sigma * generator.standard_t(3, turns))
    if generator.random() < 0.5:
        start = generator.integers(turns)
        ratios[start : start + generator.integers(1, max(2, turns // 4))] *= generator.choice([0.55, 1.8])
    drift = np.linspace(0, generator.normal(0, sigma), turns)
    return np.asarray(level * generator.normal(1, 0.015) * ratios * np.exp(drift))


@pytest.mark.parametrize("turns", [FEWEST_TURNS, 21, 50])
def test_two_runs_of_the_same_code_are_silent(turns: int) -> None:
    """Fifty comparisons of a hundred rows, with what looks slower measured again, as the command does."""
    generator = np.random.default_rng(turns)
    levels = generator.uniform(0.3, 2.0, 100)
    alarms = 0
    for _ in range(50):
        old, new = ([row(noisy(generator, level, turns), str(i)) for i, level in enumerate(levels)] for _ in range(2))
        for change in compare(old, new).slower:
            again = noisy(generator, levels[int(change.new["case"])], turns)
            alarms += len(compare([change.old], [row(again, change.new["case"])]).slower)
    assert alarms <= 1  # of 5000 rows


@pytest.mark.parametrize("turns", [15, 50])
def test_what_is_twice_as_slow_is_found(turns: int) -> None:
    generator = np.random.default_rng(turns)
    sigma = 0.1
    for _ in range(200):
        old, new = (level * np.exp(sigma * generator.standard_normal(turns)) for level in (0.9, 1.8))
        found = compare([row(old)], [row(new)])
        assert len(found.slower) == 1 and not found.faster
        assert len(compare([row(new)], [row(old)]).faster) == 1


# Rules ----------------------------------------------------------------------------------------------------------------

STEADY = np.full(15, 1.0)


@pytest.mark.parametrize(
    ("new", "slower", "faster", "judged"),
    [
        (row(STEADY * 1.2), 1, 0, 1),
        (row(STEADY / 1.2), 0, 1, 1),
        (row(STEADY * (MARGIN - 0.01)), 0, 0, 1),  # disjoint, and within the margin
        (
            row(np.concatenate([STEADY[:12] * 1.5, STEADY[12:]])),
            0,
            0,
            1,
        ),  # a fifth of the turns is as before
        (row(STEADY[: FEWEST_TURNS - 1] * 2), 0, 0, 0),
        (row(STEADY * 2, case="another"), 0, 0, 0),
        (row(STEADY * 2, contestant="torch.compile"), 0, 0, 0),
        (row(STEADY * 2) | {"dtype": "bfloat16"}, 0, 0, 0),
        (row(STEADY * 2) | {"spread": None}, 0, 0, 0),
        (row(STEADY * 2, way="onednn"), 1, 0, 1),
    ],
)
def test_rules(new: dict[str, Any], slower: int, faster: int, judged: int) -> None:
    found = compare([row(STEADY)], [new])
    assert (len(found.slower), len(found.faster), found.judged) == (slower, faster, judged)


def test_a_change_says_both_ratios_and_ways() -> None:
    (change,) = compare([row(STEADY, way="onednn")], [row(STEADY * 2)]).slower
    assert str(change) == (
        f"{CASE}, fastops: 1.00 (1.00 - 1.00) of eager's time then, 2.00 (2.00 - 2.00) now, way onednn then torch"
    )
    (change,) = compare([row(STEADY)], [row(STEADY * 2)]).slower
    assert "way" not in str(change)


# The command ----------------------------------------------------------------------------------------------------------

WORDS = ("bench", "--case", CASE, "--device", "cpu", "--contestant", "fastops")


@pytest.fixture
def old(tmp_path: Path, no_interpreter: None) -> Path:
    """The file of a real run, of 15 turns."""
    file = tmp_path / "old.json"
    assert main([*WORDS, "--pairs", "15", "--json", str(file)]) == 0
    return file


def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that sleeps, where the cases find it."""
    original = FF.mse_loss

    def slow(*words: Any, **options: Any) -> Tensor:
        time.sleep(0.002)
        return original(*words, **options)

    monkeypatch.setattr(FF, "mse_loss", slow)
    example = OPS["mse_loss"].timed[0]
    monkeypatch.setattr(
        bench, "CASES", [cases._op_case(OPS["mse_loss"], example, part) for part in (cases.FORWARD, cases.BOTH)]
    )


def test_an_op_that_sleeps_is_flagged(
    no_interpreter: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock that only sleeping moves on, and 10 microseconds for each call: no other program can disturb it."""
    slept = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(slept[-1] + seconds))

    def timed(calls: dict[str, Any], turns: int, *_: object) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for name in list(calls) * turns:
            start = slept[-1]
            calls[name]()
            times[name].append(1e-5 + slept[-1] - start)
        return times

    monkeypatch.setattr(measure, "timed", timed)
    old, page = tmp_path / "old.json", tmp_path / "page.html"
    assert main([*WORDS, "--pairs", "15", "--json", str(old)]) == 0
    assert main([*WORDS, "--pairs", "15", "--compare", str(old)]) == 0
    slowed(monkeypatch)
    capsys.readouterr()
    assert main([*WORDS, "--pairs", "15", "--compare", str(old), "--html", str(page)]) == 1
    printed = capsys.readouterr().out
    assert f"SLOWER {CASE}, fastops: " in printed and f"SLOWER {CASE}+backward, fastops: " in printed
    assert f"beside {old}: 2 slower, 0 faster, 2 rows judged, 0 not" in printed
    assert f"Slower than then: {CASE}, fastops: " in page.read_text()


def test_slower_once_is_measured_again(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another program did to one measurement, it does not do to the next."""
    runs: list[str] = []
    ratios = {1: STEADY * 50, 2: STEADY * 50, 3: STEADY * 50}

    def measured(case: cases.Case, *_: object) -> Measured:
        runs.append(case.name)
        return Measured([Row(**row(ratios.get(len(runs), STEADY), case.name))], {})

    saved = json.loads(old.read_text())
    saved["rows"] = [row(STEADY, case) for case in (CASE, f"{CASE}+backward")]
    old.write_text(json.dumps(saved))
    monkeypatch.setattr(bench, "measure", measured)
    capsys.readouterr()
    assert main([*WORDS, "--compare", str(old)]) == 1
    assert runs == [CASE, f"{CASE}+backward"] * 2
    assert "1 slower" in capsys.readouterr().out
    runs[:] = []
    ratios.pop(3)
    assert main([*WORDS, "--compare", str(old)]) == 0
    assert "0 slower" in capsys.readouterr().out


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_environment_is_refused_with_what_differs(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(old.read_text())["environment"]
    edited(old, environment=facts | {"threads": 99, "fastops": "0.0.1"} | {"driver": "one"})
    line = fail(capsys, *WORDS, "--compare", str(old))
    threads = torch.get_num_threads()
    assert line == (f"fastops: error: {old} is of another environment: threads 99 and {threads}; driver 'one' and None")


def test_another_version_of_fastops_is_compared(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads(old.read_text())["environment"] | {"fastops": "0.0.1"}
    edited(old, environment=facts, rows=[row(STEADY, case) for case in (CASE, f"{CASE}+backward")])
    monkeypatch.setattr(bench, "measure", lambda case, *_: Measured([Row(**row(STEADY, case.name))], {}))
    capsys.readouterr()
    assert main([*WORDS, "--compare", str(old)]) == 0
    assert "0 slower, 0 faster, 2 rows judged, 0 not" in capsys.readouterr().out


def with_row(**wrong: Any) -> str:
    return json.dumps({"schema": 2, "environment": {}, "rows": [row(STEADY) | wrong]})


WRONG: list[tuple[str, Any]] = [("turns", "y"), ("spread", [1]), ("spread", ["a", 1]), ("ratio", None), ("case", ["a"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read {file}: No such file or directory"),
        ("{", "{file} is no file of `fastops bench --json`"),
        ("[]", "{file} is no file of `fastops bench --json`"),
        ('{"environment": {}, "measurements": []}', "{file} has schema 1, and this version compares schema 2: "),
        ('{"schema": 3}', "{file} has schema 3, and this version compares schema 2: measure it again"),
        ('{"schema": 2}', "{file} is no file of `fastops bench --json`"),
        ('{"schema": 2, "environment": {}, "rows": [{}]}', "{file} is no file of `fastops bench --json`"),
        ('{"schema": 2, "environment": [], "rows": []}', "{file} is no file of `fastops bench --json`"),
        ('{"schema": 2, "environment": {}, "rows": 3}', "{file} is no file of `fastops bench --json`"),
        *((with_row(**{name: wrong}), "{file} is no file of `fastops bench --json`") for name, wrong in WRONG),
    ],
)
@pytest.mark.usefixtures("no_interpreter")
def test_files_that_cannot_be_compared(
    text: str | None, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    assert fail(capsys, *WORDS, "--compare", str(file)).startswith(f"fastops: error: {message.format(file=file)}")


def test_files_without_a_common_row_are_refused_at_once(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fail(capsys, *WORDS, "--compare", str(old), "--dtype", "bf16")
    assert line == f"fastops: error: {old} has none of these cases in bfloat16"
    words = [*WORDS[:2], "add_relu", *WORDS[3:]]
    assert fail(capsys, *words, "--compare", str(old)) == f"fastops: error: {old} has none of these cases in float32"


def test_what_is_written_is_what_is_compared() -> None:
    """JSON has lists where a row has tuples."""
    rows = [Row(**row(STEADY)), replace(Row(**row(STEADY)), case="another", spread=None)]
    saved = json.loads(text_of(content({}, rows, [], {})))
    assert saved == content({}, rows, [], {})
    assert [key(one) for one in saved["rows"]] == [key(vars(one)) for one in rows]
    assert compare(saved["rows"], [vars(one) for one in rows]) == ([], [], 1, 1)
