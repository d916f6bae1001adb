"""What a call costs the host besides the kernel: `python bench/host_time.py`.

Tiny tensors on the CPU, the launchers of the linear kernels replaced by allocations of their results, each row in turns
with eager `F.relu(F.linear(..))` in one process: medians in microseconds and the median of the ratios.
"""

import argparse
import os

os.environ["TRITON_INTERPRET"] = "1"  # so that CPU tensors take the way of the kernels; none is interpreted

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastops
import fastops.functional as FF
from fastops.kernels import linear as kernels
from fastops.timing import interleave

Function = Callable[..., Tensor]


def eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def stub(input: Tensor, weight: Tensor, bias: Tensor | None, activation: object, **_: object) -> Tensor:
    return input.new_empty((4, 4))


def backward_stub(grad: Tensor, *_: object, **__: object) -> tuple[None, Tensor, Tensor]:
    return None, grad.new_empty((4, 8)), grad.new_empty(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="of 500 calls each")
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    kernels.linear, kernels.linear_backward = stub, backward_stub
    input, weight, bias, grad = torch.ones(4, 8), torch.ones(4, 8), torch.ones(4), torch.ones(4, 4)
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    rows: dict[str, Callable[[Function], Callable[[], object]]] = {
        "forward, gradients recorded": lambda f: lambda: f(input, *leaves),
        "forward and backward": lambda f: lambda: torch.autograd.grad(f(input, *leaves), leaves, grad),
        "no gradient needed": lambda f: lambda: f(input, weight, bias),
    }
    for way in ("triton", "torch"):
        with fastops.backend(way):
            for name, call in rows.items():
                contestants = call(eager), call(FF.linear_relu)
                interleave(contestants, turns=2, calls=200)
                eagers, ours = map(np.array, interleave(contestants, turns=pairs, calls=500))
                medians = f"{1e6 * np.median(eagers):7.2f} {1e6 * np.median(ours):7.2f}"
                print(f"{way:7} {name:28} {medians} ratio {np.median(ours / eagers):.2f}", flush=True)


if __name__ == "__main__":
    main()
