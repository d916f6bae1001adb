"""What ``fastops qualify`` tells of a GPU: times, ways, shares and its page, here of made-up figures."""

from __future__ import annotations

import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops import measured, timing
from fastops.cli import qualify, verify
from fastops.cli.verify import CheckError
from fastops.models import FashionMLP
from fastops.ops import OPS
from fastops.ops.op import ATEN_IS_FASTER, FUSES
from fastops.qualify import cases, graphs, kernels, report, speed, ways
from fastops.qualify.cases import HOLDS, NotRun, Result

CPU = torch.device("cpu")
ADD_RELU = verify.Case(OPS["add_relu"], OPS["add_relu"].examples[0])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told of a GPU is told here, of made-up times."""

    def made_up(contestants: dict[str, Any], *_: object) -> dict[str, list[float]]:
        seconds = {"eager": 2.0, "torch": 2.0, "vendor": 3.0, "fastops": 1.0, "triton": 4.0}
        return {name: [seconds.get(name, 5.0)] * 3 for name in contestants}

    for module in (speed, ways, report):
        monkeypatch.setattr(module, "on_a_gpu", lambda device: True)
    for module in (speed, ways):
        monkeypatch.setattr(module, "timed", made_up)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(measured, "name_of", lambda device: "Made-up GPU")


def nothing() -> None:
    pass


@pytest.mark.usefixtures("as_on_a_gpu")
def test_contestants_that_cannot_run_are_left_out() -> None:
    def absent() -> None:
        raise NotRun("it is not installed")

    def broken() -> None:
        raise ValueError("no compiler")

    contestants = {"eager": nothing, "fastops": nothing, "Liger": absent, "torch.compile": broken}
    found = speed.contest(contestants, CPU, {"bytes": 8})
    assert found["left out"] == {"Liger": "it is not installed", "torch.compile": "ValueError: no compiler"}
    assert found["bytes"] == 8 and found["ran"] == list(found["times"]) == ["eager", "fastops"]
    assert (found["times"]["fastops"]["seconds"], found["times"]["fastops"]["ratio"]) == (1.0, (0.5, 0.5, 0.5))
    for name in ("eager", "fastops"):
        with pytest.raises(ValueError, match="no compiler"):
            speed.contest({**contestants, name: broken}, CPU, {})


def test_liger_is_called_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a made-up one, which overwrites its arguments, as the real one does."""

    def loss(input: Tensor, target: Tensor) -> tuple[Tensor, None]:
        result = nn.functional.cross_entropy(input, target)
        input.detach().zero_()
        return result, None

    name = "liger_kernel.transformers.functional"
    fake = types.ModuleType(name)
    fake.liger_cross_entropy = loss  # type: ignore[attr-defined]
    for parent in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, fake)
    op = OPS["cross_entropy"]
    mean, none = (next(e for e in op.examples if e.name == f"indices, {name}") for name in ("mean", "none"))
    found = speed._op(op, mean, torch.float32, False, False, CPU)
    assert found["ran"] == ["eager", "fastops", "Liger"] and found["left out"] == {}
    found = speed._op(op, none, torch.float32, False, False, CPU)
    assert found["left out"] == {"Liger": "not compared with these options"}


def test_work_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all its tensors, once; floating-point operations of its products."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    op = OPS["linear"]
    rows, features, outputs = kernels.SMALL
    tensors = 4 * (rows * features + outputs * features + outputs)
    result = 4 * rows * outputs
    for backward, times in ((False, 1), (True, 3)):
        found = speed._op(op, op.examples[0], torch.float32, backward, True, CPU)
        assert found["flops"] == times * 2 * rows * features * outputs
        assert found["bytes"] == times * tensors + (2 if backward else 1) * result
        assert found["times"] == {}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("seconds", "won"),
    [
        ({"vendor": [2.0, 2.0, 2.0], "triton": [1.0, 1.0, 1.0], "torch": [1.5, 1.5, 1.5]}, "triton"),
        ({"vendor": [2.0, 2.0, 2.0], "triton": [1.99, 1.99, 1.99]}, "vendor"),  # not clearly
        ({"vendor": [2.0, 2.0, 2.0], "triton": [1.0, 1.0, 3.0]}, "vendor"),  # not in every turn
    ],
)
def test_which_way_won(seconds: dict[str, list[float]], won: str) -> None:
    assert ways._won(seconds, "vendor") == won


@pytest.mark.usefixtures("as_on_a_gpu")
def test_classes_of_a_model() -> None:
    """Each call with and without gradients; the rule of the interpreter takes kernels."""
    model, x = fastops.swap(FashionMLP()), torch.randn(2, 784)
    entries = ways.ways_of(model, x)
    assert {(entry["rule"], entry["way"]) for entry in entries} == {("triton", "torch")}
    classes = [entry["class"][:3] for entry in entries]
    assert classes == [
        (op, gradients, "torch.float32")
        for gradients in (True, False)
        for op in ("linear_relu", "linear_relu", "linear")
    ]
    assert entries[0]["class"][4][0] == ((2, 1024), (0, 1)) and entries[0]["seconds"] == {"triton": 4.0, "torch": 2.0}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_compilations_time_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of each call is gone once."""
    gone: list[str] = []
    run = ways.Call.run
    monkeypatch.setattr(ways.Call, "run", lambda call: gone.append(fastops.dispatch.selected_backend()) or run(call))
    monkeypatch.setattr(ways, "timed", None)
    example = ADD_RELU.example
    assert speed._op_ways(ADD_RELU.op, example, torch.float32, False, CPU) == {"classes": []}
    assert gone == ["auto", "torch"] * 2
    assert {case.name.rpartition(" / ")[2] for case in speed.compilations(torch.device("cuda"))} == {"kernels"}


def test_no_class_is_told_without_a_gpu() -> None:
    assert ways.ways_of(fastops.swap(nn.Sequential(nn.Linear(3, 4))), torch.randn(2, 3)) == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_products_of_tf32_are_held_to_two_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole product of absolute values. A CPU does not round: so the shares are small until something is."""
    small: Any = {"odd sizes": (kernels.SMALL, kernels.padded)}
    monkeypatch.setattr(kernels, "arrangements", lambda op, device: small)
    monkeypatch.setattr(kernels, "on_a_gpu", lambda device: True)
    case = next(case for case in kernels.verify.CASES if case.name == "linear / matrix")
    (share,) = kernels._rounded(case, CPU)["shares of two roundings to tf32"].values()
    assert 0 <= share < 0.01
    product = FF.linear
    for scale, fails in ((1 + 2**-10, False), (1 + 2**-6, True)):
        monkeypatch.setattr(FF, "linear", lambda *words, by=scale, **named: by * product(*words, **named))
        with pytest.raises(CheckError, match="times that of two roundings") if fails else nullcontext():
            kernels._rounded(case, CPU)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_report_of_made_up_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of what the device reaches, the table of ways, and the page: of a GPU that there is not."""
    made = report.Report(CPU, 8.0, tmp_path / "q.json", tmp_path / "q.html", tmp_path)
    made.begin("kernels", ["op / float32", "op / tf32"])
    made.add("kernels", Result("op / float32", HOLDS, "", 1.0, {"errors in units of torch's": {"odd sizes": 0.4}}))
    made.add("kernels", Result("op / tf32", HOLDS, "", 1.0, {"shares of two roundings to tf32": {"odd sizes": 0.3}}))
    made.end("kernels")
    made.begin("speed", ["peaks", "op", "ways", "later"])
    made.add("speed", Result("peaks", HOLDS, "", 1.0, {"rates": {"copy": 1e12, "float32": 4e12}}))
    times = {
        name: {"seconds": seconds, "ratio": (seconds, seconds, seconds), "host": 1e-6}
        for name, seconds in (("eager", 1.0), ("fastops", 0.5))
    }
    work = {"way": "vendor", "dtype": "float32", "bytes": 1e11, "flops": 1e12}
    made.add(
        "speed", Result("op", HOLDS, "", 1.0, {**work, "times": times, "ran": [], "left out": {"Liger": "absent"}})
    )
    key = ("linear", True, "torch.float32", "", (((2, 4), (0, 1)),), ())
    entry = {"class": key, "rule": "torch", "way": "triton", "seconds": {"triton": 1e-6, "torch": 2e-6}}
    made.add("speed", Result("ways", HOLDS, "", 1.0, {"classes": [entry]}))
    made.end("speed")
    data = json.loads((tmp_path / "q.json").read_text())
    ours = data["parts"]["speed"][1]["figures"]["times"]["fastops"]
    assert (ours["of copy"], ours["of matmul"]) == pytest.approx((0.2, 0.5))
    assert data["left"]["speed"] == ["later"]
    table = json.loads((tmp_path / "Made-up-GPU.json").read_text())
    assert table == data["table"] and table["gpu"] == "Made-up GPU" and table["torch"] == torch.__version__
    page = (tmp_path / "q.html").read_text()
    for text in (
        "0.50 (0.50 - 0.50)",
        "20 %",
        "50 %",
        "op: Liger: absent",
        "linear float32  2x4",
        "later",
        "to tf32 odd sizes 0.3",
    ):
        assert text in page
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.of.cache_clear()
    assert measured.of(torch.device("cuda:0")) == {key: "triton"}  # `auto` can read what was written
    measured.of.cache_clear()


def test_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two events there is the call alone: the cache is emptied before."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = "start" if sum(line == "made" for line in log) % 2 == 0 else "end"
            log.append("made")

        def record(self) -> None:
            log.append(self.name)

        def elapsed_time(self, end: Event) -> float:
            assert (self.name, end.name, log[-1]) == ("start", "end", "waited")
            return 3.0

    class Flushed:
        device = CPU

        def zero_(self) -> None:
            log.append("flushed")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("waited"))
    assert timing._events(Flushed(), lambda: log.append("call"), 2) == pytest.approx(3e-3)  # type: ignore[arg-type]
    assert log == ["made"] * 4 + [*["flushed"] * timing.FLUSHES, "start", "call", "end"] * 2 + ["waited"]


def test_what_only_a_gpu_has_is_not_run() -> None:
    with pytest.raises(NotRun, match="CUDA graphs need a GPU"):
        graphs.captured(nothing, CPU)
    assert ATEN_IS_FASTER.way == "torch" and FUSES.way == "triton"  # the ways that tables know


def test_the_plan_has_every_part() -> None:
    assert [part for part, _ in qualify.PLAN[:4]] == list(cases.PARTS)
    shares = [share for _, share in qualify.PLAN]
    assert shares == sorted(shares) and shares[-1] == dict(qualify.PLAN)["speed"] == 1
