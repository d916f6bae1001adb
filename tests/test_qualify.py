"""`fastops qualify` without a GPU: that all of it runs, finds what is wrong, survives crashes, and tells no times."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail
from forked import run_python
from torch import Tensor, nn

import fastops
from fastops import progress
from fastops.cli import main, matrix, verify
from fastops.cli.verify import CheckError
from fastops.ops import OPS
from fastops.qualify import cases, kernels, models, processes
from fastops.qualify.cases import FAILED, HOLDS, NOT_RUN, Case, NotRun, Result

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ADD_RELU = verify.Case(OPS["add_relu"], OPS["add_relu"].examples[0])

# The command ----------------------------------------------------------------------------------------------------------


def test_command_runs_every_part_and_tells_no_time(tmp_path: Path) -> None:
    """In processes of its own, with kernels in the interpreter; nothing that it writes looks like a GPU's figure."""
    text, page, tables = tmp_path / "q.json", tmp_path / "q.html", tmp_path / "tables"
    case = "add_relu / two tensors"
    chosen = (f"{case} / float64", f"{case} / gradcheck", "CUDA graph", "peaks", f"{case} / float16 / ")
    words = ("-m", "fastops", "qualify", "--device", "cpu", "--case", *chosen, "--minutes", "10")
    done = run_python(
        [*words, "--json", text, "--html", page, "--table", tables],
        cwd=ROOT,
        # torch.compile takes part, and compiles nothing
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU here: the same kernels run in Triton's interpreter on CPU tensors")
    data = json.loads(text.read_text())
    outcomes = {part: {r["name"]: r["outcome"] for r in results} for part, results in data["parts"].items()}
    assert outcomes == {
        "kernels": {
            f"{case} / float64": HOLDS,
            "FashionMLP / CUDA graph": NOT_RUN,
            "LeNet / CUDA graph": NOT_RUN,
        },
        "models": {f"{case} / gradcheck": HOLDS},
        "speed": {
            "peaks": HOLDS,
            f"{case} / float16 / ways": HOLDS,
            f"{case} / float16 / forward+backward": HOLDS,
            f"{case} / float16 / forward": HOLDS,
            f"{case} / float16 / forward+backward, torch.compile": HOLDS,
            f"{case} / float16 / forward, torch.compile": HOLDS,
        },
        "compilations": {},
    }
    assert data["gpu"] is data["table"] is None and data["rates"] == {} and not any(data["left"].values())
    errors = data["parts"]["kernels"][0]["figures"]["errors in units of torch's"]
    assert list(errors) == list(kernels.arrangements(ADD_RELU.op, CPU))
    for result in data["parts"]["speed"]:
        figures = result["figures"]
        if "times" not in figures:
            assert result["name"] in ("peaks", f"{case} / float16 / ways")
            continue
        compiled = result["name"].endswith("torch.compile")
        assert figures["times"] == {} and figures["ran"] == ["eager", "fastops", *["torch.compile"] * compiled]
        assert list(figures["left out"]) == ["Liger"] * (not compiled)
    assert not list(tables.iterdir())
    html = page.read_text()
    assert "CUDA graphs need a GPU" in html and f"{case} / float64" in html
    assert not any(word in html for word in ("http:", "https:", "src=", "href=", " ms<"))


def test_what_there_is_no_time_for_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    assert main(["qualify", "--minutes", "1e-9", "--case", "add_relu / two tensors / f", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("no time for") == 2  # of kernels and of speed: none of models has such a name
    data = json.loads(file.read_text())
    assert data["left"]["kernels"][0] == "add_relu / two tensors / float32"
    assert data["parts"] == {"kernels": [], "models": [], "compilations": [], "speed": []}


def test_an_interrupted_run_keeps_what_came_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def results(self: object, names: list[str], count: int) -> Iterator[Result]:
        yield Result(names[0], FAILED, "it is <wrong>", 1.0, {})
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.Pool, "results", results)
    text, page = tmp_path / "q.json", tmp_path / "q.html"
    assert main(["qualify", "--case", "add_relu / two", "--json", str(text), "--html", str(page)]) == 130
    assert "FAILED add_relu / two tensors / float32: it is <wrong>" in capsys.readouterr().out
    data = json.loads(text.read_text())
    assert [result["outcome"] for result in data["parts"]["kernels"]] == [FAILED]
    assert data["left"]["kernels"][0] == "add_relu / two tensors / bfloat16"
    assert "it is &lt;wrong&gt;" in page.read_text()


def test_a_failed_case_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(self: object, names: list[str], count: int) -> Iterator[Result]:
        return (Result(name, FAILED if "float16" in name else HOLDS, "", 1.0, {}) for name in names)

    monkeypatch.setattr(processes.Pool, "results", results)
    assert main(["qualify", "--case", "add_relu / two tensors / float32"]) == 0
    assert main(["qualify", "--case", "add_relu / two tensors / float16"]) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--minutes", "none"], "argument --minutes: 'none' is no time"),
        (["--minutes", "-1"], "argument --minutes: '-1' is no time"),
        (["--case", "conv9d", "none of them"], "no case contains 'conv9d' or 'none of them'"),
        (["--html", "/nowhere/file"], "cannot write to /nowhere/file: "),
        (["--device", "nonsense"], "cannot use device 'nonsense': "),
    ],
)
def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert f"error: {line}" in fail(capsys, "qualify", *words)


def test_without_triton_there_is_nothing_to_qualify(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastops.dispatch, "triton_installed", False)
    assert "without Triton" in fail(capsys, "qualify")


def test_it_does_without_what_is_missing(tmp_path: Path) -> None:
    """Neither rich nor filelock nor platformdirs, nor anything else but torch, numpy and Triton."""
    packages = ["rich", "filelock", "platformdirs", "mlxtend", "torchvision", "transformers"]
    program = f"""
import sys
for name in {[*packages, "matplotlib", "elftools", "liger_kernel"]}: sys.modules[name] = None
from fastops.cli import main
from fastops.qualify.cases import cases_of, run_case
import torch
status = main(["qualify", "--minutes", "1e-9", "--device", "cpu"])
(case,) = [case for case in cases_of("models", torch.device("cpu")) if case.name == "ResNet-18 / training"]
print(run_case(case, torch.device("cpu")).reason)
sys.exit(status)
"""
    environment = {name: value for name, value in os.environ.items() if name != "FASTOPS_CACHE_DIR"}
    done = run_python(["-c", program], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    named = {line.split()[2] for line in lines if line.startswith("not installed: ")}
    assert named == {*packages, "liger-kernel"}
    assert lines[-1] == "torchvision is not installed"


def test_progress_needs_no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert list(progress.tracked("abc", 3, str)) == ["a", "b", "c"]


# Processes ------------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    print("said", name, file=sys.stderr, flush=True)
    if name == "crash": os.abort()
    if name == "end": sys.exit(3)
    if name == "hang": time.sleep(1000)
    result = {"name": name, "outcome": "holds", "reason": str(os.getpid()), "seconds": 0.0, "figures": {}}
    print(json.dumps({"result": result, "lives": name != "spoils"}), flush=True)
    if name == "spoils": time.sleep(1000)
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of the program that runs cases, one that does what their names say."""
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(program)))


def pool(seconds: float) -> processes.Pool:
    return processes.Pool("kernels", CPU, time.monotonic() + seconds, {})


@pytest.mark.usefixtures("worker")
def test_a_crash_takes_nothing_along() -> None:
    names = ["a", "crash", "b", "end", "c", "spoils", "d", "e"]
    found = {result.name: result for result in pool(1000).results(names, 1)}
    assert [name for name in names if found[name].outcome == FAILED] == ["crash", "end"]
    assert found["crash"].reason == "the process ended with signal SIGABRT: said crash"
    assert found["end"].reason == "the process ended with status 3: said end"
    own = [found[name].reason for name in ("a", "b", "c", "spoils", "d", "e")]
    assert len(set(own)) == 4 and own[2] == own[3] and own[4] == own[5]  # a device that is spoilt gets a new process


@pytest.mark.usefixtures("worker")
def test_a_case_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "CASE_SECONDS", 0.0)
    (result,) = pool(1000).results(["hang"], 1)
    assert (result.outcome, result.reason) == (FAILED, "it took longer than 0 s")


@pytest.mark.usefixtures("worker")
def test_the_end_of_the_time_is_no_failure() -> None:
    assert list(pool(0.0).results(["a"], 1)) == []
    assert list(pool(1.0).results(["hang", "hang", "hang"], 1)) == []


@pytest.mark.usefixtures("worker")
def test_several_at_a_time() -> None:
    found = list(pool(1000).results([str(number) for number in range(20)], 3))
    assert sorted(int(result.name) for result in found) == list(range(20))
    assert len({result.reason for result in found}) <= 3


def test_every_case_has_a_name_of_its_own() -> None:
    for device in (CPU, torch.device("cuda")):
        for part in cases.PARTS:
            names = [case.name for case in cases.cases_of(part, device)]
            assert names or (part, device) == ("compilations", CPU)
            assert len(set(names)) == len(names) and not any("\n" in name for name in names)


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (None, HOLDS, ""),
        (NotRun("no GPU"), NOT_RUN, "no GPU"),
        (torch.OutOfMemoryError("full"), NOT_RUN, "OutOfMemoryError: full"),
        (CheckError("wrong"), FAILED, "wrong"),
        (ZeroDivisionError("by\nzero"), FAILED, "ZeroDivisionError: by zero"),
    ],
)
def test_what_becomes_of_a_case(error: Exception | None, outcome: str, reason: str) -> None:
    def run(device: torch.device) -> dict[str, Any]:
        if error is not None:
            raise error
        return {"one": 1}

    result = cases.run_case(Case("name", run), CPU)
    assert (result.name, result.outcome, result.reason) == ("name", outcome, reason)
    assert result.figures == ({"one": 1} if error is None else {})


# Kernels --------------------------------------------------------------------------------------------------------------


def check_with(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check add_relu with a forward kernel whose result is ``spoil(input, right result)``."""
    forward, backward = ADD_RELU.op.launchers

    def spoilt(input: Tensor, other: Tensor) -> Tensor:
        return spoil(input, forward(input, other))

    monkeypatch.setitem(vars(ADD_RELU.op), "launchers", (spoilt, backward))
    kernels._check(ADD_RELU, torch.float32, CPU)


def outside(input: Tensor, result: Tensor) -> Tensor:
    """Write in front of the input, if something is there: in a guard."""
    if input.storage_offset() > 1:
        input.as_strided((1,), (1,), input.storage_offset() - 1).fill_(0)
    return result


DEFECTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "error": (lambda _, y: y * 1.001, r"odd sizes: the error of the value is .* times what is allowed"),
    "only where misaligned": (
        lambda x, y: y * 1.001 if x.data_ptr() % 16 else y,
        r"misaligned: the error of the value",
    ),
    "only behind a tile": (
        lambda _, y: y * 1.001 if len(y) == 17 else y,
        r"one behind full tiles: the error of the value",
    ),
    "memory": (outside, r"odd sizes: memory outside a tensor of shape \(13, 37\) was written"),
    "argument": (lambda x, y: (x.add_(1), y)[1], r"odd sizes: input was modified"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_a_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, message = DEFECTS[name]
    with pytest.raises(CheckError, match=message):
        check_with(monkeypatch, spoil)


def test_two_runs_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one rounding, in every second run."""
    runs = iter(range(1000))
    with pytest.raises(CheckError, match="odd sizes: two runs differ"):
        check_with(monkeypatch, lambda _, y: y * (1 + next(runs) % 2 * torch.finfo(y.dtype).eps))


def test_what_no_kernel_takes_is_not_run() -> None:
    mse = OPS["mse_loss"]
    weighted = next(example for example in mse.examples if "element weights" in example.name)
    with pytest.raises(NotRun, match="weights"):
        kernels._check(verify.Case(mse, weighted), torch.float32, CPU)
    with pytest.raises(NotRun, match="needs a GPU with 40 GiB to spare"):
        kernels._far(ADD_RELU, torch.float32, CPU)


def test_what_no_kernel_takes_in_some_arrangement_runs_in_the_others() -> None:
    """The summand of a batch norm whose rows have gaps, for one."""
    op = OPS["batch_norm_add_relu"]
    figures = kernels._check(verify.Case(op, op.examples[0]), torch.float32, CPU)
    assert figures["no kernel"] == {"padded rows": "the memory formats differ"}
    assert len(figures["errors in units of torch's"]) == 5


def test_layouts() -> None:
    image = torch.randn(2, 3, 4, 5)
    for layout in (kernels.misaligned, kernels.padded, kernels.channels_last):
        assert torch.equal(layout(image), image)
    assert kernels.misaligned(image).data_ptr() % 16 == 4 and kernels.misaligned(image).stride() == image.stride()
    assert kernels.padded(image).stride() == (72, 24, 6, 1)
    assert kernels.channels_last(image).is_contiguous(memory_format=torch.channels_last)
    for shape in ((13, 37), (1, 3, 4, 5)):
        distant = kernels.far(torch.empty(shape, device="meta"))
        last = sum(step * (size - 1) for step, size in zip(distant.stride(), shape, strict=True))
        assert distant.shape == shape and 2**31 < last < 2**31 + 2**12


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_sizes_reach_the_edges_of_tiles(name: str) -> None:
    op = OPS[name]
    widths = []
    for sizes, _ in list(kernels.arrangements(op, torch.device("cuda")).values())[1:3]:
        weight = op.examples[0].draw(sizes, torch.Generator())[0]["weight"]
        widths.append(tuple(weight.shape[:2]))
    assert widths == {"linear": [(256, 256), (257, 257)], "conv2d": [(64, 64), (65, 65)]}[name]


# Models ---------------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"autocast": True}], ids=str)
def test_training_beside_eager(options: dict[str, bool]) -> None:
    found = models._compare(models.Training(tiny, (1, 8, 8), **options), CPU)
    assert list(found["distance from float64 in units of eager's"]) == ["auto", "triton"]


def test_training_that_goes_astray_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["linear"]
    forward, backward = op.launchers
    monkeypatch.setitem(vars(op), "launchers", (lambda *arguments: forward(*arguments) * 1.01, backward))
    with pytest.raises(CheckError, match=r"with backend 'auto' [\d.]+ times as far from float64 as eager, not 2"):
        models._compare(models.Training(tiny, (1, 8, 8)), CPU)


def test_a_gradient_that_is_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = ADD_RELU.op.launchers
    monkeypatch.setitem(vars(ADD_RELU.op), "launchers", (forward, lambda *a: tuple(g * 1.01 for g in backward(*a))))
    with pytest.raises(CheckError, match="Jacobian"):
        models._gradcheck(ADD_RELU, CPU)


def test_transforms_are_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotRun, match="fastops verify --matrix"):
        models._transforms(ADD_RELU.op, CPU)
    monkeypatch.setattr(models, "on_a_gpu", lambda device: True)
    few = {"higher order": {"backward": matrix.FAMILIES["higher order"]["backward"]}}
    monkeypatch.setattr(matrix, "FAMILIES", few | {"objects": matrix.FAMILIES["objects"]})
    assert models._transforms(ADD_RELU.op, CPU) == {"transforms that hold": 4}
    forward, backward = ADD_RELU.op.launchers
    monkeypatch.setitem(vars(ADD_RELU.op), "launchers", (lambda *a: forward(*a) + 1, backward))
    with pytest.raises(CheckError, match="higher order, backward: AssertionError"):
        models._transforms(ADD_RELU.op, CPU)
