"""Training torchvision's ResNet through the kernels: parameters, gradients and running statistics against eager's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastops
from fastops.accuracy import error_share

# At 1e-4 eager's own error grows no faster than the number of steps. At 1e-3 it is as large as the values themselves
# after twenty: no rounding is small enough for two runs to stay together.
LR = 1e-4
MARGIN = 1e-5  # ten times the rounding of what ReLU and the pooling compare, which is about 1

Batch = tuple[Tensor, Tensor]


def resnet() -> ResNet:
    """One block in each of the four stages, no wider than the first: large weights take the interpreter long."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.inplanes = 64
    model.layer2, model.layer3, model.layer4 = (model._make_layer(BasicBlock, n, 1, stride=2) for n in (48, 32, 64))
    model.fc = nn.Linear(64, 10)
    return model.to(memory_format=torch.channels_last)


def draw() -> Batch:
    """Four images: the last batch norms, over one pixel of each, would turn two into -1 and 1 whatever they are."""
    return torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (4,))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batch: Batch) -> None:
    images, labels = batch
    optimizer.zero_grad()
    criterion(model(images.to(next(model.parameters()).dtype)), labels).backward()
    optimizer.step()


def train(model: nn.Module, criterion: nn.Module, batches: Iterator[Batch] | list[Batch]) -> dict[str, Tensor]:
    """Parameters, last gradients and running statistics, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for batch in batches:
        step(model, optimizer, criterion, batch)
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()} | gradients


def is_clear(model: nn.Module, images: Tensor) -> bool:
    """Whether rounding decides nothing: no input of a ReLU is near 0, and in no window are the largest two alike."""
    margins: list[Tensor] = []

    def pooled(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        windows = F.unfold(F.pad(inputs[0], (1, 1, 1, 1)).flatten(0, 1)[:, None], 3, stride=2)
        first, second = windows.topk(2, dim=1).values.unbind(1)
        margins.append((first - second)[first > 0].min())

    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, inputs: margins.append(inputs[0].abs().min()))
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(pooled)
    with torch.no_grad():
        copied(images.double())
    return min(margins).item() > MARGIN


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_resnet(steps: int) -> None:
    """At most twice eager's error in each tensor, or one rounding; eager's is the larger of two orders of the images.

    The reference is eager in float64. It draws the batches: where a ReLU's input is 0 but for rounding, each run takes
    a gradient of its own.
    """
    model, batches = resnet(), list[Batch]()
    reference = copy.deepcopy(model).double()

    def drawn() -> Iterator[Batch]:
        for _ in range(steps):
            batches.append(next(batch for batch in iter(draw, None) if is_clear(reference, batch[0])))
            yield batches[-1]

    exact = train(reference, nn.CrossEntropyLoss(), drawn())
    reordered = [(images.flip(0), labels.flip(0)) for images, labels in batches]
    eager, other = (train(copy.deepcopy(model), nn.CrossEntropyLoss(), each) for each in (batches, reordered))
    swapped = fastops.swap(copy.deepcopy(model))
    assert fastops.report(swapped).fused == 9
    with fastops.backend("triton"):
        ours = train(swapped, fastops.swap(nn.CrossEntropyLoss()), batches)
    assert ours.keys() == exact.keys()
    shares = {
        name: error_share(
            *(torch.stack(pair) for pair in ((ours[name], other[name]), (eager[name], other[name]), (truth, truth)))
        )
        for name, truth in exact.items()
    }
    assert max(shares.values()) <= 1, {name: share for name, share in shares.items() if share > 1}
