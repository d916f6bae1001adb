"""How many of our own Python functions a call passes before its kernel is launched: `python bench/host_calls.py`.

Of every op, called a second time on tiny tensors through the kernels, with each launch recorded instead: calls of
functions of this package up to the first launch, and in all, forward and backward. No clock is involved.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # so that CPU tensors take the way of the kernels; none is interpreted

import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from unittest.mock import patch

import torch

import fastops
import fastops.functional as FF
from fastops import kernels
from fastops.cli.examples import draw
from fastops.cli.table import Table
from fastops.ops import OPS, Op
from fastops.ops.examples import TINY

PACKAGE = str(Path(fastops.__file__).parent)


class Counter:
    """Counts calls of functions in files of the package."""

    def __init__(self) -> None:
        self.calls, self.before_launch = 0, -1

    def launch(self, *_: object) -> None:
        if self.before_launch < 0:
            self.before_launch = self.calls

    def profile(self, frame: Any, event: str, _: object) -> None:
        self.calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    def count(self, call: Callable[[], Any]) -> Any:
        """What ``call`` returns."""
        self.calls, self.before_launch = 0, -1
        sys.setprofile(self.profile)
        try:
            return call()
        finally:
            sys.setprofile(None)


def counts(op: Op) -> list[int]:
    """Calls up to the first launch, and all, forward and then backward."""
    example = op.examples[0]
    cpu = torch.device("cpu")
    variables, constants = draw(example, TINY, torch.Generator().manual_seed(0), torch.float32, cpu)
    leaves = [tensor.requires_grad_() for tensor in variables.values()]
    counter, found = Counter(), []
    with ExitStack() as stack:
        for info in iter_modules(kernels.__path__):
            module = import_module(f"{kernels.__name__}.{info.name}")
            if hasattr(module, "launch"):
                stack.enter_context(patch.object(module, "launch", counter.launch))
        stack.enter_context(fastops.backend("triton"))
        for _ in range(2):
            result = counter.count(lambda: getattr(FF, op.name)(**variables, **constants, **example.options))
            found = [counter.before_launch, counter.calls]
            grad_output = torch.ones_like(result)
            counter.count(lambda: torch.autograd.grad(result, leaves, grad_output))  # noqa: B023  (called at once)
            found += [counter.before_launch, counter.calls]
    return found


def main() -> None:
    words = [f"{way}, {how}" for way in ("forward", "backward") for how in ("to launch", "all")]
    table = Table({"op": max(map(len, OPS))} | {word: -len(word) for word in words})
    for op in OPS.values():
        table.row([op.name, *map(str, counts(op))])


if __name__ == "__main__":
    main()
