"""``fastops bench`` with models: one of the user's own, and what happens to one that is compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import fail, seen
from torch import nn

from fastops.bench import cases
from fastops.bench.cases import CASES, model_contest
from fastops.bench.contestants import EAGER, OURS
from fastops.cli import main

CPU = torch.device("cpu")
ALONE = ("--contestant", "fastops", "--device", "cpu")
NAMED = {case.name: case for case in CASES}

OWN = """
import sys
import torch
from torch import nn

def factory():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU())

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(90, 4), nn.Embedding(7, 4), nn.Linear(4, 90)
    def forward(self, words, places):
        return {"logits": self.head(torch.relu(self.words(words) + self.places(places)))}

class Nothing(nn.Module):
    def forward(self, x):
        return x > 0

class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = __import__("threading").Lock()

class Swapped:
    made = __import__("fastops").swap(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))

model = factory()
number = 3

def broken():
    raise ValueError("two\\nlines")

def stops():
    raise SystemExit(4)

def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))

def norm():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> str:
    """The name of a module in the current folder, which nothing else can import."""
    name = "own_models"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("factory --input 3,6", ["factory-3x6/step", "factory-3x6/inference"]),
        ("model --input 3,6", ["model-3x6/step", "model-3x6/inference"]),
        ("Swapped.made --input 3,6", ["Swapped.made-3x6/step", "Swapped.made-3x6/inference"]),
        (
            "Words --input 2,5:int64 --input 5:int64",
            ["Words-2x5:int64-5:int64/step", "Words-2x5:int64-5:int64/inference"],
        ),
        ("Nothing --input 3:bf16", ["Nothing-3:bfloat16/inference"]),
        ("norm --input 1,6", ["norm-1x6/inference"]),  # torch trains no batch norm on a single value
        ("factory --input 3,6 --dtype bf16", ["factory-3x6/step", "factory-3x6/inference"]),
    ],
)
def test_model_of_ones_own(own: str, words: str, expected: list[str], tmp_path: Path) -> None:
    assert main(["bench", *f"{own}:{words}".split(), *ALONE, "--pairs", "2", "--json", "own.json"]) == 0
    rows = json.loads((tmp_path / "own.json").read_text())["rows"]
    assert [(row["case"], row["contestant"]) for row in rows] == [(n, c) for n in expected for c in (EAGER, OURS)]


def test_a_model_that_is_swapped_is_beside_its_plain_self(own: str) -> None:
    from fastops.bench.own import own_cases

    contest = own_cases(f"{own}:Swapped.made", ["3,6"], CPU)[1].prepare(CPU, torch.float32)
    eager, ours = (seen(contest, name) for name in (EAGER, OURS))
    assert [launch.name for launch in eager.launches] == ["linear", "relu"]
    assert [launch.name for launch in ours.launches] == ["linear", "relu_"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("{own}:factory", "say what {own}:factory is called with: --input 8,3,224,224"),
        ("{own} --input 3", "'{own}' is no model: package.module:factory, where the factory makes an nn.Module"),
        ("no.such:factory --input 3", "cannot import no.such: ModuleNotFoundError: No module named 'no'"),
        ("exits:factory --input 3", "cannot import exits: SystemExit: 3"),
        ("{own}:nothing --input 3", "{own} has no nothing"),
        ("{own}:number --input 3", "{own}:number is no nn.Module and makes none: it is of type int"),
        ("{own}:broken --input 3", "{own}:broken() raises ValueError: two lines"),
        ("{own}:scripted --input 3,6", "{own}:scripted is scripted, which fastops cannot swap"),
        ("{own}:stops --input 3", "{own}:stops() raises SystemExit: 4"),
        ("{own}:dict --input 3", "{own} has no dict"),
        ("{own}:factory --input 3,6 --json one --html one", "--json and --html are both one"),
        ("{own}:torch.Size --input 3", "{own}:torch.Size() returns no nn.Module but Size"),
        ("{own}:Alone --input 3", "the model cannot be copied for each contestant: TypeError: cannot pickle"),
        (
            "{own}:factory --input 3,7",
            "{own}:factory fails with --input 3,7 on cpu: RuntimeError: mat1 and mat2 shapes",
        ),
        ("{own}:factory --input 3,6 --input 3", "{own}:factory fails with --input 3,6 --input 3 on cpu: TypeError"),
        ("{own}:factory --input 3x6", "--input '3x6' is no shape: sizes with commas between them"),
        ("{own}:factory --input 3,", "--input '3,' is no shape"),
        ("{own}:factory --input 0,6", "--input '0,6' is no shape"),
        ("{own}:factory --input 3,6:int7", "--input '3,6:int7' has an unknown dtype: one of fp32, bf16, "),
        ("{own}:factory --input 3,6:", "--input '3,6:' has an unknown dtype"),
        ("{own}:factory --input 3,6 --op mse_loss", "a model of yours is timed alone"),
    ],
)
def test_mistakes_with_a_model_of_ones_own(own: str, words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(capsys, "bench", *words.format(own=own).split()).startswith(f"fastops: error: {line.format(own=own)}")


def test_models_run_under_autocast() -> None:
    case = NAMED["FashionMLP-64/inference"]
    contest = case.prepare(CPU, torch.bfloat16)
    dtypes = {name: contest.calls[name]().dtype for name in (EAGER, OURS)}  # type: ignore[attr-defined]
    assert dtypes == {EAGER: torch.bfloat16, OURS: torch.bfloat16}
    assert contest.way() == "triton"  # of the interpreter


def test_a_model_without_calls_of_fastops_says_so() -> None:
    contest = model_contest(nn.Tanh(), (torch.ones(3),), None, lambda _: cases.mean_of, False, torch.float32)
    assert contest.way() == "none"


def test_the_model_that_is_compared_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contest = model_contest(model, (torch.randn(4, 3),), None, lambda _: cases.mean_of, True, torch.float32)
    for name in (EAGER, OURS):
        contest.calls[name]()
    assert not model.training and type(model[0]) is nn.Linear
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
