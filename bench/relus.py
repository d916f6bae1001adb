"""How many of the activations that models apply run in one call with what is before them, and whether results stay.

    python bench/relus.py          # a model of each large family of torchvision, and of timm where that is installed
    python bench/relus.py --all    # every model of torchvision, and up to 60 of timm that take small images

Counted are applications in one forward pass, in evaluation mode without gradients or with ``--training`` in that of a
training step: eager, how often an activation that kernels know runs; swapped, how many of these are left. First come
the ReLUs, then all. The output is compared with eager's, bit for bit, on the torch expression.
"""

from __future__ import annotations

import argparse
import copy
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fastops
from fastops.dispatch import Explanation
from fastops.fusions import SIGNATURES, activation_of_function
from fastops.ops.activations import METHODS

FAMILIES = {
    "classification": "alexnet vgg11_bn resnet18 resnet50 densenet121 googlenet inception_v3 regnet_y_400mf "
    "shufflenet_v2_x1_0 squeezenet1_1 mnasnet0_5 mobilenet_v2",
    "segmentation": "fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large",
    "video": "r3d_18 mc3_18 r2plus1d_18",
    "detection": "fasterrcnn_resnet50_fpn retinanet_resnet50_fpn ssdlite320_mobilenet_v3_large fcos_resnet50_fpn",
}
TIMM, LARGEST_TIMM = 60, 50_000_000  # models, and parameters of one
INPUTS: dict[str, Callable[[], Any]] = {
    "classification": lambda: torch.randn(2, 3, 96, 96),
    "segmentation": lambda: torch.randn(1, 3, 64, 64),
    "video": lambda: torch.randn(1, 3, 16, 56, 56),
    "detection": lambda: [torch.rand(3, 96, 96)],
}


TENSOR_METHODS = {getattr(torch.Tensor, name): activation for name, activation in METHODS.items()}


class Activations(TorchFunctionMode):
    """Counts the activations that run by themselves: as functions and as methods, those of modules too."""

    def __init__(self) -> None:
        super().__init__()
        self.relus, self.count, self.inside = 0, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = TENSOR_METHODS.get(func)
        if func in SIGNATURES:
            others = {name: value for name, value in (kwargs or {}).items() if name != "input"}
            name = (activation_of_function(func, args[1:], others) or (None,))[0]
        if not self.inside:
            self.relus, self.count = self.relus + (name == "relu"), self.count + (name is not None)
        outer = self.inside
        self.inside = outer or name is not None or "fastops" in (getattr(func, "__module__", "") or "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = outer


def left(model: nn.Module, x: Any, training: bool = False) -> tuple[int, int]:
    """ReLUs and activations by themselves, with the sums fused that a kernel would take.

    In evaluation batch norms are folded as for large images.
    """
    kernel = mock.patch("fastops.promises.explain", lambda *_: Explanation("triton", "counted as if"))
    folded = mock.patch("fastops.fold.SMALLER", 0)
    with torch.set_grad_enabled(training), kernel, folded, Activations() as seen:
        model.train(training)(x)
    return seen.relus, seen.count


def alike(eager: nn.Module, swapped: nn.Module, x: Any) -> bool:
    """Whether outputs are the same to the last bit, in evaluation and, where the input allows that, in training."""

    def run(model: nn.Module) -> list[Any]:
        torch.manual_seed(1)
        given = [t.clone() for t in x] if isinstance(x, list) else x.clone()
        with fastops.backend("torch"), torch.no_grad():
            return tree_leaves(model(given))

    pairs = zip(run(eager.eval()), run(swapped.eval()), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    try:
        expected = run(eager.train())
    except (RuntimeError, ValueError, AssertionError):  # too small a batch or an image, or targets are wanted
        return same
    return same and all(
        torch.equal(a, b) for a, b in zip(expected, run(swapped.train()), strict=True) if isinstance(a, torch.Tensor)
    )


def models(everything: bool) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Family, name and maker of each."""
    for family, names in FAMILIES.items():
        module = torchvision.models if family == "classification" else getattr(torchvision.models, family)
        for name in torchvision.models.list_models(module) if everything else names.split():
            options = {"weights_backbone": None} if family in ("segmentation", "detection") else {}
            options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            yield family, name, lambda n=name, o=options: torchvision.models.get_model(n, weights=None, **o)
    try:
        import timm
    except ImportError:
        print("timm is not installed: its models are left out")
        return
    names, found = timm.list_models(), 0
    random.Random(0).shuffle(names)
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        has_relu = any(isinstance(module, nn.ReLU) for module in model.modules())
        if has_relu and sum(parameter.numel() for parameter in model.parameters()) < LARGEST_TIMM:
            found += 1
            yield "timm", name, lambda n=name: timm.create_model(n, pretrained=False)
        if found == (TIMM if everything else TIMM // 6):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every model")
    parser.add_argument("--training", action="store_true", help="in a training step")
    parser.add_argument("--family", help=f"one of {', '.join(FAMILIES)} and timm alone")
    warnings.simplefilter("ignore")
    totals: dict[str, list[list[int]]] = defaultdict(list)
    words = parser.parse_args()
    for family, name, make in models(words.all):
        if words.family not in (None, family):
            continue
        torch.manual_seed(0)
        x = INPUTS.get(family, INPUTS["classification"])()
        if words.training and isinstance(x, torch.Tensor) and len(x) == 1:
            x = torch.cat([x, x])  # what some batch norms want
        try:
            eager = make()
            counts = left(eager, x, words.training)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            print(f"{family:15} {name:32} skipped: {str(error)[:60]!r}")
            continue
        if not counts[1]:
            continue
        after = left(fastops.swap(copy.deepcopy(eager)), x, words.training)
        row = [*counts, counts[0] - after[0], counts[1] - after[1]]
        same = alike(eager, fastops.swap(copy.deepcopy(eager)), x)
        totals[family].append(row)
        print(f"{family:15} {name:32} {shares(row)} {'' if same else 'DIFFERS'}")
    for family, rows in totals.items():
        summed = [sum(column) for column in zip(*rows, strict=True)]
        print(f"{family:15} {len(rows):3} models {'':21} {shares(summed)}")


def shares(row: list[int]) -> str:
    relus, count, fused_relus, fused = row
    return f"{fused_relus / max(relus, 1):5.2f} of {relus:5} ReLUs, {fused / count:5.2f} of {count:5} activations"


if __name__ == "__main__":
    main()
