"""``fastops bench``: that it runs, on equal work, in turns. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import seen
from forked import run_python
from torch import Tensor, nn

import fastops
from fastops import timing
from fastops.bench import cases, contestants, counting, measure
from fastops.bench.cases import CASES, Case, Contest, model_call
from fastops.bench.contestants import EAGER, OURS, NotRun, tried
from fastops.cli import EXTRAS, bench, main
from fastops.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALLEST = "mse_loss/64x10/forward"
ALONE = ("--contestant", "fastops", "--device", "cpu")
NO_COMPILER = {
    "CXX": "/nowhere/compiler",
    "PATH": str(Path(sys.executable).parent),
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}
NAMED = {case.name: case for case in CASES}


# The command ----------------------------------------------------------------------------------------------------------


def test_command_refuses_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("fastops: error: Triton's interpreter is on")


@pytest.mark.usefixtures("no_interpreter")
def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file, page = tmp_path / "bench.json", tmp_path / "bench.html"
    words = ("--pairs", "1", "--case", SMALLEST, "--json", str(file), "--html", str(page), "--backend", "torch")
    assert main(["bench", *words, *ALONE]) == 0
    saved = json.loads(file.read_text())
    environment = saved["environment"]
    assert environment["device"] == "cpu" and environment["torch"] == torch.__version__
    assert environment["fastops"] == fastops.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["processor"] and environment["backend"] == "torch"
    rows = saved["rows"]
    names = [SMALLEST, f"{SMALLEST}+backward"]
    assert [(row["case"], row["contestant"]) for row in rows] == [(n, c) for n in names for c in (EAGER, OURS)]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for eager, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(ours["milliseconds"] / eager["milliseconds"])
        assert ours["quartiles"] == [ours["ratio"]] * 2 and ours["turns"] == 1
        assert ours["way"] == "torch" and ours["verdict"] == "same code"
        assert ours["bytes"] == eager["bytes"] > 0 and ours["launches"] == eager["launches"] > 0
        assert [ours["case"], OURS, "torch"] in [line[:3] for line in printed]
    assert SMALLEST in page.read_text()


def test_command_needs_no_extra() -> None:
    extras = [name for name, extra in EXTRAS.items() if extra]
    blocked = f"for name in {[*extras, 'pytest', 'pytest_benchmark']}: sys.modules[name] = None"
    words = ["bench", "--pairs", "1", "--case", SMALLEST, *ALONE]
    process = run_python(
        ["-c", f"import sys\n{blocked}\nfrom fastops.cli import main\nsys.exit(main({words}))"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert SMALLEST in process.stdout and process.stderr == ""


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
        (["--op", "add_relu", "--model", "LeNet", "--case", "mse"], "no case contains 'mse'"),
        (["--device", "nonsense"], "cannot use device 'nonsense': "),
        (["--backend", "triton", "--device", "cpu"], "backend 'triton' is selected but"),
        (["--case", SMALLEST, "--json", "/nowhere/file"], "cannot write to /nowhere/file: "),
        (["--case", SMALLEST, "--html", "/nowhere/file"], "cannot write to /nowhere/file: "),
        (["--input", "8,3"], "--input is for a model of yours: "),
    ],
)
def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(["bench", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastops: error: {line}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "families"),
    [
        (["--op", "add_relu"], {"add_relu"}),
        (["--op", "linear", "--model", "LeNet"], {"linear", "LeNet-64"}),
        (["--model", "FashionMLP", "--case", "512"], {"FashionMLP-512"}),
        (["--quick"], {name.split("/")[0] for name in cases.QUICK}),
        (["--quick", "--op", "mse_loss"], {"mse_loss"}),
        ([], {case.family for case in CASES}),
    ],
)
def test_choice_of_cases(
    words: list[str], families: set[str], monkeypatch: pytest.MonkeyPatch, no_interpreter: None
) -> None:
    met: list[str] = []

    def measured(case: Case, *_: object) -> measure.Measured:
        met.append(case.family)
        return measure.Measured([], {})

    monkeypatch.setattr(bench, "measure", measured)
    assert main(["bench", *words, "--device", "cpu"]) == 2  # nothing was timed
    assert set(met) == families


def test_quick_cases_exist() -> None:
    assert set(cases.QUICK) <= set(NAMED) and any("/step" in name for name in cases.QUICK)


def test_quick_divides_its_time_among_the_cases_that_are_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_interpreter: None
) -> None:
    clock, shares = [0.0], []

    def measured(case: Case, *words: Any) -> measure.Measured:
        shares.append(words[-1])
        clock[0] += 60.0 if len(shares) == 1 else 100.0  # the first ones take more than their share
        return measure.Measured([], {})

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    assert main(["bench", "--quick", "--device", "cpu"]) == 2  # nothing was timed
    assert shares == [200 / 9, 140 / 8, 40 / 7]
    assert "left out, all: no time was left: " in capsys.readouterr().out


# Contestants ----------------------------------------------------------------------------------------------------------


def nothing() -> None:
    pass


def test_those_that_fail_are_left_out_with_the_reason() -> None:
    def absent() -> None:
        raise NotRun("it is not installed")

    def broken() -> None:
        raise ValueError("no\ncompiler")

    able, left_out = tried({EAGER: nothing, "Liger": absent, "torch.compile": broken}, CPU, ())
    assert list(able) == [EAGER]
    assert left_out == {"Liger": "it is not installed", "torch.compile": "ValueError: no compiler"}
    with pytest.raises(ValueError, match="no\ncompiler"):
        tried({EAGER: nothing, OURS: broken}, CPU, (OURS,))
    with pytest.raises(NotRun, match="ValueError: no compiler"):
        tried({EAGER: broken}, CPU, ())


def test_what_takes_too_long_is_stopped() -> None:
    def forever() -> None:
        while True:
            pass

    def hidden() -> None:
        try:
            forever()
        except NotRun as error:
            raise RuntimeError("a compiler wraps what happens inside") from error

    for call in (forever, hidden):
        able, left_out = tried({EAGER: nothing, "torch.compile": call}, CPU, (), timing.time.monotonic() + 0.05)
        assert list(able) == [EAGER] and left_out == {"torch.compile": "it took too long"}
    assert tried({EAGER: nothing, "Liger": nothing}, CPU, (EAGER,), 0.0)[1] == {"Liger": "no time was left"}


def test_without_a_compiler_the_others_are_timed() -> None:
    """A machine that has no C++ compiler, in a process of its own."""
    words = ["bench", "--pairs", "1", "--case", SMALLEST, "--contestant", "torch.compile", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | NO_COMPILER
    process = subprocess.run(
        [sys.executable, "-m", "fastops", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "left out, torch.compile: " in process.stdout and "compiler" in process.stdout
    assert SMALLEST in process.stdout


@pytest.mark.parametrize(
    ("name", "op", "module", "function"),
    [
        ("Liger", "cross_entropy", "liger_kernel.transformers.functional", "liger_cross_entropy"),
        ("attorch", "cross_entropy", "attorch", "CrossEntropyLoss"),
        ("cut-cross-entropy", "linear_cross_entropy", "cut_cross_entropy", "linear_cross_entropy"),
    ],
)
def test_other_packages_take_part_where_they_are_installed(
    name: str, op: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up ones."""

    class CrossEntropyLoss(nn.Module):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(input, target)

    made: dict[str, Any] = {
        "liger_cross_entropy": lambda input, target: (F.cross_entropy(input, target), None),
        "CrossEntropyLoss": CrossEntropyLoss,
        "linear_cross_entropy": lambda x, w, target: F.cross_entropy(x @ w.T, target),
    }
    case = next(case for case in CASES if case.family == op and case.name.endswith("backward"))
    assert measure.measure(case, CPU, pairs=1, contestants=[name]).left_out == {
        name: f"{module.split('.')[0]} is not installed"
    }
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    setattr(sys.modules[module], function, made[function])
    found = measure.measure(case, CPU, pairs=1, contestants=[name])
    assert [row.contestant for row in found.rows] == [EAGER, name] and found.left_out == {}
    assert found.rows[1].bytes is None and "not seen" in found.rows[1].unknown["bytes"]
    assert found.rows[1].peak_bytes


def flat(value: object) -> Tensor:
    tensors = value if isinstance(value, tuple) else (value,)
    return torch.cat([tensor.flatten() for tensor in tensors if isinstance(tensor, Tensor)])


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (case, "torch" if (op := OPS.get(case.family)) and not op.onednn else "onednn")
        for case in CASES
        if "224" not in case.name and "-32000" not in case.name
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_contestants_do_the_same_work(case: Case, backend: str) -> None:
    """Equal inputs, gradients and updates, up to rounding: the second training step has the loss after the first."""
    with fastops.backend(backend):
        contest = case.prepare(CPU, torch.float32)
        others = [name for name in (OURS, contestants.TWO_CALLS) if name in contest.calls]
        for _ in range(2 if case.name.endswith("/step") else 1):
            eager = flat(contest.calls[EAGER]())
            for name in others:
                assert (flat(contest.calls[name]()) - eager).norm() <= 1e-5 * eager.norm()


# Measuring ------------------------------------------------------------------------------------------------------------


def test_pairs_alternate() -> None:
    order: list[str] = []
    times = timing.interleave([partial(order.append, name) for name in "ABC"], turns=3, calls=2)
    assert "".join(order) == "AABBCC" + "CCBBAA" + "AABBCC"
    assert [len(own) for own in times] == [3, 3, 3]


def test_no_turn_begins_behind_the_deadline() -> None:
    times = timing.interleave([nothing, nothing], turns=9, calls=1, deadline=0.0)
    assert [len(own) for own in times] == [1, 1]


def test_behind_the_deadline_each_is_called_once() -> None:
    calls: list[str] = []
    times = timing.timed({name: partial(calls.append, name) for name in "AB"}, 9, timing.wall_clock, 0.0)
    assert calls == ["A", "B"] and [len(own) for own in times.values()] == [1, 1]


def test_a_compiler_takes_no_time_from_fastops() -> None:
    def compiles() -> None:
        while True:
            pass

    x = torch.ones(3)
    calls = {EAGER: lambda: x + 1, contestants.COMPILED: compiles, OURS: lambda: x * 2}
    found = measure.measure(Case("name", lambda *_: Contest(calls, lambda: "torch")), CPU, pairs=5, seconds=0.5)
    assert [row.contestant for row in found.rows] == [EAGER, OURS]
    assert found.left_out == {contestants.COMPILED: "it took too long"}


def made_up(monkeypatch: pytest.MonkeyPatch, **times: list[float]) -> measure.Row:
    """fastops' row of a case with these times, in which it runs other code than eager."""
    monkeypatch.setattr(measure, "timed", lambda *_: {"eager": times["eager"], "fastops": times["fastops"]})
    x = torch.ones(3)
    contest = Contest({"eager": lambda: x + 1, "fastops": lambda: x * 2}, lambda: "torch")
    return measure.measure(Case("name", lambda *_: contest), CPU).rows[1]


def test_ratio_is_taken_within_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes ten times slower half way through does not change the ratio."""
    times = {"eager": [1.0, 1.1, 10.0, 12.0, 11.0], "fastops": [0.5, 0.55, 6.0, 6.0, 5.5]}
    row = made_up(monkeypatch, **times)
    ratios = [0.5, 0.5, 0.6, 0.5, 0.5]
    assert row.ratio == pytest.approx(np.median(ratios)) and row.milliseconds == pytest.approx(5_500)
    assert row.verdict == "faster" and row.turns == 5
    assert row.spread == pytest.approx(tuple(np.quantile(ratios, measure.SPREAD)))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.8, 0.9, 0.9, 0.9, 1.2], "faster"),
        ([0.8, 0.9, 0.9, 1.1, 1.2], "unclear"),
        ([1.1, 1.1, 1.2, 1.2, 1.2], "slower"),
        ([0.4, 0.5, 0.6, 0.9, 0.95], "unclear"),  # too wide
        ([0.5, 0.5, 0.5, 0.5], "unclear"),  # too few
    ],
)
def test_verdicts(ratios: list[float], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made_up(monkeypatch, eager=[1.0] * len(ratios), fastops=ratios).verdict == expected


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [(0.5, 0.6, "same code"), (0.9, 1.1, "same code"), (1.1, 1.2, "same code, slower")],
)
def test_the_same_code_is_never_faster(lower: float, upper: float, expected: str) -> None:
    assert measure.verdict(21, lower, upper, same_code=True) == expected


@pytest.mark.parametrize(
    ("case", "same"),
    [
        ("mse_loss/64x10/forward+backward", True),
        ("conv2d/8x64x56x56-128k1-stride2/forward", True),
        ("linear_relu/64x784-512/forward", False),  # the ReLU is in place
        ("add_relu/8x64x56x56/forward", False),
        ("FashionMLP-64/inference", False),
    ],
)
def test_same_code_is_told_by_the_operations_that_run(case: str, same: bool) -> None:
    contest = NAMED[case].prepare(CPU, torch.float32)
    assert seen(contest, OURS).same_code(seen(contest, EAGER)) is same


def test_other_layouts_and_options_are_other_code() -> None:
    x = torch.ones(4, 4)
    plain = counting.operations(lambda: x + 1)
    assert plain.same_code(counting.operations(lambda: x + 1))
    for other in (lambda: x.t() + 1, lambda: x + 2, lambda: x.double() + 1):
        assert not plain.same_code(counting.operations(other))


def test_a_kernel_is_never_the_same_code() -> None:
    """In the interpreter, where the operations of torch around a kernel are those of any other call."""
    x = torch.ones(3, 4)
    with fastops.backend("triton"):
        ours = counting.operations(lambda: fastops.functional.add_relu(x, x))
        assert ours.ways == {"triton"} and not ours.same_code(ours)
        cost = counting.cost_of(lambda: fastops.functional.add_relu(x, x), ours, CPU)
    assert cost.bytes is cost.launches is None and set(cost.unknown) == {"bytes", "launches"}
    assert cost.peak_bytes and cost.peak_bytes >= x.nbytes


def test_what_refuses_to_be_looked_at_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(call: object) -> counting.Traffic:
        raise RuntimeError("no mode, please")

    monkeypatch.setattr(counting, "operations", refuses)
    rows = measure.measure(NAMED[SMALLEST], CPU, pairs=1, contestants=[OURS]).rows
    assert [row.bytes for row in rows] == [None, None] and rows[1].verdict == "unclear"
    assert rows[1].unknown["bytes"] == "RuntimeError: no mode, please"


def test_bytes_and_launches_of_operations_of_torch() -> None:
    x, y = torch.ones(8, 4), torch.ones(8, 4)
    found = counting.operations(lambda: (x + y).relu_().t())
    assert [launch.name for launch in found.launches] == ["add", "relu_"]
    assert found.bytes == (3 + 2) * x.nbytes


def test_peak_memory_is_what_a_call_holds_at_a_time() -> None:
    def holds_two_of_three() -> Tensor:
        first = torch.empty(1000, dtype=torch.int8)
        del first
        return torch.empty(1000, dtype=torch.int8).clone()

    assert counting._peak_on_cpu(holds_two_of_three, CPU) == 2000
    model = nn.Linear(1000, 1, bias=False)
    step = model_call(model, lambda output: output.sum(), (torch.ones(1, 1000),), training=True)
    step()
    found = [counting._peak_on_cpu(step, CPU) for _ in range(2)]
    assert found[0] == found[1] >= 4000  # the gradient of the weight, which the step leaves behind in no call


def test_fastops_that_fails_is_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_interpreter: None
) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no result")

    monkeypatch.setattr(fastops.functional, "mse_loss", broken)
    case = cases._op_case(OPS["mse_loss"], OPS["mse_loss"].timed[0], cases.FORWARD)
    monkeypatch.setattr(bench, "CASES", [case])
    assert main(["bench", "--pairs", "1", *ALONE]) == 1
    assert "left out, fastops: RuntimeError: no result: mse_loss/64x10/forward" in capsys.readouterr().out
