"""The tables of ways that were measured on kinds of GPUs. Those here are made up, of a GPU that there is not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops import dispatch, measured, tuning_cache

GPU = "Made-up GPU (80 GB)"
REASON = "fastops qualify measured it the fastest on this kind of GPU"


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda:0")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU of that name, with Triton, whose tensors are fake; nobody tuned."""
    monkeypatch.setattr(dispatch, "_INTERPRETER", False)
    monkeypatch.setattr(dispatch, "triton_installed", True)
    monkeypatch.setattr(dispatch, "kinds_measured", True)
    monkeypatch.setattr(dispatch, "LEAST_SAVED", 0)  # no call is too small
    monkeypatch.setattr(measured, "name_of", lambda device: GPU)
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning_cache, "_versions", dict)
    measured.of.cache_clear()
    tuning_cache._of.cache_clear()
    with FakeTensorMode(), fastops.backend("auto"):
        yield
    measured.of.cache_clear()
    tuning_cache._of.cache_clear()


def write(folder: Path, *won: tuple[str, tuple[Any, ...], str]) -> None:
    """A table in which these calls went these ways."""
    entries = []
    for op, arguments, way in won:
        key = tuning_cache.key(op, arguments)
        assert key is not None
        entries.append({"class": measured.shape_class(key), "way": way, "seconds": {way: 1.0}})
    (folder / "Made-up-GPU-80-GB.json").write_text(json.dumps(measured.table(GPU, {}, entries)))
    measured.of.cache_clear()


def test_no_figures_of_a_gpu_are_made_up() -> None:
    """Every table that ships names the GPU that it was measured on, and is no damaged one."""
    for file in (Path(measured.__file__).with_name("kernels") / "measured").glob("*.json"):
        table = json.loads(file.read_text())
        assert file.name == measured.file_name(table["gpu"]) and table["torch"] and table["won"]


def test_the_table_goes_before_the_rule(tmp_path: Path) -> None:
    x, w = fake(64, 512, dtype=torch.bfloat16), fake(256, 512, dtype=torch.bfloat16)
    assert fastops.explain("linear_relu", x, w).backward == "vendor"  # the rule: there is no table yet
    write(tmp_path, ("linear_relu", (x, w, None), "torch"), ("linear", (x, w, None), "triton"))
    assert (str(fastops.explain("linear_relu", x, w)), fastops.explain("linear", x, w).way) == (
        f"torch: {REASON}",
        "triton",
    )
    write(tmp_path, ("linear", (x, w, None), "vendor"))
    found = fastops.explain("linear", x, w)
    assert (found.backend, found.backward, found.reason, found.way) == ("triton", "vendor", REASON, "vendor")


def test_calls_that_are_too_small_go_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = fake(64, 512)
    write(tmp_path, ("add_relu", (x, x), "triton"))
    assert fastops.explain("add_relu", x, x).backend == "triton"
    monkeypatch.setattr(dispatch, "LEAST_SAVED", 2 * 64 * 512 * 4 + 1)
    assert "cost the host" in fastops.explain("add_relu", x, x).reason


def test_what_was_tuned_here_goes_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = fake(64, 512), fake(256, 512)
    write(tmp_path, ("linear", (x, w, None), "triton"))
    key = tuning_cache.key("linear", (x, w, None))
    monkeypatch.setattr(dispatch, "PLAIN", (*dispatch.PLAIN, type(x)))
    monkeypatch.setattr(dispatch, "tuned", True)
    monkeypatch.setattr(tuning_cache, "of", lambda device: {key: "torch"})
    assert fastops.explain("linear", x, w).reason == "fastops.tune measured it the fastest here"
    assert fastops.explain("linear", fake(65, 512), w).reason == REASON


def test_a_class_holds_for_shapes_near_by(tmp_path: Path) -> None:
    x, w = fake(64, 512), fake(256, 512)
    write(tmp_path, ("linear", (x, w, None), "triton"))

    def way(*arguments: Any) -> str:
        return fastops.explain("linear", *arguments).backend

    assert way(fake(60, 500), fake(200, 500)) == way(x, w) == "triton"
    for other in (
        (fake(128, 512), w),  # twice the rows
        (x, fake(512, 256).t()),  # another order in memory
        (x, w, fake(256)),
        (x.bfloat16(), w.bfloat16()),
        (x.requires_grad_(), w),
    ):
        assert way(*other) == "torch"


def test_sizes_up_to_8_are_classes_of_their_own() -> None:
    *_, layouts, _ = measured.shape_class(("op", True, "", "", ((3, 7, 9, 100, 1, 2, 3, 4), ()), ()))
    assert layouts == (((3, 7, 8, 128), (3, 2, 1, 0)), ((), ()))


def test_a_selected_backend_and_what_no_kernel_takes_stay_as_they_are(tmp_path: Path) -> None:
    x, w = fake(64, 512), fake(256, 512)
    write(tmp_path, ("linear", (x, w, None), "triton"), ("linear", (x.int(), w.int(), None), "triton"))
    with fastops.backend("torch"):
        assert fastops.explain("linear", x, w).reason == "backend 'torch' is selected"
    assert fastops.explain("linear", x.int(), w.int()).reason == "no kernel for torch.int32"


def test_a_head_larger_than_its_budget_takes_no_torch_expression(tmp_path: Path) -> None:
    """No speed is worth more memory than was asked for."""
    x, w, target = fake(4096, 64), fake(32000, 64), torch.empty(4096, dtype=torch.int64, device="cuda:0")
    arguments: list[tuple[Any, ...]] = []
    decide = dispatch._way
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_way", lambda op, found, chosen: arguments.append(found) or decide(op, found, chosen))
        assert fastops.explain("linear_cross_entropy", x, w, target).backend == "triton"
    write(tmp_path, ("linear_cross_entropy", arguments[0], "torch"))
    assert fastops.explain("linear_cross_entropy", x, w, target).backend == "triton"


@pytest.mark.parametrize("content", ["", "[]", '{"won": [{"class": ["x"], "way": "nowhere"}]}', '{"won": 3}'])
def test_a_damaged_table_counts_for_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "Made-up-GPU-80-GB.json").write_text(content)
    measured.of.cache_clear()
    with pytest.warns(UserWarning, match=r"Made-up-GPU-80-GB.json is damaged and counts for nothing"):
        assert fastops.explain("linear", fake(64, 512), fake(256, 512)).backend == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is read once
        assert fastops.explain("linear", fake(64, 512), fake(256, 512)).backend == "torch"


def test_entries_that_disagree_leave_the_rule() -> None:
    entries = [
        {"class": ["linear", name], "way": way} for name, way in (("a", "torch"), ("b", "torch"), ("a", "triton"))
    ]
    assert measured.table(GPU, {"torch": "2"}, entries) == {"gpu": GPU, "torch": "2", "won": [entries[1]]}
