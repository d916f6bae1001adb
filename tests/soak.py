"""Trains models for a long time while other threads swap, tune and serve: `make soak MINUTES=30`.

Two models learn, each beside an eager twin with the same start and data: torchvision's ResNet-18, and FashionMLP. All
the while one thread swaps and unswaps models whose source is new each time, and compiles one now and then, one tunes,
one serves copies of the models. Every 50 steps the losses of twins are compared, and both go on from the eager one's
state, which is loaded; the model is unswapped and swapped again: rounding would lead two runs of eager apart as well.

It ends with an error if losses differ, memory grows by more than 1 % after a quarter of the time, when all is loaded
and every cache filled, or a cache has grown since.
"""

from __future__ import annotations

import argparse
import copy
import gc
import linecache
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

import fastops
from fastops import callsites, source
from fastops.kernels import configs
from fastops.models import FashionMLP

STEPS = 50  # from one comparison of the losses to the next
SOURCE = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return F.relu(self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3))))
"""


class Twins:
    """A swapped model and an eager one that learn the same."""

    def __init__(self, name: str, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self.eager, self.swapped = model, fastops.swap(copy.deepcopy(model))
        self.generator = torch.Generator().manual_seed(0)
        self.steps, self.difference = 0, 0.0
        self.restart()

    def restart(self) -> None:
        fastops.swap(fastops.unswap(self.swapped))
        self.swapped.load_state_dict(self.eager.state_dict())
        self.optimizers = [
            torch.optim.SGD(each.parameters(), lr=1e-3, momentum=0.9) for each in (self.eager, self.swapped)
        ]

    def step(self) -> None:
        images = torch.randn(self.shape, generator=self.generator)
        labels = torch.randint(10, self.shape[:1], generator=self.generator)
        losses = []
        criteria = F.cross_entropy, fastops.functional.cross_entropy
        models = self.eager, self.swapped
        for model, criterion, optimizer in zip(models, criteria, self.optimizers, strict=True):
            optimizer.zero_grad()
            loss: Tensor = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.difference = max(self.difference, abs(losses[0] - losses[1]) / abs(losses[0]))
        self.steps += 1
        if self.steps % STEPS == 0:
            self.restart()


def new_model(number: int) -> None:
    """Swap, run, report on and unswap a model of a class that did not exist before, and drop it."""
    name = f"<cell {number}>"
    linecache.cache[name] = (len(SOURCE), None, SOURCE.splitlines(keepends=True), name)
    module = sys.modules[name] = ModuleType(name)
    exec(compile(SOURCE, name, "exec"), module.__dict__)
    model = fastops.swap(module.Net())
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    if number % 100 == 0:
        with torch.no_grad():
            known = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())  # what it compiles torch.compile keeps: no new class
            torch.compile(known, backend="fastops", options={"compiler": "eager"}, dynamic=False)(x)
        torch._dynamo.reset()
    str(fastops.report(model))
    fastops.unswap(model)
    del sys.modules[name], linecache.cache[name]


def memory() -> float:
    """What this process has in memory, in MiB, after a collection of garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def caches() -> dict[str, int]:
    return {
        "files whose lines are kept": sum(not name.startswith("<eval_with_key") for name in linecache.cache),  # torch's
        "files that are parsed": len(source._files),
        "functions that are rewritten": len(callsites._rewritten),
        "plans": len(configs.plans),
        "rows of the compiler's report": len(fastops.compile.report().rows),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTOPS_CACHE_DIR"] = folder  # what is tuned here is not the user's
        soak()


def soak() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    seconds = 60 * parser.parse_args().minutes
    torch.manual_seed(0)
    twins = [
        Twins("ResNet-18", resnet18(num_classes=10), (2, 3, 32, 32)),
        Twins("FashionMLP", FashionMLP(), (64, 1, 28, 28)),
    ]
    layer, x = fastops.swap(nn.Linear(16, 16)), torch.randn(8, 16)
    served = [(copy.deepcopy(each.swapped).eval(), torch.randn(each.shape)) for each in twins]
    with torch.no_grad():
        expected = [model(images) for model, images in served]

    def tune(number: int) -> None:
        fastops.tune(layer, x)

    def serve(number: int) -> None:
        with torch.no_grad():
            for (model, images), known in zip(served, expected, strict=True):
                torch.testing.assert_close(model(images), known)

    begin = time.monotonic()
    failures: list[BaseException] = []
    turns: dict[str, int] = {}

    def repeat(call: Callable[[int], None]) -> None:
        number = 0
        try:
            while time.monotonic() < begin + seconds and not failures:
                call(number)
                number += 1
                turns[call.__name__] = number
                time.sleep(0.1)
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=repeat, args=(call,)) for call in (new_model, tune, serve)]
    for thread in threads:
        thread.start()
    sizes: list[tuple[float, float, dict[str, int]]] = []
    while time.monotonic() < begin + seconds and not failures:
        for each in twins:
            each.step()
        if twins[0].steps % STEPS == 0:
            sizes.append((time.monotonic() - begin, memory(), caches()))
    for thread in threads:
        thread.join()
    sizes.append((time.monotonic() - begin, memory(), caches()))

    _, before, filled = next(size for size in sizes if size[0] > seconds / 4)
    _, after, caches_now = sizes[-1]
    for each in twins:
        print(f"{each.name}: {each.steps} steps, losses differ by {each.difference:.1e} of the loss at most")
    print(", ".join(f"{name} {count} times" for name, count in turns.items()))
    print(
        f"memory: {before:.1f} MiB after a quarter of the time, {after:.1f} MiB at the end ({after / before - 1:+.2%})"
    )
    print(", ".join(f"{name}: {filled[name]}, then {count}" for name, count in caches_now.items()))
    if failures:
        raise SystemExit(f"failed: {failures[0]!r}")
    if any(each.difference > 1e-3 for each in twins):
        raise SystemExit("losses are not eager's")
    if after > 1.01 * before:
        raise SystemExit("memory grows")
    if any(count > filled[name] + 64 for name, count in caches_now.items()):
        raise SystemExit("a cache grows")


if __name__ == "__main__":
    main()
