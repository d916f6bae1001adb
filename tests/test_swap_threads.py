"""A swapped model that several threads use at a time."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from swap_models import CASES, Net, X, pair
from torch import Tensor, nn

import fastops

pytestmark = pytest.mark.usefixtures("exact")


def test_threads_serve_while_others_swap_and_report() -> None:
    served, other = nn.Sequential(Net(), nn.Linear(4, 4), nn.ReLU()), fastops.swap(Net())
    expected, errors, stop = (served(X), other(X)), [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                with fastops.backend("torch"):  # in each thread anew
                    assert torch.equal(served(X), expected[0]) and torch.equal(other(X), expected[1])
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        fastops.report(fastops.swap(served))
        fastops.unswap(served)
        copy.deepcopy(other)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_two_threads_that_copy_leave_the_model_swapped() -> None:
    model = fastops.swap(Net())
    kind = type(model)
    threads = [threading.Thread(target=lambda: [copy.deepcopy(model) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert type(model) is kind


def test_threads_may_run_while_another_copies() -> None:
    model, reference = pair(CASES["functional relu"])
    fastops.swap(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = reference(x)

    def run() -> Tensor:
        with fastops.backend("torch"):  # in each thread anew
            return model(x)

    with ThreadPoolExecutor(4) as pool:
        copies = [pool.submit(copy.deepcopy, model) for _ in range(20)]
        results = [pool.submit(run) for _ in range(20)]
        assert all(torch.equal(result.result(), expected) for result in results)
        assert all(torch.equal(twin.result()(x), expected) for twin in copies)
    assert fastops.report(model).fused == 2
