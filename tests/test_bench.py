"""``fastops bench`` and the suite in bench/: that they run, on equal work, in turns. No time is asserted."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastops
from fastops import timing
from fastops.cli import EXTRAS, bench, main
from fastops.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = "mse_loss/64x10/forward"


def pytest_process(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark times nothing, and writes no file, where a variable of pytest-xdist is set.
    left_out = ("TRITON_INTERPRET", "FASTOPS_BACKEND", "PYTEST_XDIST_WORKER")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "bench", *words],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
    )


def test_suite_runs(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    process = pytest_process(
        *("-k", SMALLEST.rpartition("/")[0] + " or TwoLayerNet-64/step"),
        *("--benchmark-min-rounds=1", "--benchmark-max-time=0", f"--benchmark-json={file}"),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    saved = json.loads(file.read_text())
    groups: dict[str, list[str]] = {}
    for row in saved["benchmarks"]:
        groups.setdefault(row["group"], []).append(row["params"]["contestant"])
    case = "mse_loss/64x10"
    names = [f"{case}/forward", f"{case}/forward+backward", "TwoLayerNet-64/step"]
    assert {name: sorted(rows) for name, rows in groups.items()} == {name: ["eager", "fastops"] for name in names}
    assert saved["machine_info"]["torch"] == torch.__version__


def test_host_time_is_measured() -> None:
    """Every row says how long eager and fastops took, in that order, and the ratio."""
    words = [sys.executable, str(ROOT / "bench" / "host_time.py"), "--pairs", "1"]
    process = subprocess.run(words, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [line.split() for line in process.stdout.splitlines()]
    assert [row[0] for row in rows] == ["triton"] * 3 + ["torch"] * 3
    assert all(float(row[-1]) > 0 and float(row[-4]) > 0 for row in rows)


def test_suite_has_every_case() -> None:
    process = pytest_process("--collect-only")
    assert process.returncode == 0, process.stdout + process.stderr
    for case in bench.CASES:
        for contestant in ("eager", "fastops"):
            assert f"[{case.name}-{contestant}]" in process.stdout
    assert f"{2 * len(bench.CASES)} tests collected" in process.stdout


def test_suite_refuses_the_interpreter() -> None:
    process = pytest_process("--collect-only", TRITON_INTERPRET="1")
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        process.stderr.strip()
        == "ERROR: Triton's interpreter is on, and its times mean nothing: unset TRITON_INTERPRET"
    )


def test_test_run_leaves_the_suite_out(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_command_refuses_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("fastops: error: Triton's interpreter is on")


@pytest.mark.usefixtures("no_interpreter")
def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "bench.json"
    assert main(["bench", "--pairs", "1", "--case", SMALLEST, "--json", str(file), "--device", "cpu"]) == 0
    saved = json.loads(file.read_text())
    assert saved["pairs"] == 1
    environment = saved["environment"]
    assert environment["device"] == "cpu" and environment["torch"] == torch.__version__
    assert environment["fastops"] == fastops.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["processor"]
    assert [row["name"] for row in saved["measurements"]] == [SMALLEST, f"{SMALLEST}+backward"]
    printed = capsys.readouterr().out
    for row in saved["measurements"]:
        assert row["ratio"] == pytest.approx(row["fastops_ms"] / row["eager_ms"])
        assert row["ratio_lower_quartile"] == row["ratio"] == row["ratio_upper_quartile"]
        assert [row["name"], "torch"] in [line.split()[:2] for line in printed.splitlines()]


def test_command_needs_no_extra() -> None:
    extras = [name for name, extra in EXTRAS.items() if extra]
    blocked = f"for name in {[*extras, 'pytest', 'pytest_benchmark']}: sys.modules[name] = None"
    words = ["bench", "--pairs", "1", "--case", SMALLEST, "--device", "cpu"]
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}\nfrom fastops.cli import main\nsys.exit(main({words}))"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{SMALLEST} " in process.stdout


def test_earlier_results_survive_a_run_that_ends_early(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_interpreter: None, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "bench.json"
    file.write_text("earlier")
    monkeypatch.setattr(bench, "measure", interrupted)
    assert main(["bench", "--case", SMALLEST, "--json", str(file), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "fastops: interrupted\n"
    assert file.read_text() == "earlier"


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--case", "conv9d"],
            "no case contains 'conv9d': they begin with add_relu, batch_norm_relu, batch_norm_add_relu, ",
        ),
        (["--device", "nonsense"], "cannot use device 'nonsense': "),
        (["--case", SMALLEST, "--json", "/nowhere/file"], "cannot write to /nowhere/file: "),
    ],
)
def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastops: error: {line}")
    assert printed.err.count("\n") == 1


def test_pairs_alternate() -> None:
    order: list[str] = []
    times = timing.interleave([partial(order.append, name) for name in "ABC"], turns=3, calls=2)
    assert "".join(order) == "AABBCC" + "CCBBAA" + "AABBCC"
    assert [len(own) for own in times] == [3, 3, 3]


def test_ratio_is_taken_within_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes ten times slower half way through does not change the ratio."""
    times = {"eager": [1.0, 1.1, 10.0, 12.0, 11.0], "fastops": [0.5, 0.55, 6.0, 6.0, 5.5]}
    monkeypatch.setattr(bench, "timed", lambda *_: times)
    case = bench.Case("name", lambda device: bench.Contest({}, "torch"))
    result = bench.measure(case, torch.device("cpu"), pairs=5)
    ratios = [0.5, 0.5, 0.6, 0.5, 0.5]
    assert result.ratio == pytest.approx(np.median(ratios))
    assert (result.eager_ms, result.fastops_ms) == pytest.approx((10_000, 5_500))


def flat(value: object) -> Tensor:
    tensors = value if isinstance(value, tuple) else (value,)
    return torch.cat([tensor.flatten() for tensor in tensors if isinstance(tensor, Tensor)])


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (case, "torch" if (op := OPS.get(case.name.split("/")[0])) and not op.onednn else "onednn")
        for case in bench.CASES
        if "224" not in case.name and "4096x512-32000" not in case.name
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_contestants_do_the_same_work(case: bench.Case, backend: str) -> None:
    """Equal inputs, gradients and updates, up to rounding: the second training step has the loss after the first."""
    with fastops.backend(backend):
        contest = case.prepare(torch.device("cpu"))
        for _ in range(2 if case.name.endswith("/step") else 1):
            eager, ours = flat(contest.calls["eager"]()), flat(contest.calls["fastops"]())
    assert (ours - eager).norm() <= 1e-5 * eager.norm()
