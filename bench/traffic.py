"""Bytes and launches, counted: `python bench/traffic.py` prints the table of docs/traffic.md.

Kernels run in Triton's interpreter, where every address of every load and store is seen. What counts is what a launch
asks of memory if its cache never fetches anything twice: the distinct 32-byte sectors that it reads and that it writes.
Every other operation of torch, and all of eager's, counts as one launch that reads each of its tensors and writes each
of its results once; temporaries inside it cannot be seen. Views count nothing.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from triton.runtime import interpreter

import fastops
import fastops.functional as FF
from fastops.bench.counting import Launch, Operations, Traffic
from fastops.cli.examples import torch_function
from fastops.cli.table import MarkdownTable
from fastops.kernels import cross_entropy as cross_entropy_kernels
from fastops.models import FashionMLP, LeNet
from fastops.ops import OPS

SECTOR = 32  # bytes


def _alike(arguments: Any) -> str:
    """The same for arguments of equal launches: tensors of equal layout that lie beside sectors in one way."""
    first: dict[int, int] = {}

    def described(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        address = value.data_ptr()
        number = first.setdefault(address, len(first))
        return value.dtype, tuple(value.shape), value.stride(), address % SECTOR, number

    return repr(tree_map(described, arguments))


@contextmanager
def _kernels(launches: list[Launch]) -> Iterator[None]:
    """Counts what interpreted kernels do."""
    builder = interpreter.InterpreterBuilder
    load, store, call = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
    known: dict[Any, Launch] = {}
    sectors: tuple[list[Any], list[Any]] = ([], [])  # that the running kernel read, and that it wrote

    def seen(which: int, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        launches[-1].requested += addresses.size * size
        sectors[which].append(np.unique(addresses // SECTOR))

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen(0, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen(1, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        key = name, self.fn.__module__, self.grid, _alike(args), _alike(sorted(kwargs.items()))
        if key in known:  # the same sectors again: what it would compute decides nothing
            launches.append(known[key])
            return None
        launches.append(Launch(name))
        if not any(word in name for word in ("pool", "entropy")):  # whose addresses depend on values
            known[key] = launches[-1]
        with _disable_current_modes():  # the interpreter copies arguments
            result = call(self, *args, **kwargs)
        launches[-1].read, launches[-1].written = (
            SECTOR * len(np.unique(np.concatenate([np.empty(0, np.int64), *parts]))) for parts in sectors
        )
        for parts in sectors:
            parts.clear()
        return result

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    interpreter.GridExecutor.__call__ = counted_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call


def count(call: Callable[[], object]) -> Traffic:
    """Run ``call`` and count its launches and bytes; its fastops functions go through the kernels."""
    traffic = Traffic()
    with (
        pytest.MonkeyPatch.context() as patch,
        fastops.backend("triton"),
        _kernels(traffic.launches),
        Operations(traffic),
    ):
        patch.setattr(
            cross_entropy_kernels, "check_targets", lambda *_: None
        )  # the CPU's own; on a GPU a kernel asserts
        call()
    return traffic


# The table ------------------------------------------------------------------------------------------------------------


def training(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    """Forward and backward, from a gradient of ones that is there already."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    ones = torch.ones_like(function(*tensors).detach())
    return lambda: torch.autograd.grad(function(*tensors), leaves, ones)


def _variables(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


Pair = tuple[Callable[[], object], Callable[[], object]]  # eager, fastops


def _call(op: str, *tensors: Tensor, **options: Any) -> Pair:
    """Of torch's function, and of ours."""

    def run(function: Callable[..., Tensor]) -> Callable[[], object]:
        names = inspect.signature(getattr(FF, op)).parameters
        return training(lambda *t: function(**dict(zip(names, t, strict=False)), **options), *tensors)

    return run(torch_function(OPS[op])), run(getattr(FF, op))


def _conv(weight: tuple[int, ...] = (64, 64, 3, 3), **options: int) -> Pair:
    def channels_last(tensor: Tensor) -> Tensor:
        return tensor.detach().to(memory_format=torch.channels_last).requires_grad_() if tensor.dim() == 4 else tensor

    tensors = map(channels_last, _variables((8, 64, 28, 28), weight, (64,)))
    return _call("conv_relu2d", *tensors, padding=1, **options)


def _step(model: nn.Module, shape: tuple[int, ...], **options: Any) -> Pair:
    images, labels, criterion = torch.randn(shape), torch.randint(10, shape[:1]), nn.CrossEntropyLoss()
    parameters = list(model.parameters())

    def run(changed: Callable[[nn.Module], nn.Module]) -> Callable[[], object]:
        def call(*_: Tensor) -> Tensor:
            loss: Tensor = changed(criterion)(changed(model)(images), labels)
            return loss

        return training(call, *parameters)

    return run(fastops.unswap), run(functools.partial(fastops.swap, **options))


CASES: dict[str, Callable[[], Pair]] = {
    "Cross-entropy, 256 x 4096": lambda: _call("cross_entropy", *_variables((256, 4096)), torch.randint(4096, (256,))),
    "MSE, 512 x 2048": lambda: _call("mse_loss", *_variables((512, 2048)), torch.randn(512, 2048)),
    "Linear and ReLU, 512 x 1024 to 768": lambda: _call("linear_relu", *_variables((512, 1024), (768, 1024), (768,))),
    "Convolution and ReLU, 64 channels to 64, 3 x 3, padding 1, 8 x 28 x 28, channels-last": _conv,
    "Depthwise convolution and ReLU, 64 channels, 3 x 3, the same": lambda: _conv((64, 1, 3, 3), groups=64),
    "FashionMLP, a training step at batch 64": lambda: _step(FashionMLP(), (64, 1, 28, 28)),
    "LeNet, a training step at batch 8": lambda: _step(LeNet(), (8, 1, 32, 32)),
}
MODELS = {"resnet18": "ResNet-18", "mobilenet_v3_small": "MobileNetV3-small", "densenet121": "DenseNet-121"}


def _model_cases(model: str, shape: tuple[int, ...]) -> dict[str, Callable[[], Pair]]:
    from torchvision.models import get_model

    def case(**options: Any) -> Pair:
        return _step(get_model(model, num_classes=10), shape, **options)

    return {
        f"{MODELS[model]}, a training step at {' x '.join(map(str, shape))}": case,
        "The same, swapped with memory_format=torch.channels_last": lambda: case(memory_format=torch.channels_last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="only this one of torchvision, which takes minutes")
    parser.add_argument("--resnet", action="store_const", dest="model", const="resnet18", help="--model resnet18")
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 3, 32, 32), help="of the images: %(default)s")
    arguments = parser.parse_args()
    cases = _model_cases(arguments.model, tuple(arguments.shape)) if arguments.model else CASES
    numbers = ("eager MB", "fastops MB", "requested MB", "eager launches", "fastops launches")
    table = MarkdownTable({"forward and backward, float32": 87} | dict.fromkeys(numbers, 0))
    for name, case in cases.items():
        torch.manual_seed(0)
        eager, ours = map(count, case())
        sizes = (f"{size / 1e6:.2f}" for size in (eager.bytes, ours.bytes, ours.requested))
        table.row([name, *sizes, str(len(eager.launches)), str(len(ours.launches))])


if __name__ == "__main__":
    main()
