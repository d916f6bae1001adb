"""What the host pays to launch a kernel that was launched before: `python bench/launch_time.py`.

Triton's own launch and fastops', in turns in one process, over a driver that does nothing: microseconds (the least of
all turns, as others use the machine too) and the median of the ratios.
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

from fastops.cli.bench import interleave
from fastops.kernels import add_relu, configs, linear
from fastops.kernels.launch import launch


def by_triton(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def launched(module: Any, launcher: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``launcher`` would launch, with the tables of sm90."""
    with patch.object(module, "launch") as recorder, patch.object(configs, "architecture", lambda _: "sm90"):
        launcher()
    words: tuple[tuple[Any, ...], dict[str, Any]] = recorder.call_args
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="of 100 launches each")
    pairs = parser.parse_args().pairs
    x = torch.empty(512, 512, dtype=torch.bfloat16)
    tile = configs.matmul_candidates("sm90", x.dtype, "ieee")[1]
    with patch.object(add_relu, "elementwise_config", lambda *_: (2048, 4)):
        kernels = [launched(add_relu, lambda: add_relu.add_relu(x, x))]
    kernels.append(launched(linear, lambda: linear.matmul(x, x, config=tile)))
    print(f"{'':18} {'Triton':>8} {'fastops':>8}  ratio")
    for words, options in kernels:
        calls = [partial(way, *words, **options) for way in (by_triton, launch)]
        interleave(calls[0], calls[1], pairs=2, calls=10)
        theirs, ours = map(np.array, interleave(calls[0], calls[1], pairs=pairs, calls=100))
        least = f"{1e6 * theirs.min():8.2f} {1e6 * ours.min():8.2f}"
        print(f"{words[0].__name__:18} {least}  {np.median(ours / theirs):5.2f}", flush=True)


if __name__ == "__main__":
    main()
