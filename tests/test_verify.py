"""``fastops verify`` finds nothing where nothing is wrong and finds what is put in."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_python
from torch import Tensor

import fastops
from fastops import dispatch
from fastops.cli import main, verify
from fastops.ops import OPS, Op, linear

ROOT = Path(__file__).resolve().parent.parent

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


def rows(printed: str, op: str) -> dict[str, list[str]]:
    """The cells of each case of an op: three derivatives, then an accuracy in each dtype."""
    found = [re.split(r"\s{2,}", line) for line in printed.splitlines() if line.startswith(f"{op}  ")]
    return {name: cells for _, name, *cells in found}


# Nothing wrong --------------------------------------------------------------------------------------------------------


# What they do conv_relu2d and conv_act2d do.
SLOW = [f"conv{n}d" for n in (1, 2, 3)] + [f"conv_{kind}{n}d" for kind in ("relu", "act") for n in (1, 3)]


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.nightly if op in SLOW else ()) for op in OPS])
def test_kernels_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only: Callable[..., None], op: str
) -> None:
    monkeypatch.setattr(dispatch, "interpreter_has_bfloat16", False)
    only(op, TYPICAL[op])
    assert main(["verify", "--backend", "triton"]) == 0
    printed = capsys.readouterr().out
    assert set(rows(printed, op)) == set(TYPICAL[op])
    for name, cells in rows(printed, op).items():
        if "element weights" in name:
            assert cells == ["torch"] * 7
            continue
        float64, float32, bfloat16, float16 = cells[3:]
        assert cells[:3] == ["triton", "torch", "torch"]
        assert all(0 <= float(share) <= 1 for share in (float64, float32, float16))
        assert bfloat16 == "-"  # in the interpreter it is nobody's pass
    assert "Triton's interpreter computes bfloat16 wrongly" in printed
    assert " 0 failed, " in printed and " 0 not checked" not in printed


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_rows_say_where_they_ran(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None], backend: str
) -> None:
    """If all is torch's own, nothing was verified."""
    monkeypatch.setattr(linear, "onednn_from", None)
    only("linear_relu", ["matrix", "vector"])
    assert main(["verify", "--backend", backend, "--device", "cpu"]) == (backend != "onednn")
    printed = capsys.readouterr().out
    for cells in rows(printed, "linear_relu").values():
        where = [cell for column, cell in enumerate(cells) if (backend, column) != ("onednn", 4)]
        assert set(where) == {"torch"} and (cells[4] == "torch") == (backend != "onednn")
    assert "2 cases, 14 checks: 14 passed, 0 failed, 0 not checked" in printed
    assert printed.endswith(verify.NOTHING_RAN + "\n") == (backend != "onednn")


def test_rows_say_what_was_seen_and_not_what_was_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    """Where the torch expression runs instead of kernels, no check counts as theirs."""
    only("mse_loss", ["mean"], (torch.float32,))
    monkeypatch.setattr(Op, "run", lambda op, way, call: op.expression(*call))
    assert main(["verify"]) == 1
    printed = capsys.readouterr().out
    assert rows(printed, "mse_loss") == {"mean": ["torch"] * 4}
    assert f"of those that ran, 4 on torch (2 of them by design)\n{verify.NOTHING_RAN}\n" in printed


@pytest.mark.parametrize(("installed", "way"), [(True, "triton"), (False, "onednn")])
def test_by_default_what_there_is_of_fastops_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    only: Callable[..., None],
    installed: bool,
    way: str,
) -> None:
    only("linear", ["matrix"], (torch.float32,), ())
    monkeypatch.setattr(dispatch, "triton_installed", installed)
    monkeypatch.setattr(dispatch, "_INTERPRETER", installed)
    assert main(["verify", "--device", "cpu"]) == 0
    assert f"of those that ran, 1 on {way}\n" in capsys.readouterr().out


def test_a_share_beyond_the_allowed_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, only: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch's error in few numbers may be nothing by luck; that of a defect stays in every draw."""
    only("linear", ["matrix"], (torch.float32,), ())
    share, counts = verify.error_share, list[int]()

    def unlucky(result: Tensor, expected: Tensor, exact: Tensor) -> float:
        counts.append(result.numel())
        return 1.5 if len(counts) <= 2 * 7 else share(result, expected, exact)

    monkeypatch.setattr(verify, "error_share", unlucky)
    assert main(["verify"]) == 0
    assert counts[::7] == [143, 286, 429]  # the numbers of one value, two and three; each has six gradients
    counts.clear()
    monkeypatch.setattr(verify, "MOST_DRAWS", 2)
    assert main(["verify"]) == 1
    assert "the error of the value is 1.5 times what is allowed" in capsys.readouterr().out


def test_ops_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "--backend", "torch", "--op", "linear", "mse_loss"])
    printed = capsys.readouterr().out
    assert [op for op in OPS if rows(printed, op)] == ["linear", "mse_loss"]


def test_the_table_fits_where_it_can(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 120 columns; in fewer it keeps its figures."""
    monkeypatch.setattr(verify, "check", lambda *_: verify.Outcome("0.1234", "triton"))
    for columns in ("120", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["verify"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 120
        assert sum(line.count("  0.1234") for line in lines) == 7 * len(verify.CASES)


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
    "launch": ("mse_loss", "mean", "forward", failing, "float32: RuntimeError: out of resource: shared memory"),
    "launch, by design torch's derivative": ("mse_loss", "mean", "forward", failing, "gradgrad"),
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
    monkeypatch.setattr(verify, "MOST_DRAWS", 1)
    put(defect, monkeypatch, OPS[op], function)
    assert main(["verify", "--backend", "triton"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in rows(printed, op)[name]
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


def test_kernel_fallback_is_noticed_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that came once already must not let later checks pass on the torch expression."""
    put(failing, monkeypatch, OPS["mse_loss"], "forward")
    case = next(case for case in verify.CASES if case.op.name == "mse_loss")
    with fastops.backend("triton"):
        outcomes = [verify.check(case, "float32", torch.device("cpu")) for _ in range(2)]
    assert [outcome.cell for outcome in outcomes] == ["FAILED", "FAILED"]


def test_a_result_that_rounding_takes_across_zero_has_two_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sum is 0, one that is off by less than a rounding has ReLU's other slope: which is no wrong gradient."""
    case = next(case for case in verify.CASES if case.op.name == "add_relu")

    def drawn(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        input, other = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
        other[5] = -input[5]
        return {"input": input, "other": other}, {}

    monkeypatch.setattr(verify.FF, "add_relu", lambda input, other: torch.relu(input + other + 1e-9))
    assert verify.check_accuracy(case, torch.float32, drawn, 1)[0] <= 1
    monkeypatch.setattr(verify.FF, "add_relu", lambda input, other: torch.relu(input + other).sqrt().square())
    with pytest.raises(verify.CheckError, match="the error of the gradient"):
        verify.check_accuracy(case, torch.float32, drawn, 1)
    monkeypatch.setattr(verify.FF, "add_relu", lambda input, other: torch.relu(input + other - 1e-3))
    with pytest.raises(verify.CheckError, match="the error of the value"):
        verify.check_accuracy(case, torch.float32, drawn, 1)


# Where it cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--op", "linear", "conv9d"],
            "unknown op 'conv9d': expected one of add_relu, batch_norm_relu, batch_norm_add_relu, ",
        ),
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


USERS = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTOPS_BACKEND")} | {
    "PYTHONPATH": str(ROOT)
}


def test_the_interpreter_gets_the_same_command(tmp_path: Path) -> None:
    """In a process of its own, whose status and output are the command's; and neither needs the extras."""
    for package in ("matplotlib", "mlxtend", "pytest", "torchvision"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    environment = USERS | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run_python(["-m", "fastops", "verify", "--op", "mse_loss"], env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.startswith("no GPU here: the same kernels run in Triton's interpreter")
    assert done.stdout.count("no GPU here") == 1
    assert done.stdout.rstrip().endswith("of those that ran, 24 on triton, 19 on torch (14 of them by design)")


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "train linear-regression --epochs 1 --backend triton --output .",
            "linear (1x1 to 1) runs on triton: a Triton",
        ),
        ("qualify --minutes 1e-9 --case peaks", "no time for"),
    ],
)
def test_other_commands_get_the_interpreter_too(
    command: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What they start, run here."""
    monkeypatch.chdir(tmp_path)
    started = list[tuple[list[str], str]]()
    code = [sys.executable, "-c", ""]
    start = subprocess.Popen

    def record(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        started.append((command, env["TRITON_INTERPRET"]))
        return start(code)

    words = [*command.split(), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", record)
        assert main(words) == 0
    assert started == [([sys.executable, "-m", "fastops", *words], "1")]
    monkeypatch.setattr(dispatch, "_INTERPRETER", True)
    assert "no GPU here" in capsys.readouterr().out
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert line in printed and "no GPU here" not in printed


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_its_status_is_handed_on(monkeypatch: pytest.MonkeyPatch, code: str, status: int) -> None:
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: start([sys.executable, "-c", code], env=env))
    assert main(["verify", "--device", "cpu"]) == status


def test_an_interrupt_ends_it() -> None:
    """Both processes get it, as from a terminal."""
    command = [sys.executable, "-m", "fastops", "verify", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        env=USERS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # it is ignored where tests run behind
    )
    assert process.stdout is not None
    while "gradcheck  forward AD" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "fastops: interrupted\n"
    with pytest.raises(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, 0)


@pytest.mark.usefixtures("no_interpreter")
def test_an_interrupt_of_the_first_process_alone_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time in which a terminal's would have ended the other."""
    signals, waits = list[int](), list[float | None]()

    class Started:
        def __init__(self, command: list[str], env: dict[str, str]) -> None: ...

        def __enter__(self) -> "Started":
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self, timeout: float | None = None) -> int:
            waits.append(timeout)
            if len(waits) == 1:
                raise KeyboardInterrupt
            if not signals:
                raise subprocess.TimeoutExpired("", 0)
            return 130

        def send_signal(self, number: int) -> None:
            signals.append(number)

    monkeypatch.setattr(subprocess, "Popen", Started)
    assert main(["verify", "--device", "cpu"]) == 130
    assert signals == [signal.SIGINT] and waits == [None, 5, None]
