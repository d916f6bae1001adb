"""`Report` itself: its text, with lines that stand for many rows, its JSON, and what it counts in a ``with``."""

from __future__ import annotations

import html
import itertools
import json
import random
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from swap_models import FlatLeNet, sequential
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.collapse import collapsed
from fastops.reporting import Report, Row

TEXT = """\
swapped layers
  conv1             Conv2d   fastops.nn.Conv2d fused with its ReLU
  conv2             Conv2d   fastops.nn.Conv2d
  fc{1,2}           Linear   fastops.nn.Linear fused with its ReLU (2 alike)
  fc3               Linear   fastops.nn.Linear
  norm              Linear   fastops.nn.Linear
fused activations
  relu(conv1)       ReLU     fused with conv1
  relu(fc1)         ReLU     fused with fc1
  relu(fc2)         ReLU     fused with fc2
left alone
  relu(max_pool2d)  ReLU     not fused: its input is max_pool2d, not a layer
not covered
  act               PReLU    runs as it is
  norms.{0-2}       RMSNorm  runs as it is (3 alike)
4 of 4 linear layers swapped, 2 of 2 convolutions swapped, 3 of 4 ReLUs fused"""


class Known(FlatLeNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.Linear(2, 2), nn.PReLU()
        self.norms = nn.ModuleList(nn.RMSNorm(3) for _ in range(3))


def test_text_and_summary() -> None:
    report = fastops.report(fastops.swap(Known()))
    assert str(report) == TEXT
    assert report.summary() == TEXT.splitlines()[-1] + "\nnot covered: 1 PReLU, 3 RMSNorm"
    assert html.unescape(report._repr_html_()) == f"<pre>{TEXT}</pre>"
    hidden = Report((Row("x<y", "ReLU", "fused & <done>", True, "ReLUs"),))
    assert "x&lt;y" in hidden._repr_html_() and "<done>" not in hidden._repr_html_()


def test_batch_norms_and_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].register_forward_hook(lambda *_: None)
    lines = str(fastops.report(fastops.swap(model))).splitlines()
    assert lines[:2] == ["swapped layers", "  {0,2}  Conv2d       fastops.nn.Conv2d (2 alike)"]
    assert lines[2:5] == [
        "batch norms",
        "  1      BatchNorm2d  folded into 0 in evaluation without gradients",
        "  3      BatchNorm2d  not folded: 2 has hooks or a replaced forward",
    ]
    assert lines[5:] == ["2 of 2 convolutions swapped, 1 of 2 batch norms folded"]
    assert str(fastops.report(nn.Identity())) == "nothing here that fastops knows"


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


class Uses(Weight):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, self.weight))


class Root(Weight):
    """Has a parameter of its own beside its modules, as transformers have."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(modules)


@pytest.mark.parametrize(
    "module",
    [
        *(nn.PReLU(), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3), nn.Softmax(1)),
        *(
            nn.ConvTranspose2d(1, 1, 1),
            nn.Embedding(3, 3),
            nn.MultiheadAttention(2, 1),
            nn.LSTM(2, 2),
            nn.GRUCell(2, 2),
        ),
        *(nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.NLLLoss(), nn.Bilinear(2, 2, 2), Weight()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_not_covered(module: nn.Module) -> None:
    rows = fastops.report(fastops.swap(Root(module))).rows
    found = [(row.name, row.layer, row.done) for row in rows if row.group == "not covered"]
    assert found == [("inner.0", type(module).__name__, False)]


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.LazyLinear(2), nn.MSELoss(), fastops.nn.LinearReLU(2, 2)),
        *(nn.Identity(), nn.Dropout(), nn.Flatten(), nn.MaxPool2d(2), nn.Sequential(), nn.ModuleDict(), nn.Module()),
        *(nn.ParameterList([nn.Parameter(torch.ones(2))]), Uses(), nn.TransformerEncoderLayer(2, 1).linear1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_covered_or_no_work(module: nn.Module) -> None:
    rows = fastops.report(fastops.swap(Root(module))).rows
    assert not [row for row in rows if row.group == "not covered"]


# Lines that stand for many rows ---------------------------------------------------------------------------------------


def names(*all: str) -> list[str]:
    return [name for name, _, _ in collapsed((name, "", "") for name in all)]


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([], []),
        (["fc"], ["fc"]),
        (["fc1", "fc2"], ["fc{1,2}"]),
        (["fc1", "fc2", "fc3", "fc5", "fc7", "fc8"], ["fc{1-3,5,7,8}"]),
        (["0", "2"], ["{0,2}"]),
        (["a.0", "a.1", "b.0", "b.1"], ["a.{0,1}", "b.{0,1}"]),
        (["l1.0.c1", "l1.0.c2", "l1.1.c1", "l1.1.c2", "l2.0.c1", "l2.0.c2"], ["l1.{0,1}.c{1,2}", "l2.0.c{1,2}"]),
        (["b08", "b09", "b10"], ["b{08-10}"]),
        (["b8", "b09", "b10"], ["b{8,09,10}"]),
        (["x", "x1"], ["x", "x1"]),
        ([f"layers.{i}.mlp.fc1" for i in range(32)], ["layers.{0-31}.mlp.fc1"]),
    ],
)
def test_lines(rows: list[str], lines: list[str]) -> None:
    assert names(*rows) == lines


def expanded(line: str) -> list[str]:
    """The names that a line stands for."""

    def numbers(part: str) -> list[str]:
        found = []
        for run in part.split(","):
            first, _, last = run.partition("-")
            found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
        return found

    parts = re.split("{(.*?)}", line)
    choices = [numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return list(map("".join, itertools.product(*choices)))


def test_a_line_stands_for_exactly_its_rows() -> None:
    drawn = random.Random(5)
    for _ in range(300):
        pool = [f"a{i}.b.{j}.c{k}" for i in range(3) for j in range(4) for k in range(2)] + ["d.7", "d.8", "e"]
        rows = [(drawn.choice(pool), "L", drawn.choice("xy")) for _ in range(drawn.randrange(1, 40))]
        found = Counter[tuple[str, str]]()
        for name, _, outcome in collapsed(rows):
            words = outcome.split(" (")
            each = expanded(name)
            count = int(words[1].split()[0]) if len(words) > 1 else 1
            assert count % len(each) == 0
            for one in each:
                found[one, words[0]] += count // len(each)
        assert found == Counter((name, outcome) for name, _, outcome in rows)


# JSON -----------------------------------------------------------------------------------------------------------------


def test_json() -> None:
    model, x = fastops.swap(sequential()), torch.randn(2, 6)
    with fastops.report(model, x) as report, fastops.backend("torch"):
        model(x)
    found = json.loads(report.to_json())
    assert list(found) == ["rows", "notes", "totals", "ran", "versions"]
    assert [Row(**row) for row in found["rows"]] == list(report.rows)
    assert found["notes"] == list(report.notes) and len(found["notes"]) > 0
    assert found["totals"] == {
        "swapped": 3,
        "fused": 2,
        "folded": 0,
        "groups": {"linear layers": {"done": 3, "of": 3}, "ReLUs": {"done": 2, "of": 2}},
    }
    assert found["ran"] == [
        {"op": "linear", "way": "torch", "times": 1},
        {"op": "linear_relu", "way": "torch", "times": 2},
    ]
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["fastops"] == fastops.__version__
    assert found["versions"].keys() == {"fastops", "python", "torch", "triton"}


# What ran -------------------------------------------------------------------------------------------------------------

x = torch.randn(2, 6)


@pytest.mark.parametrize("way", ["torch", "onednn", "triton"])
def test_what_ran_and_how_often(way: str) -> None:
    model = fastops.swap(sequential())
    expected = {("linear_relu", way): 6, ("linear", way): 3}
    report = fastops.report(model)
    plain = fastops.report(model)
    with report as entered:
        assert entered is report
        for _ in range(3):
            with fastops.backend(way):
                model(x).sum().backward()
        fastops.explain("linear", x, x)
    model(x)
    assert report.ran == expected
    assert report == plain and hash(report) == hash(plain) and not plain.ran
    assert str(report).splitlines()[-4:-1] == [
        "ran inside the block",
        f"  linear       {way:6}  3 times",
        f"  linear_relu  {way:6}  6 times",
    ]
    with report, fastops.backend("torch"):
        model[4](torch.randn(2, 7))
    assert report.ran["linear", "torch"] == expected.get(("linear", "torch"), 0) + 1


def test_results_are_the_same_inside() -> None:
    model = fastops.swap(sequential())
    expected = model(x)
    with fastops.report(model), torch.no_grad():
        assert torch.equal(model(x), expected)


def test_auto_on_a_plain_cpu_takes_its_shortcut_outside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_INTERPRETER", False)
    monkeypatch.setattr(dispatch, "tuned", False)
    with fastops.report(sequential()) as report:
        expected = FF.linear(x, x)
    assert report.ran == {("linear", "torch"): 1} and torch.equal(FF.linear(x, x), expected)


def test_blocks_in_blocks_and_errors() -> None:
    model = fastops.swap(sequential())
    outer, inner = fastops.report(model), fastops.report(model)
    before = dispatch._thread.selection
    with outer:
        with pytest.raises(RuntimeError, match="cannot be multiplied"), inner:
            FF.linear(x, x)
            FF.linear(x, x[:, :2])
        with fastops.backend("torch"), outer:
            FF.linear(x, x)
        assert dispatch.selected_backend() == "auto"
    assert dispatch._thread.selection is before
    assert sum(inner.ran.values()) == 1 and sum(outer.ran.values()) == 2


def test_threads_count_their_own() -> None:
    model = fastops.swap(sequential())
    shared = fastops.report(model)
    reports = [fastops.report(model) for _ in range(4)]
    ready = threading.Barrier(len(reports))

    def work(report: Report, times: int) -> None:
        with report, shared, fastops.backend("torch"):
            ready.wait()
            for _ in range(times):
                FF.linear(x, x)

    threads = [threading.Thread(target=work, args=(report, 100 * i)) for i, report in enumerate(reports)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.ran["linear", "torch"] for report in reports] == [0, 100, 200, 300]
    assert shared.ran == {("linear", "torch"): 600}
    with shared:
        other = threading.Thread(target=FF.linear, args=(x, x))
        other.start()
        other.join()
    assert sum(shared.ran.values()) == 600


def test_a_kernel_that_fails_ran_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("fastops.ops.op.failed", failed := set())
    monkeypatch.setattr(dispatch, "failed", failed)
    monkeypatch.setitem(vars(fastops.ops.OPS["linear"]), "launchers", (fail, fail))
    with fastops.report(sequential()) as report, fastops.backend("triton"):
        with pytest.warns(fastops.FallbackWarning):
            FF.linear(x, x)
        FF.linear(x, x)
    assert report.ran == {("linear", "torch"): 2}


def test_compiled_code_is_not_counted() -> None:
    torch._dynamo.reset()
    model = fastops.swap(sequential())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with fastops.report(model) as report:
        found = compiled(x)
    assert not report.ran and torch.equal(found, compiled(x))


def test_calls_under_autocast_count_once() -> None:
    with fastops.report(sequential()) as report, torch.autocast("cpu", torch.bfloat16), fastops.backend("torch"):
        assert FF.linear(x, x).dtype is torch.bfloat16
    assert report.ran == {("linear", "torch"): 1}


def test_the_page_shows_what_is_printed() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    page = (Path(__file__).parent.parent / "docs" / "swap.md").read_text()
    (shown,) = re.findall("```text\n(.*?)\n```", page, re.DOTALL)
    assert shown == str(fastops.report(fastops.swap(models.resnet18(), exclude="layer4.1")))
