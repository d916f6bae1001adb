"""Losses of sharded layers in two processes, against the whole layer in one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import run_python
from torch import Tensor

import fastops
import fastops.distributed

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "none", "ignore_index": 1},
]


def variables() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (9, 5), (2 * 120, 5), (2 * 120,)
    return tuple(torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes)


# Class 20 is 100 before the second shard: relative to it, torch's default ignore_index.
TARGET = torch.tensor([20, 239, 120, 1, 119, 0, 20, -100, 200])


def rank_checks(rank: int, file: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    own = slice(120 * rank, 120 * (rank + 1))
    for options in OPTIONS:
        target = TARGET.where(TARGET != -100, options.get("ignore_index", -100))
        input, weight, bias = variables()
        whole = F.cross_entropy(F.linear(input, weight, bias), target, **options)
        grad = torch.linspace(-1, 2, whole.numel()).reshape(whole.shape)
        expected = torch.autograd.grad(whole, (input, weight, bias), grad)
        shards = [tensor.detach()[own].requires_grad_() for tensor in (weight, bias)]
        for backend in ("triton", "onednn"):
            with fastops.backend(backend):
                loss = fastops.distributed.linear_cross_entropy(
                    input, shards[0], target, linear_bias=shards[1], memory_budget=1000, **options
                )
            torch.testing.assert_close(loss, whole)
            found = torch.autograd.grad(loss, (input, *shards), grad)
            torch.testing.assert_close(found, (expected[0], expected[1][own], expected[2][own]))
    dist.destroy_process_group()


def test_classes_sharded_across_two_processes(tmp_path: Path) -> None:
    done = run_python([__file__, tmp_path / "rendezvous"], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_refused() -> None:
    x, w, target = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    for arguments, options in (
        ((x, w[:, :2], target), {}),
        ((x, w, target[:3]), {}),
        ((x, w, target.int()), {}),
        ((x, w, target), {"linear_bias": x[0]}),
        ((x, w, target), {"reduction": "median"}),
    ):
        with pytest.raises(ValueError):
            fastops.distributed.linear_cross_entropy(*arguments, **options)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank_checks, (sys.argv[1],), nprocs=RANKS, start_method="fork")
