"""The file that keeps what `fastops.tune` found: damaged, not to be written, written by several, of other machines."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tuned import again, clock, mlp

import fastops
from fastops import tuning_cache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_cpu(no_interpreter: None) -> None:
    """oneDNN against ATen."""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"winners": [{"call": 1}], "tiles": []}',
        '{"winners": [], "tiles": [{"product": ["float1", "ieee", 1, 1], "tile": [1, 1, 1, 1, 1]}]}',
    ],
)
def test_damaged_file_is_survived(tuning_folder: Path, text: str) -> None:
    model, x = mlp(), torch.randn(5, 8)
    file = fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0)).path
    assert file is not None
    file.write_text(text)
    again()
    with pytest.warns(UserWarning, match="is damaged and counts for nothing until fastops.tune mends it"):
        assert fastops.explain("linear_relu", x, model[0].weight, model[0].bias).backend == "torch"
    with pytest.warns(UserWarning, match="is damaged"):
        fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    again()
    assert fastops.explain("linear_relu", x, model[0].weight, model[0].bias).backend == "onednn"


def test_folder_that_cannot_be_written(tuning_folder: Path) -> None:
    tuning_folder.write_text("a file, and no folder")
    model, x = mlp(), torch.randn(5, 8)
    with pytest.warns(UserWarning, match="counts in this process alone"):
        tuning = fastops.tune(model, x, timer=clock(onednn=1.0, torch=2.0))
    assert tuning.path is None and "kept nowhere" in str(tuning)
    assert fastops.explain("linear_relu", x, model[0].weight, model[0].bias).backend == "onednn"


def test_without_a_home(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTOPS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user whom nobody knows
    assert not tuning_cache.anything()
    with pytest.warns(UserWarning, match="this process alone: could not determine the home"):
        assert fastops.tune(mlp(), torch.randn(5, 8), timer=clock(onednn=1.0, torch=2.0)).path is None


def test_writers_at_the_same_time_lose_nothing(tuning_folder: Path) -> None:
    def write(writer: int) -> None:
        for i in range(20):
            tuning_cache.add(CPU, {("op", writer, i): "torch"}, {})

    with ThreadPoolExecutor(4) as pool:  # as processes: each opens the lock for itself
        list(pool.map(write, range(4)))
    tuning_cache._of.cache_clear()
    assert set(tuning_cache.of(CPU)) == {("op", writer, i) for writer in range(4) for i in range(20)}
    assert not list(tuning_folder.glob(".*"))


def test_other_versions_and_devices_have_files_of_their_own(
    tuning_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tuning_cache.add(CPU, {("op",): "torch"}, {})
    assert (
        file is not None
        and file.parent == tuning_folder
        and set(os.listdir(tuning_folder)) == {file.name, f"{file.name}.lock"}
    )
    saved = json.loads(file.read_text())
    assert saved["versions"]["torch"] == torch.__version__ and "threads" in saved["device"]
    for change in ("_versions", "_device"):
        with monkeypatch.context() as patch:
            patch.setattr(tuning_cache, change, lambda *_: "another")
            assert tuning_cache.path(CPU) != file
