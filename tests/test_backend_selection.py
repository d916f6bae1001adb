"""`fastops.backend` and the environment's variable: what is selected, where, how long, and what is imported."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastops
import fastops.functional as FF
from fastops import dispatch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    """As in a process whose environment prefers no way."""
    with fastops.backend("auto"):
        yield


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None, 3])
def test_unknown_backend(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown backend .*: expected one of 'auto', 'triton', 'onednn', 'torch'"):
        fastops.backend(name)


def test_backend_is_a_decorator_too() -> None:
    assert fastops.backend("onednn")(dispatch.selected_backend)() == "onednn"
    assert dispatch.selected_backend() == "auto"


def test_a_backend_is_selected_for_a_thread() -> None:
    """One context manager, entered by several threads at a time."""
    selected, seen = fastops.backend("torch"), list[str]()
    with selected, ThreadPoolExecutor(1) as pool:
        seen.append(pool.submit(dispatch.selected_backend).result())
        seen.append(pool.submit(selected(dispatch.selected_backend)).result())
    assert seen == [dispatch.selected_backend(), "torch"]


def test_contexts_nest_and_can_be_used_again() -> None:
    onednn, torchs = fastops.backend("onednn"), fastops.backend("torch")
    seen = [dispatch.selected_backend()]
    with onednn, torchs, onednn:
        seen.append(dispatch.selected_backend())
        with pytest.raises(ZeroDivisionError), torchs:
            seen.append(dispatch.selected_backend())
            raise ZeroDivisionError
        seen.append(dispatch.selected_backend())
    seen.append(dispatch.selected_backend())
    with torchs:
        seen.append(dispatch.selected_backend())
    assert seen == ["auto", "onednn", "torch", "onednn", "auto", "torch"]


def run_new_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTOPS_BACKEND")}
    environment = {**kept, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_environment_variable() -> None:
    code = "import fastops; from fastops import dispatch; print(dispatch.selected_backend())"
    result = run_new_python(code, FASTOPS_BACKEND="onednn")
    assert result.stdout.split() == ["onednn"], result.stderr


def test_wrong_environment_variable() -> None:
    result = run_new_python("import fastops", FASTOPS_BACKEND="gpu")
    assert result.returncode == 1
    expected = "ValueError: environment variable FASTOPS_BACKEND: unknown backend 'gpu': expected one of 'auto', "
    assert result.stderr.splitlines()[-1].startswith(expected)


def test_no_triton_is_imported_before_a_kernel_is_needed() -> None:
    code = (
        "import sys, torch, fastops, fastops.functional as FF; x = torch.randn(4, 3); FF.linear_relu(x, x);"
        "FF.conv_relu1d(x.t(), x[:, :, None]); FF.mse_loss(x, x); FF.cross_entropy(x, x.argmax(1));"
        "print('triton' in sys.modules)"
    )
    result = run_new_python(code)
    assert result.stdout.split() == ["False"], result.stderr


class _Nested(torch.autograd.Function):
    """A backward pass in a backward pass, and so on: behind some sixty of them autograd takes a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, found: list[tuple[str, bool]]) -> Tensor:
        ctx.rest = depth, found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        depth, found = ctx.rest
        if depth:
            with torch.enable_grad():
                x = torch.ones((), requires_grad=True)
                _Nested.apply(x, depth - 1, found).backward()
        else:
            inner = fastops.backend("torch")
            for around in (nullcontext(), inner, nullcontext()):
                with around:
                    ours = threading.current_thread() is threading.main_thread()
                    found.append((dispatch.selected_backend(), ours))
        return grad, None, None


@pytest.mark.parametrize("depth", [0, 100])
def test_autograds_threads_have_the_selection_of_the_one_that_began(depth: int) -> None:
    """There each GPU has such a thread, in which checkpoints compute a forward pass again."""
    found: list[tuple[str, bool]] = []

    def run() -> None:
        _Nested.apply(torch.ones((), requires_grad=True), depth, found).backward()

    here = depth == 0
    run()
    for name in ("onednn", "torch", "auto"):
        with fastops.backend(name):
            run()
    run()
    outer = ["auto", "onednn", "torch", "auto", "auto"]
    assert found == [(name, here) for own in outer for name in (own, "torch", own)]


def test_compiling_in_a_thread_that_python_did_not_start(fresh_dynamo: None) -> None:
    """Such as autograd's for a GPU: which backend is selected is looked for in a way that Dynamo does not know."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(torch.compile(FF.add_relu, backend="eager", fullgraph=True)(torch.ones(3), torch.ones(3)))
        except Exception as error:
            found.append(error)
        finally:
            done.release()

    done = threading.Semaphore(0)
    _thread.start_new_thread(run, ())
    done.acquire()
    assert torch.equal(found[0], torch.full((3,), 2.0))
