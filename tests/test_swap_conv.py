"""Convolutional models swapped: fused ReLUs and sums, memory formats, and ResNet-18 whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from swap_models import image, resnet
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.accuracy import error_share
from fastops.models import CIFARNet


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """On the torch expression, where a test names no backend, a swapped model computes what eager does bit for bit."""
    with fastops.backend("torch"):
        yield


# ResNet-18 ------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """The tutorial's step: output and all gradients, before the update."""
    model.zero_grad()
    prediction = model(x)
    (prediction - labels).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    if optimizer is not None:
        optimizer.step()
    return [prediction.detach(), *gradients]


@pytest.mark.parametrize("training", [True, False])
def test_resnet18_on_the_torch_path_is_eager_to_the_last_bit(training: bool) -> None:
    """Outputs, all 62 gradients, buffers and parameters of 20 steps of SGD with momentum."""
    eager = resnet().train(training)
    swapped = fastops.swap(copy.deepcopy(eager))
    assert list(swapped.state_dict()) == list(eager.state_dict())
    x, labels = image()
    models = (eager, swapped)
    lr = 1e-2 if training else 1e-6  # in evaluation mode nothing bounds the activations
    optimizers = [torch.optim.SGD(model.parameters(), lr, momentum=0.9) for model in models]
    for _ in range(20):
        left, right = (step(m, x, labels, o) for m, o in zip(models, optimizers, strict=True))
        assert len(left) == 1 + 62 and left[0].isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    for (name, a), b in zip(eager.state_dict().items(), swapped.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["triton", "onednn"])
def test_resnet10_through_the_kernels(backend: str) -> None:
    """One step, output and gradients in evaluation mode: eager's error against float64 twice, no more.

    One draw: each of the 39 results has 64 numbers or more to know the error of torch from.
    """
    model = resnet(blocks=1).eval()
    exact = step(copy.deepcopy(model).double(), *(t.double() for t in image(size=32)))
    expected = step(model, *image(size=32))
    fastops.swap(model)
    with fastops.backend(backend):
        found = step(model, *image(size=32))
    shares = [error_share(*tensors) for tensors in zip(found, expected, exact, strict=True)]
    assert max(shares) <= 1


def test_resnet18_report_names_every_relu() -> None:
    report = fastops.report(fastops.swap(resnet()))
    assert (report.swapped, report.fused, report.folded) == (21, 17, 20)
    relus = [row for row in report.rows if row.layer == "ReLU"]
    assert len(relus) == 17
    assert {row.outcome for row in relus} == {"fused with bn1", "fused with the sum"}


# Sums -----------------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.identity = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Identity()


class InPlace(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.fc(x)
        out += y
        return self.relu(out)


class IntoAnInput(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.identity(x)  # x itself: the sum is written into it
        out += y
        return F.relu(out) + x


class FirstSummandKept(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = kept = self.fc(x)
        out += y
        return self.relu(out) + kept


class Operator(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.fc(x) + y)


class TorchAdd(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(torch.add(x, self.fc(y)))


class Method(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add(self.fc(y)).relu()


class AddInPlace(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x).add_(y).relu_()


class Broadcast(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.fc(x) + y[0])


class UsedTwice(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.fc(x) + y
        return F.relu(out) + out


class Alpha(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(self.fc(x), y, alpha=2).relu()


class Number(Sum):
    """Reported as a sum like any other: that one summand is a number shows when it runs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.fc(x) + 1.0) * y


class BranchBetween(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.fc(x)
        if self.training:
            out = self.fc(out)
        out += y
        out = self.relu(out)
        return out


FORMS: dict[str, type[Sum]] = {
    "operator": Operator,
    "torch.add": TorchAdd,
    "method": Method,
    "in place": InPlace,
    "in place, a branch between": BranchBetween,
    "add_": AddInPlace,
    "broadcast": Broadcast,
    "in place into an input": IntoAnInput,
    "used twice": UsedTwice,
    "first summand kept": FirstSummandKept,
    "alpha": Alpha,
    "number": Number,
}
FUSED = ("operator", "torch.add", "method", "in place", "in place, a branch between", "broadcast", "number")


@pytest.mark.parametrize("name", FORMS)
def test_sums(name: str, backend: str) -> None:
    eager = FORMS[name]().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    assert fastops.report(swapped).fused == (name in FUSED)
    results = []
    for model in (eager, swapped):
        x, y = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
        given = x.clone().requires_grad_(), y.clone().requires_grad_()
        output = model(*(tensor * 1 for tensor in given))
        output.square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in given), *(p.grad for p in model.parameters())])
    for ours, torchs in zip(results[1], results[0], strict=True):
        assert (ours is None) == (torchs is None)
        if ours is not None and torchs is not None:
            torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("hooked", ["fc", "relu"])
def test_hooks_see_the_steps_of_a_sum(hooked: str) -> None:
    eager = InPlace().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    seen: list[list[Tensor]] = [[], []]
    x, y = torch.randn(2, 3, 4).double()
    for model, kept in zip((eager, swapped), seen, strict=True):
        getattr(model, hooked).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        with fastops.backend("triton"):
            model(x, y)
    torch.testing.assert_close(seen[1], seen[0])  # the very tensor, which the sum and the ReLU were written into


# Memory formats -------------------------------------------------------------------------------------------------------


def test_memory_format_of_a_model(backend: str) -> None:
    torch.manual_seed(0)
    model = CIFARNet()
    eager = copy.deepcopy(model)
    parameters = list(model.parameters())
    assert fastops.swap(model, memory_format=torch.channels_last) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert "channels_last weights: large feature maps gain" in str(fastops.report(model))
    assert "channels_last" not in str(fastops.report(fastops.swap(copy.deepcopy(eager))))
    x = torch.randn(3, 3, 32, 32)
    with fastops.backend(backend):
        hidden = FF.conv_relu2d(x, model.conv1.weight, model.conv1.bias)
        assert hidden.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-5)
    loaded = CIFARNet()
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(x), eager(x), rtol=0, atol=0)
