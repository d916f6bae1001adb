"""Memory and time of a head over many classes and its loss, forward and backward: `python bench/head_memory.py`.

Each contestant runs in a process of its own, all of them in turns. Memory is the peak of what the process has resident,
above what it had before the first call: the tensors that the call returns (72 MiB of gradients) are part of it. The
time is that of the second call, when the processor and the allocator are warm, and so is the ratio: within a turn.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.nn import LinearCrossEntropyOptions
from fastops.timing import ratio, wall_clock

ROWS, FEATURES, CLASSES = 4096, 512, 32000
PAGE = 4096
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def chunked(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(input, weight, target, options=nn.LinearCrossEntropyOptions(chunking_method="auto"))


def ours(mebibytes: int) -> Loss:
    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions(memory_budget=mebibytes << 20)
        return FF.linear_cross_entropy(input, weight, target, options=options)

    return loss


CONTESTANTS: dict[str, Loss] = {
    "eager": eager,
    "torch, chunked": chunked,
    **{f"fastops, {mebibytes} MiB": ours(mebibytes) for mebibytes in (64, 32, 8)},
}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def run(loss: Loss) -> dict[str, float]:
    torch.manual_seed(0)
    input = torch.randn(ROWS, FEATURES, requires_grad=True)
    weight = (torch.randn(CLASSES, FEATURES) / FEATURES**0.5).requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))
    small = torch.randn(64, 64, requires_grad=True)
    F.cross_entropy(small @ small, target[:64] % 64).backward()  # threads and libraries start
    with fastops.backend("onednn"):
        FF.linear_cross_entropy(small, small, target[:64] % 64).backward()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    times = []
    for _ in range(2):
        times.append(wall_clock(lambda: torch.autograd.grad(loss(input, weight, target), (input, weight)), 1))
    done.set()
    watcher.join()
    return {"seconds": times[1], "MiB": (peak - before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=CONTESTANTS, help="run this one in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(run(CONTESTANTS[arguments.only])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.turns):
        for name, results in found.items():
            command = [sys.executable, __file__, "--only", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output))
    print(f"{'':16}  peak MiB  seconds  of eager's")
    for name, results in found.items():
        seconds = [result["seconds"] for result in results]
        of_eager = ratio(seconds, [result["seconds"] for result in found["eager"]]).median
        memory = max(result["MiB"] for result in results)
        print(f"{name:16} {memory:9.0f} {np.median(seconds):8.2f} {of_eager:11.2f}")


if __name__ == "__main__":
    main()
