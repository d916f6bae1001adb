"""Bytes and launches of each kernel, counted as `traffic.py` does: the tables of docs/kernels, page by page."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from traffic import Pair, count, training

import fastops.functional as FF


def both(eager: Callable[..., Tensor], ours: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Pair:
    """A training step of both on tensors of these shapes."""
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return training(eager, *tensors), training(ours, *tensors)


def normed(shape: tuple[int, ...], residual: bool) -> Pair:
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])

    def eager(x: Tensor, w: Tensor, b: Tensor, *other: Tensor) -> Tensor:
        z = F.batch_norm(x, mean, var, w, b, True)
        return F.relu(z + other[0] if residual else z)

    def ours(x: Tensor, w: Tensor, b: Tensor, *other: Tensor) -> Tensor:
        if residual:
            return FF.batch_norm_add_relu(x, other[0], mean, var, w, b, training=True)
        return FF.batch_norm_relu(x, mean, var, w, b, training=True)

    return both(eager, ours, shape, shape[1:2], shape[1:2], *[shape] * residual)


def pair(name: str) -> Pair:
    target = torch.rand(512, 2048)
    return both(lambda x: getattr(F, name)(x, target), lambda x: getattr(FF, name)(x, target), (512, 2048))


def classified(probabilities: bool = False, **options: float) -> Pair:
    target = torch.rand(256, 4096).softmax(1) if probabilities else torch.randint(4096, (256,))
    functions = (lambda x, f=f: f(x, target, **options) for f in (F.cross_entropy, FF.cross_entropy))
    return both(*functions, (256, 4096))


def head() -> Pair:
    target = torch.randint(1024, (256,))
    return both(
        lambda x, w: F.cross_entropy(F.linear(x, w), target),
        lambda x, w: FF.linear_cross_entropy(x, w, target),
        (256, 64),
        (1024, 64),
    )


LAYER = (256, 512), (384, 512), (384,)
CASES: dict[str, dict[str, Callable[[], Pair]]] = {
    "linear": {
        "Linear and ReLU, 256 x 512 to 384": lambda: both(lambda *t: F.relu(F.linear(*t)), FF.linear_relu, *LAYER),
        "Linear and GELU, the same": lambda: both(
            lambda *t: F.gelu(F.linear(*t)), lambda *t: FF.linear_act(*t, activation="gelu"), *LAYER
        ),
    },
    "batch_norm": {
        "BN and ReLU, 16 x 32 x 32 x 32": lambda: normed((16, 32, 32, 32), False),
        "BN, sum and ReLU, the same": lambda: normed((16, 32, 32, 32), True),
        "BN and ReLU, 8 x 16 x 14 x 14": lambda: normed((8, 16, 14, 14), False),
    },
    "max_pool": {
        "ReLU and pooling, 8 x 16 x 64 x 64, 3 x 3, stride 2, padding 1": lambda: both(
            lambda x: F.max_pool2d(F.relu(x), 3, 2, 1), lambda x: FF.relu_max_pool2d(x, 3, 2, 1), (8, 16, 64, 64)
        )
    },
    "add_relu": {
        "Sum and ReLU, 512 x 2048": lambda: both(lambda a, b: F.relu(a + b), FF.add_relu, (512, 2048), (512, 2048))
    },
    "pair_losses": {
        f"{name}, 512 x 2048": lambda name=name: pair(name)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
    },
    "bce": {"BCE of logits, 512 x 2048": lambda: pair("binary_cross_entropy_with_logits")},
    "cross_entropy": {
        "Class indices, 256 x 4096": classified,
        "With label smoothing": lambda: classified(label_smoothing=0.1),
        "Class probabilities": lambda: classified(True),
    },
    "linear_cross_entropy": {"256 x 64 to 1024 classes, and their loss": head},
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page, cases in CASES.items():
        print(page)
        for name, case in cases.items():
            torch.manual_seed(0)
            eager, ours = map(count, case())
            numbers = f"{eager.bytes / 1e6:.2f} | {ours.bytes / 1e6:.2f} | {len(eager.launches)} | {len(ours.launches)}"
            print(f"| {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
