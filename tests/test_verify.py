"""``fastops verify`` finds nothing where nothing is wrong and finds what is put in; and the rule that it judges by."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastops
from fastops import dispatch
from fastops.accuracy import error_share
from fastops.cli import main, verify
from fastops.ops import OPS, Op, linear

ROOT = Path(__file__).resolve().parent.parent
INF, NAN = float("inf"), float("nan")

# Enough to see every kernel; the rest of the cases repeat them with other options. Of other ops it is the first case.
TYPICAL = {op.name: [op.examples[0].name] for op in OPS.values()} | {
    "linear": ["vector"],
    "linear_relu": ["matrix"],
    "mse_loss": ["none, transposed target", "mean", "mean, element weights"],
    "smooth_l1_loss": ["none, beta 0.3"],
    "huber_loss": ["none, delta 0.3"],
    "binary_cross_entropy_with_logits": ["mean, weight, pos_weight", "none"],
    "cross_entropy": ["indices, mean, weight, smoothing, ignore_index", "probabilities, none, weight"],
    "linear_cross_entropy": ["indices, none, weight", "probabilities, mean, weight"],
}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave only the named cases of an op and, if given, only some checks of each."""

    def keep(
        op: str, names: list[str], dtypes: tuple[torch.dtype, ...] = verify.DTYPES, derivatives: Any = None
    ) -> None:
        cases = [case for case in verify.CASES if case.op.name == op and case.example.name in names]
        assert len(cases) == len(names)
        monkeypatch.setattr(verify, "CASES", cases)
        monkeypatch.setattr(verify, "DTYPES", dtypes)
        monkeypatch.setattr(verify, "DERIVATIVES", verify.DERIVATIVES if derivatives is None else derivatives)

    return keep


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is one line."""
    monkeypatch.setenv("COLUMNS", "300")


def rows(printed: str, op: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith(f"{op} ")]


# Nothing wrong --------------------------------------------------------------------------------------------------------


SLOW = [f"conv{n}d" for n in (1, 2, 3)] + ["conv_relu1d", "conv_relu3d"]  # conv_relu2d does what they do


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.nightly if op in SLOW else ()) for op in OPS])
def test_kernels_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only: Callable[..., None], op: str
) -> None:
    monkeypatch.setattr(dispatch, "interpreter_has_bfloat16", False)
    only(op, TYPICAL[op])
    assert main(["verify", "--backend", "triton"]) == 0
    printed = capsys.readouterr().out
    for row in rows(printed, op):
        assert row.count(" ok ") == 3
        assert row.endswith(" torch" if "element weights" in row else "  triton; torch: forward AD, gradgrad")
        assert ("not checked" in row) == ("triton" in row)  # in the interpreter, bfloat16 is nobody's pass
    assert len(rows(printed, op)) == len(TYPICAL[op])
    assert "Triton's interpreter computes bfloat16 wrongly" in printed
    assert " 0 failed, " in printed and "0 not checked" not in printed


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("backend", "ending"),
    [("torch", " torch"), ("onednn", " torch; onednn: float32"), ("auto", " torch")],
)
def test_rows_say_where_they_ran(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    only: Callable[..., None],
    backend: str,
    ending: str,
) -> None:
    monkeypatch.setattr(linear, "onednn_from", None)
    only("linear_relu", ["matrix", "vector"])
    assert main(["verify", "--backend", backend, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert [row.endswith(ending) for row in rows(printed, "linear_relu")] == [True, True]
    assert "2 cases, 14 checks: 14 passed, 0 failed, 0 not checked" in printed


def test_rows_say_what_was_seen_and_not_what_was_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    """Where the torch expression runs instead of kernels, no check counts as theirs."""
    only("mse_loss", ["mean"], (torch.float32,))
    monkeypatch.setattr(Op, "run", lambda op, way, call: op.expression(*call))
    assert main(["verify", "--backend", "triton"]) == 0
    printed = capsys.readouterr().out
    (row,) = rows(printed, "mse_loss")
    assert row.endswith("  torch") and "of those that ran, 4 on torch" in printed


def test_ops_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", "torch", "--op", "linear", "mse_loss"]) == 0
    printed = capsys.readouterr().out
    assert rows(printed, "linear") and rows(printed, "mse_loss")
    assert not rows(printed, "linear_relu") and not rows(printed, "cross_entropy")


def test_case_names_are_unique() -> None:
    names = [case.name for case in verify.CASES]
    assert len(set(names)) == len(names)


# Something wrong ------------------------------------------------------------------------------------------------------


def scaled(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function with one of its results a hundredth too large."""

    def defect(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*arguments: Any, **keywords: Any) -> Any:
            results = function(*arguments, **keywords)
            if isinstance(results, Tensor):
                return results * 1.01
            return tuple(
                result * 1.01 if number == index and result is not None else result
                for number, result in enumerate(results)
            )

        return wrong

    return defect


def overwriting(argument: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function, which afterwards writes over one of its arguments."""

    def defect(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*arguments: Any, **keywords: Any) -> Any:
            results = function(*arguments, **keywords)
            arguments[argument].data.mul_(2)  # autograd does not notice, as with a kernel
            return results

        return wrong

    return defect


def first_gradient_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that remembers its result instead of looking at grad_output."""
    remembered: dict[tuple[int, ...], Any] = {}

    def wrong(grad_output: Tensor, input: Tensor, *arguments: Any) -> Any:
        key = (input.data_ptr(), input.numel())
        return remembered.setdefault(key, function(grad_output, input, *arguments))

    return wrong


def rounded_between(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on operands that were rounded to bfloat16."""

    def wrong(input: Tensor, *arguments: Any) -> Any:
        return function(input.bfloat16().to(input.dtype), *arguments)

    return wrong


def failing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that cannot be launched."""

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")

    return wrong


def half_constant(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients of which autograd sees one half."""

    def wrong(*arguments: Any) -> Any:
        return tuple(grad if grad is None else grad / 2 + grad.detach() / 2 for grad in gradients(*arguments))

    return wrong


# The op, its case, which of its functions is wrong and how, and what is said of it.
DEFECTS = {
    "value of linear": ("linear", "matrix", "forward", scaled(0), "gradcheck"),
    "gradient of the input": ("linear", "matrix", "backward", scaled(0), "float32: the error of the grad"),
    "gradient of the weight": ("linear", "matrix", "backward", scaled(1), "gradient of weight"),
    "gradient of the bias": ("linear_relu", "matrix", "backward", scaled(2), "gradient of bias"),
    "forward AD": ("linear_relu", "matrix", "expression", scaled(0), "forward AD"),
    "lost precision": ("linear", "matrix", "forward", rounded_between, "float32: the error of the value"),
    "input of linear": ("linear", "matrix", "backward", overwriting(1), "input was modified"),
    "value of mse": ("mse_loss", "sum", "forward", scaled(0), "value is"),
    "gradients of mse": ("mse_loss", "mean", "backward", scaled(1), "gradient of target"),
    "second backward": (
        "mse_loss",
        "none",
        "backward",
        first_gradient_again,
        "float32: the error of the second gradient of input",
    ),
    "value of cross-entropy": ("cross_entropy", "indices, mean", "forward", scaled(0), "value is"),
    "gradient of the logits": ("cross_entropy", "indices, sum, weight", "backward", scaled(0), "gradient of input"),
    "gradient of the probabilities": (
        "cross_entropy",
        "probabilities, none",
        "backward",
        scaled(1),
        "gradient of target",
    ),
    "logits overwritten": ("cross_entropy", "indices, mean", "backward", overwriting(1), "input was modified"),
    "second derivative": ("cross_entropy", "probabilities, none", "gradients", half_constant, "gradgrad"),
    "launch": (
        "mse_loss",
        "mean",
        "forward",
        failing,
        "float32: FallbackWarning: the Triton kernel of mse_loss failed",
    ),
}
Defect = Callable[[Callable[..., Any]], Callable[..., Any]]


def put(defect: Defect, monkeypatch: pytest.MonkeyPatch, op: Op, function: str) -> None:
    """Put the defect into a field of the record, or into its launcher "forward" or "backward"."""
    if function not in ("forward", "backward"):
        monkeypatch.setattr(op, function, defect(getattr(op, function)))
        return
    forward, backward = op.launchers
    wrong = (defect(forward), backward) if function == "forward" else (forward, defect(backward))
    monkeypatch.setattr(op, "launchers", wrong)


@pytest.mark.parametrize(("op", "name", "function", "defect", "words"), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    only: Callable[..., None],
    op: str,
    name: str,
    function: str,
    defect: Defect,
    words: str,
) -> None:
    derivative = words in verify.DERIVATIVES
    only(op, [name], () if derivative else (torch.float32,), (words,) if derivative else ())
    monkeypatch.setattr(verify, "DRAWS", 1)
    put(defect, monkeypatch, OPS[op], function)
    assert main(["verify", "--backend", "triton"]) == 1
    printed = capsys.readouterr().out
    (row,) = rows(printed, op)
    assert "FAILED" in row and name in row
    failures = [line for line in printed.splitlines() if line.startswith(f"FAILED {op} / {name} / ")]
    assert any(words in failure for failure in failures), failures
    assert f"{len(failures)} failed" in printed


@pytest.mark.parametrize("function", ["plain", "plain_backward"])
def test_a_defect_of_onednn_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None], function: str
) -> None:
    only("linear", ["matrix"], (torch.float32, torch.float16), ())
    put(scaled(0), monkeypatch, OPS["linear"], function)
    assert main(["verify", "--backend", "onednn"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED linear / matrix / float32" in printed
    assert "1 failed" in printed  # float16 runs in torch


# Where it cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--op", "linear", "conv9d"], "unknown op 'conv9d': expected one of add_relu, binary_cross_entropy"),
        (["--backend", "cuda"], "unknown backend 'cuda': expected one of 'auto', 'triton', "),
        (["--device", "nonsense"], "cannot use device 'nonsense': "),
        (["--device", "meta"], "cannot use device 'meta': "),
    ],
)
def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(["verify", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"fastops: error: {line}")
    assert printed.err.count("\n") == 1


def test_triton_must_be_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", False)
    assert main(["verify", "--backend", "triton"]) == 2
    assert "Triton is not installed: pip install" in capsys.readouterr().err


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("status", [0, 1])
def test_interpreter_gets_the_same_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    started = []

    def run(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append((command[1:], env["TRITON_INTERPRET"]))
        return SimpleNamespace(returncode=status)

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(subprocess, "run", run)
    assert main(["verify", "--backend", "triton", "--op", "mse_loss", "linear", "--device", "cpu"]) == status
    words = ["-m", "fastops", "verify", "--backend", "triton", "--device", "cpu", "--op", "mse_loss", "linear"]
    assert started == [(words, "1")]
    assert capsys.readouterr().out.startswith("no GPU here: the same kernels run in Triton's interpreter")


WITHOUT_EXTRAS = """
import sys

for package in ("matplotlib", "mlxtend", "pytest", "torchvision"):
    sys.modules[package] = None
from fastops.cli import main

sys.exit(main(["verify", "--op", "mse_loss", "--backend", sys.argv[1], "--device", "cpu"]))
"""


@pytest.mark.parametrize(("backend", "where"), [("torch", "49 on torch"), ("triton", "24 on triton, 19 on torch")])
def test_works_without_extras_in_a_new_process(backend: str, where: str) -> None:
    """And without the setting of these tests: for Triton the command starts the interpreter by itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTOPS_BACKEND")}
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, backend],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert ("no GPU here" in process.stdout) == (backend == "triton")
    assert process.stdout.rstrip().endswith(where)


# The rule -------------------------------------------------------------------------------------------------------------

ULP = torch.finfo(torch.float32).eps  # of 1


@pytest.mark.parametrize(
    ("result", "expected", "exact", "share"),
    [
        pytest.param([1.0], [1.0], [1.0], 0.0, id="nothing wrong"),
        pytest.param([1 + ULP], [1.0], [1.0], 2.0, id="torch is exact: half a unit in the last place is allowed"),
        pytest.param(
            [1 + ULP], [1.0], [1 + ULP / 2], 0.5 / 1.5, id="torch is wrong by one rounding: one and a half units"
        ),
        pytest.param([1 + 3 * ULP], [1 + ULP], [1.0], 3 / 2.5, id="more than twice as wrong as torch"),
        pytest.param([1.0, 1 + 2 * ULP], [1 + ULP, 1.0], [1.0, 1.0], 2 / 2.5, id="torch's largest error counts"),
        pytest.param([0.0], [0.0], [0.0], 0.0, id="zero"),
        pytest.param([2.0**-149], [0.0], [2.0**-150], 0.5 / 1.5, id="rounding of a number next to zero"),
        pytest.param([NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.0], 0.0, id="what is not finite"),
        pytest.param([1.0], [NAN], [NAN], INF, id="NaN is lost"),
        pytest.param([NAN], [1.0], [1.0], INF, id="NaN is made"),
        pytest.param([INF], [1.0], [1.0], INF, id="infinity is made"),
        pytest.param([INF], [-INF], [-INF], INF, id="the wrong infinity"),
        pytest.param([], [], [], 0.0, id="empty"),
    ],
)
def test_error_share(result: list[float], expected: list[float], exact: list[float], share: float) -> None:
    assert error_share(
        torch.tensor(result), torch.tensor(expected), torch.tensor(exact, dtype=torch.float64)
    ) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(("units", "share"), [(1, 1 / 3.5), (4, 4 / 3.5)])
def test_error_share_of_float64(units: int, share: float) -> None:
    """Torch's float32 result is wrong by one unit in its last place: so is, in effect, its float64 result."""
    exact = torch.ones(3, dtype=torch.float64)
    result = exact + units * torch.finfo(torch.float64).eps
    assert error_share(result, torch.full((3,), 1 + ULP), exact) == pytest.approx(share)


def test_kernel_fallback_is_noticed_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that came once already must not let later checks pass on the torch expression."""
    put(failing, monkeypatch, OPS["mse_loss"], "forward")
    case = next(case for case in verify.CASES if case.op.name == "mse_loss")
    with fastops.backend("triton"):
        outcomes = [verify._check(case, "float32", torch.device("cpu")) for _ in range(2)]
    assert [outcome.cell for outcome in outcomes] == ["FAILED", "FAILED"]
