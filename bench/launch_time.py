"""What the host pays to launch a kernel that was launched before: `python bench/launch_time.py`.

Triton's own launch, fastops', and all of fastops' launcher, from shapes and strides to a tensor for the result: in
turns in one process, over a driver that does nothing. Microseconds (the least of all turns, as others use the machine
too), and the median of the ratios of the first two.
"""

import argparse

import stub

stub.activate()

# ruff: noqa: E402
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fastops.kernels import add_relu, configs, elementwise, matmul
from fastops.kernels.launch import Plan, launch
from fastops.timing import interleave


def by_triton(plan: Plan, *tensors: Tensor) -> None:
    plan.kernel[plan.grid](*tensors, *plan.numbers, **plan.constants)


def launched(module: Any, launcher: Callable[[], object]) -> tuple[Any, ...]:
    """What ``launcher`` would launch."""
    with patch.object(module, "launch") as recorder:
        launcher()
    words: tuple[Any, ...] = recorder.call_args.args
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="of 100 launches each")
    pairs = parser.parse_args().pairs
    x = torch.empty(512, 512, dtype=torch.bfloat16)
    tile = configs.matmul_candidates("sm90", x.dtype, "ieee")[1]
    launchers: dict[Any, Callable[[], object]] = {
        add_relu: lambda: add_relu.add_relu(x, x),
        matmul: lambda: matmul.matmul(x, x, config=tile),
    }
    print(f"{'':18} {'Triton':>8} {'fastops':>8}  ratio {'launcher':>10}")
    with (  # the tables of sm90, for tensors of the CPU
        patch.object(configs, "architecture", lambda _: "sm90"),
        patch.object(elementwise, "elementwise_config", lambda *_: (2048, 4)),
    ):
        for module, launcher in launchers.items():
            words = launched(module, launcher)
            calls = [partial(by_triton, *words), partial(launch, *words)]
            interleave(calls, turns=2, calls=10)
            theirs, ours = map(np.array, interleave(calls, turns=pairs, calls=100))
            _, whole = map(np.array, interleave((calls[0], launcher), turns=pairs, calls=100))
            least, ratio = f"{1e6 * theirs.min():8.2f} {1e6 * ours.min():8.2f}", np.median(ours / theirs)
            print(f"{words[0].kernel.__name__:18} {least}  {ratio:5.2f} {1e6 * whole.min():10.2f}", flush=True)


if __name__ == "__main__":
    main()
