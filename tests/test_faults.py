"""What goes wrong around the package: processes, folders, files of others. Nothing is lost, and nobody hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_python
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastops
from fastops import tuning_cache
from fastops.files import replacing

CPU = torch.device("cpu")


# Processes ------------------------------------------------------------------------------------------------------------


class Transformed(Dataset[Tensor]):
    """Samples that a swapped model makes: in the workers of a loader."""

    def __init__(self) -> None:
        layer = nn.Linear(3, 4)
        with torch.no_grad():  # whole numbers: a worker that is no fork has numpy's products, rounded in any order
            for parameter in layer.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) - 5)
        self.model = fastops.swap(nn.Sequential(layer, nn.ReLU()))

    def __len__(self) -> int:
        return 6

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        with fastops.backend("triton"):
            return self.model(torch.full((3,), float(index)))


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_loader_run_kernels(start: str, workers: int) -> None:
    """Kernels ran before in this process, whose locks and caches a fork inherits."""
    data = Transformed()
    expected = torch.stack([data[index] for index in range(len(data))])
    loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def remember(number: int) -> None:
    """Tune something of one's own, as one of several processes."""
    call = tuning_cache.key("linear", (torch.empty(number, 3), torch.empty(2, 3), None))
    assert call is not None
    for _ in range(10):
        tuning_cache.add(CPU, {call: "torch"}, {})


def test_processes_that_tune_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=remember, args=(number,)) for number in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())["winners"]) == 4
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".lock")]


# Folders --------------------------------------------------------------------------------------------------------------


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.parametrize("fault", ["a file in its place", "no space", "read-only"])
def test_what_cannot_be_written_counts_in_this_process(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(folder))
    if fault == "a file in its place":
        folder.write_text("")
    elif fault == "no space":

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        folder.mkdir(mode=0o500)
        if is_root():  # whom no permission stops
            original = Path.open

            def denied(self: Path, mode: str = "r", *words: Any, **options: Any) -> Any:
                if "w" in mode:
                    raise PermissionError(13, "Permission denied")
                return original(self, mode, *words, **options)

            monkeypatch.setattr(Path, "open", denied)
    tuning_cache._of.cache_clear()
    call = tuning_cache.key("linear", (torch.empty(9, 3), torch.empty(2, 3), None))
    assert call is not None
    with pytest.warns(UserWarning, match="counts in this process alone") as caught:
        assert tuning_cache.add(CPU, {call: "torch"}, {}) is None
    assert len(caught) == 1
    assert tuning_cache.of(CPU)[call] == "torch"
    monkeypatch.undo()
    assert not folder.is_dir() or not [path for path in folder.iterdir() if path.suffix != ".lock"]
    tuning_cache._of.cache_clear()


# Files of others ------------------------------------------------------------------------------------------------------


class Harmful:
    """A pickle that runs a command where somebody loads it without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "folder"])
def test_what_is_no_checkpoint_is_one_line_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "somebody.pt", tmp_path / "trace"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Harmful(trace)))
    elif kind == "torch":
        torch.save({"format": "fastops checkpoint 1", "model": Harmful(trace)}, path)
    elif kind == "text":
        path.write_text("no checkpoint")
    else:
        path.mkdir()
    words = ["train", "two-layer-net", "--device", "cpu", "--resume", path, "--output", tmp_path]
    done = run_python(["-m", "fastops", *words])
    assert done.returncode != 0 and not trace.exists()
    assert done.stderr.startswith("fastops: error: ") and len(done.stderr.splitlines()) == 1


def write_on(path: Path, written: Any) -> None:
    """One checkpoint after the other, each as large as one of a small model; ``written`` is the last whole one."""
    tensor = torch.zeros(300_000)
    for number in range(1, 1_000_000):
        with replacing(path) as file:
            torch.save({"number": number, "tensor": tensor + number}, file)
        written.value = number


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_signal_while_a_checkpoint_is_written_keeps_the_last_good_one(how: signal.Signals, tmp_path: Path) -> None:
    """At twenty moments, so that some of them lie within the writing."""
    path, context = tmp_path / "checkpoint.pt", multiprocessing.get_context("fork")
    for moment in range(20):
        written = context.Value("i", 0, lock=False)
        writer = context.Process(target=write_on, args=(path, written))
        writer.start()
        while not written.value:
            time.sleep(0.001)
        time.sleep(0.001 * moment)
        assert writer.pid is not None
        os.kill(writer.pid, how)
        writer.join(30)
        assert writer.exitcode == -how
        content = torch.load(path, weights_only=True)
        assert content["number"] >= written.value and (content["tensor"] == content["number"]).all()


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "onednn", "torch"])
def test_a_loss_that_is_nan_is_eagers(backend: str) -> None:
    """No error and no warning: the user's own check finds it, where and when it does without fastops."""

    def train(model: nn.Module, criterion: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        losses = []
        for step in range(3):
            if step == 1:
                x[0, 0] = torch.inf
            optimizer.zero_grad()
            loss = criterion(model(x), torch.tensor([0, 1, 0, 1]))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *model.parameters()]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

    expected = train(model(), nn.CrossEntropyLoss())
    with fastops.backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "invalid value encountered")  # numpy's, in the interpreter
        found = train(fastops.swap(model()), fastops.swap(nn.CrossEntropyLoss()))
    assert expected[2].isnan()
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


# For a long time ------------------------------------------------------------------------------------------------------


def test_a_short_soak() -> None:
    """What `make soak` runs for half an hour."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_python([Path(__file__).parent / "soak.py", "--minutes", "0.02"], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("ResNet-18: ", "FashionMLP: ", "serve ", "tune ", "new_model ", "memory: ", "plans: "):
        assert words in done.stdout
