"""Swapped models in two gloo processes, each way of sharing against the gradients of one process."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import run_python
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastops

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2
Gradients = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batch() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def share(rank: int) -> Tensor:
    return batch().chunk(WORLD)[rank]


def gradients_of(model: nn.Module) -> Gradients:
    """Of each parameter, whole, by its name in the plain model."""

    def plain(name: str) -> str:
        return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")

    found = {plain(name): parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items() if g is not None}


def single_process(*passes: Tensor) -> Gradients:
    """The gradients of plain torch on the whole batch, summed over the passes."""
    model = network()
    for input in passes or (batch(),):
        model(input).square().mean().backward()
    return gradients_of(model)


def swapped() -> nn.Sequential:
    return fastops.swap(network())


def ddp(rank: int, **options: Any) -> None:
    model = DistributedDataParallel(swapped(), **options)
    for _ in range(2):  # static_graph learns in the first
        model.zero_grad()
        model(share(rank)).square().mean().backward()
    torch.testing.assert_close(gradients_of(model), single_process())


def ddp_no_sync(rank: int) -> None:
    model = DistributedDataParallel(swapped())
    with model.no_sync():
        model(share(rank)).square().mean().backward()
    model(-share(rank)).square().mean().backward()
    torch.testing.assert_close(gradients_of(model), single_process(batch(), -batch()))


def ddp_uneven(rank: int) -> None:
    """Rank 1 has a batch more than rank 0, which joins: the last step averages one gradient over two ranks."""
    model = DistributedDataParallel(swapped())
    batches = [share(rank)] if rank == 0 else [share(rank), batch()]
    with Join([model], divide_by_initial_world_size=True):
        for input in batches:
            model.zero_grad()
            model(input).square().mean().backward()
    if rank == 1:
        expected = {name: gradient / WORLD for name, gradient in single_process().items()}
        torch.testing.assert_close(gradients_of(model), expected)


def ddp_compiled(rank: int) -> None:
    model = torch.compile(DistributedDataParallel(swapped()), backend="aot_eager")
    model(share(rank)).square().mean().backward()
    torch.testing.assert_close(gradients_of(model._orig_mod), single_process())


def fsdp(rank: int, bf16: bool = False, checkpoint: bool = False, compiled: bool = False) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = swapped()
    layers = [index for index, layer in enumerate(model) if isinstance(layer, nn.Linear)]
    if checkpoint:
        for index in layers:
            model[index] = checkpoint_wrapper(model[index])
        model = fastops.swap(model)
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if bf16 else {}
    for index in layers:
        fully_shard(model[index], mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(share(rank)).float().square().mean().backward()
    found, expected = gradients_of(model), single_process()
    if bf16:  # each tensor to a few roundings of its largest elements
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 8 * torch.finfo(torch.bfloat16).eps * gradient.norm(), name
    else:
        torch.testing.assert_close(found, expected)


def tensor_parallel(rank: int) -> None:
    """Weights are DTensors: the torch expression runs, whatever the backend."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = parallelize_module(swapped(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert isinstance(model[0].weight, DTensor)
    input = batch()
    torch.testing.assert_close(model(input), network()(input))
    model(input).square().mean().backward()
    torch.testing.assert_close(gradients_of(model), single_process())


CHECKS: dict[str, Callable[[int], None]] = {
    "DDP": ddp,
    "DDP, static graph": lambda rank: ddp(rank, static_graph=True),
    "DDP, no_sync": ddp_no_sync,
    "DDP, uneven inputs": ddp_uneven,
    "DDP, compiled": ddp_compiled,
    "FSDP2": fsdp,
    "FSDP2, bfloat16": lambda rank: fsdp(rank, bf16=True),
    "FSDP2, checkpoint": lambda rank: fsdp(rank, checkpoint=True),
    "FSDP2, compiled": lambda rank: fsdp(rank, compiled=True),
    "tensor parallel": tensor_parallel,
}
ON_OTHER_WAYS = ("DDP", "FSDP2", "tensor parallel")


def work(rank: int, folder: str) -> None:
    """One of the processes: all checks through the kernels, some on the other ways. What it found goes to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    failures = []
    for way in ("triton", "onednn", "torch"):
        for name in CHECKS if way == "triton" else ON_OTHER_WAYS:
            torch._dynamo.reset()
            try:
                with fastops.backend(way):
                    CHECKS[name](rank)
            except Exception:  # a failing rank must still meet the other at the barrier; what it found is reported
                failures.append(f"{name} on {way}, rank {rank}: {traceback.format_exc()}")
            dist.barrier()
    (Path(folder) / f"{rank}.txt").write_text("\n".join(failures))
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """All checks in one run of the two processes: starting them takes longer than the checks."""
    own = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "PYTHONPATH": str(ROOT)}
    done = run_python([__file__, tmp_path], env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(WORLD)] == [""] * WORLD


if __name__ == "__main__":
    import torch._dynamo  # once for both

    mp.start_processes(work, (sys.argv[1],), nprocs=WORLD, start_method="fork")
