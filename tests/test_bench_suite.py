"""The suite of `bench/` under pytest-benchmark, its fixture for models of one's own, and the script of host times."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_python

from fastops.bench import cases
from fastops.bench.cases import CASES
from fastops.bench.contestants import EAGER, OURS

ROOT = Path(__file__).resolve().parent.parent


def test_host_time_is_measured() -> None:
    """Every row says how long eager and fastops took, in that order, and the ratio."""
    process = run_python([ROOT / "bench" / "host_time.py", "--pairs", "1"])
    assert process.returncode == 0, process.stderr
    rows = [line.split() for line in process.stdout.splitlines()]
    assert [row[0] for row in rows] == ["triton"] * 3 + ["torch"] * 3
    assert all(float(row[-1]) > 0 and float(row[-4]) > 0 for row in rows)


def pytest_process(*words: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark times nothing, and writes no file, where a variable of pytest-xdist is set.
    left_out = ("TRITON_INTERPRET", "FASTOPS_BACKEND", "PYTEST_XDIST_WORKER")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    options = ("-p", "no:cacheprovider", "-p", "no:randomly", "-q")  # rows are in the order of the suite
    return run_python(["-m", "pytest", *options, *words], cwd=cwd, env=environment | settings)


SHORT = ("--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-warmup=off")


def saved_rows(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By group and contestant."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in json.loads(file.read_text())["benchmarks"]:
        (contestant,) = (p for n, p in row["params"].items() if n in ("contestant", "fastops_compare"))
        groups.setdefault(row["group"], {})[contestant] = row
    return groups


def is_a_cpus(way: str) -> bool:
    """Whether a call can have gone this way on a CPU: on some processors large products gain from oneDNN."""
    return set(way.split("+")) <= {"onednn", "torch"}


def test_suite_runs(tmp_path: Path) -> None:
    """And plots what it timed where the extra bench is installed as a whole."""
    file = tmp_path / "out.json"
    chosen = "(mse_loss/64x10 or TwoLayerNet-64) and not compile and not fp16"
    plot = [f"--benchmark-histogram={tmp_path}/plot"] if find_spec("pygal") else []
    process = pytest_process("bench", "-k", chosen, *SHORT, f"--benchmark-json={file}", *plot)
    assert process.returncode == 0, process.stdout + process.stderr
    groups = saved_rows(file)
    names = [f"mse_loss/64x10/{kind}" for kind in ("forward", "backward", "forward+backward")]
    names += [f"TwoLayerNet-64/{kind}" for kind in ("step", "inference")]
    assert set(groups) == {f"{name}-{dtype}" for name in names for dtype in ("fp32", "bf16")}
    for group, rows in groups.items():
        assert list(rows) == [EAGER, OURS]  # attorch is skipped where it is not installed
        case, _, dtype = group.rpartition("-")
        assert rows[OURS]["params"] == {"case": case, "dtype": dtype, "contestant": OURS}
        info = rows[OURS]["extra_info"]
        assert is_a_cpus(info["way"]) and info["bytes"] > 0 and info["launches"] > 0 and info["peak_bytes"] > 0
    assert json.loads(file.read_text())["machine_info"]["torch"] == torch.__version__
    assert len(list(tmp_path.rglob("*.svg"))) == len(groups) * len(plot)


def test_suite_has_every_case() -> None:
    process = pytest_process("bench", "--collect-only")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = [f"[{case.name}-{dtype}-{c}]" for case in CASES for dtype in cases.DTYPES for c in case.contestants]
    assert all(row in process.stdout for row in rows)
    assert f"{len(rows)} tests collected" in process.stdout


def test_suite_refuses_the_interpreter() -> None:
    process = pytest_process("bench", "--collect-only", TRITON_INTERPRET="1")
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        process.stderr.strip()
        == "ERROR: Triton's interpreter is on, and its times mean nothing: unset TRITON_INTERPRET"
    )


def test_test_run_leaves_the_suite_out(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


def page_block() -> str:
    """The test file that docs/benchmarks.md shows."""
    blocks = (ROOT / "docs" / "benchmarks.md").read_text().split("```python\n")[1:]
    (block,) = (text.partition("```")[0] for text in blocks if "fastops_compare" in text)
    return block


def test_fixture_for_models_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(page_block())
    file = tmp_path / "out.json"
    process = pytest_process("test_mine.py", "-k", "not compile", *SHORT, f"--benchmark-json={file}", cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    groups = saved_rows(file)
    assert {name: list(rows) for name, rows in groups.items()} == {
        "test_step-8": [EAGER, OURS],
        "test_step-64": [EAGER, OURS],
        "test_inference": [EAGER, OURS],
    }
    assert all(is_a_cpus(rows[OURS]["extra_info"]["way"]) for rows in groups.values())


def test_fixture_skips_what_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(page_block())
    process = pytest_process(
        *("test_mine.py", "-rs", "-k", "inference and compile", *SHORT),
        cwd=tmp_path,
        TORCHDYNAMO_DISABLE="0",
        CXX="/no",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "SKIPPED" in process.stdout
