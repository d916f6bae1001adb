"""Models as users write them, for the tests of swapping: each with its inputs and how many activations are fused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.fusions import Layer

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)


class Methods(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu_())


class InPlace(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x), inplace=True)
        x = torch.relu_(self.fc2(input=x))
        return F.relu_(self.fc3(x))


class SharedReLU(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc1(x)) * 2
        x = self.relu(x - 1)
        return self.fc3(self.relu(self.fc2(x)))


class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) + self.fc(F.relu(self.fc(-x)))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.outer(F.relu(self.inner(x))) + F.linear(x, self.inner.weight))


class ControlFlow(nn.Module):
    """Branches on values: how many ReLUs run depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Functional(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.sum() > 0:
            x = F.relu(self.head(x))
        return x


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        return F.relu(z) + z


class SeenThroughView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        flat = z.view(-1)
        return F.relu(z, inplace=True).sum() + flat.min()


class ChangedBetween(nn.Module):
    """The input of the layer is changed in place between the layer and its ReLU, and seen under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        alias = x
        z = self.fc(x.detach())
        x += 3
        return F.relu(z) + alias


class Dropout(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        x = F.relu(self.fc2(x))
        return self.fc3(x if self.training else x * 2)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4 * 3 * 3, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = x.view(-1, self.num_flat_features(x))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    def num_flat_features(self, x: Tensor) -> Any:
        features = 1
        for size in x.size()[1:]:
            features *= size
        return features


class FlatLeNet(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.fc2(self.relu(self.fc1(x)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "tanh": nn.Tanh()})

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers[:-1]):
            x = self.acts["relu" if index == 0 else "tanh"](layer(x))
        return self.layers[-1](x)


class Several(nn.Module):
    """Keywords with defaults, several outputs, a list as input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Any, y: Tensor | None = None, *, scale: float = 1.0, **others: Tensor) -> dict[str, Any]:
        if isinstance(x, (list, tuple)):
            x = torch.stack(tuple(x)).sum(0)
        hidden = F.relu(self.a(x))
        if y is not None:
            hidden = hidden + F.relu(self.b(y)) * scale
        return {"out": self.c(hidden), "all": [hidden, *others.values()]}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.a(x)) * scale
        other = F.relu(self.b(y))
        if mask is not None:
            hidden = hidden * mask
        return hidden, other


class Required(Keywords):
    """Has no default for an input that may be None."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        hidden = F.relu(self.a(x))
        return hidden if mask is None else hidden * mask


class Helper(nn.Module):
    """Calls its own methods, a method of a child, and a child's parameters. What a method is given it cannot fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.child = nn.Linear(6, 6), Encoder()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor([0.5]))
        self.factors = [1.0, 2.0]

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.fc(x)) * self.scale + self.shift * 2
        return self.child.encode(x) * self.factors[1]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class Noise(Functional):
    """Makes random numbers like a given tensor: they must be new in every call."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x + torch.rand(6, dtype=x.dtype)))
        return self.fc3(F.relu(self.fc2(x * torch.rand_like(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x, need_weights=False)
        if weights is not None:
            out = out * weights.mean()
        return F.relu(self.fc(out))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(inplace=True), nn.Linear(7, 3))


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU()), Residual()),
    )


def activation_outside() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 6)), nn.ReLU())


def parametrized() -> nn.Module:
    model = sequential()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU())


def rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape, dtype=torch.float64),)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    fused: int
    inputs: Callable[[], tuple[Any, ...]] = rows(5, 6)
    keywords: Callable[[], dict[str, Any]] = dict


def _pair() -> tuple[Any, ...]:
    return rows(5, 6)() + rows(5, 6)()


CASES = {
    "Sequential": Case(sequential, 2),
    "nested Sequentials": Case(nested, 2),
    "activation in the outer Sequential": Case(activation_outside, 1),
    "functional relu": Case(Functional, 2),
    "method relu": Case(Methods, 2),
    "in-place relu": Case(InPlace, 3),
    "shared ReLU module": Case(SharedReLU, 2),
    "shared linear layer": Case(SharedLinear, 2),
    "tied weights": Case(TiedWeights, 1),
    "control flow in the root": Case(ControlFlow, 3),
    "pre-activation used twice": Case(UsedTwice, 0),
    "pre-activation seen through a view": Case(SeenThroughView, 0),
    "input changed between layer and relu": Case(ChangedBetween, 0),
    "dropout(self.training)": Case(Dropout, 2),
    "LeNet": Case(FlatLeNet, 3, rows(2, 1, 18, 18)),
    "LeNet, sizes multiplied in a loop": Case(LeNet, 3, rows(2, 1, 18, 18)),
    "residual": Case(Residual, 1),
    "ModuleList and ModuleDict": Case(Loop, 2),
    "optional input left out": Case(Keywords, 2, _pair),
    "inputs by keyword": Case(Keywords, 2, rows(5, 6), lambda: {"y": _pair()[0]}),
    "optional input given": Case(Keywords, 2, _pair, lambda: {"mask": torch.ones(6, dtype=torch.float64)}),
    "number given": Case(Keywords, 2, _pair, lambda: {"scale": 3.0}),
    "required input": Case(Required, 1, _pair),
    "None for a required input": Case(Required, 1, lambda: (*rows(5, 6)(), None)),
    "list as input": Case(Several, 1, lambda: (list(_pair()),)),
    "generator as input": Case(Several, 2, lambda: (tuple(_pair()), _pair()[0])),
    "keyword-only and extra inputs": Case(Several, 1, rows(5, 6), lambda: {"scale": 2.0, "extra": _pair()[0]}),
    "helper methods": Case(Helper, 1),
    "random numbers": Case(Noise, 2),
    "a child's result tested": Case(Attention, 1, rows(2, 5, 6)),
    "parametrized layer": Case(parametrized, 2),
    "no bias": Case(without_bias, 1),
    "unbatched input": Case(sequential, 2, rows(6)),
}


def count_fused(patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The weight shapes of all layers that run together with a ReLU from now on; the list grows."""
    calls: list[tuple[int, ...]] = []
    run = Layer.run

    def counted(self: Layer, layer: Any, activation: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if activation is not None:
            calls.append(() if weight is None else tuple(weight.shape))  # a batch norm may have none
        return run(self, layer, activation, input, weight, bias)

    patch.setattr(Layer, "run", counted)
    return calls


def fused(model: nn.Module, *inputs: Tensor) -> int:
    """How many fused calls run, which must not change the result."""
    with pytest.MonkeyPatch.context() as patch:
        calls = count_fused(patch)
        found = model(*inputs)
    expected = fastops.unswap(copy.deepcopy(model))(*inputs)
    assert torch.equal(found, expected)
    return len(calls)


@contextmanager
def inputs_of(op: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What a function of `fastops.functional` is called with first, inside."""
    seen: list[Tensor] = []
    original = getattr(FF, op)

    def function(input: Tensor, *arguments: Any) -> Tensor:
        seen.append(input)
        return original(input, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FF, op, function)
        yield seen


def resnet(blocks: int = 2) -> nn.Module:
    """Torchvision's ResNet-18, with statistics and affine parameters that matter; ResNet-10 has one block a layer."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [blocks] * 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def image(rows: int = 1, size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, size, size, generator=generator), torch.randn(rows, 1000, generator=generator)


def words(error: BaseException) -> str:
    """Type and message. Of a value that was changed in place: not which one, what made it and how often, as others are
    saved for the gradients."""
    pattern = r"version [0-9]+|output [0-9]+ of [A-Za-z0-9]+|torch[.][A-Za-z]+Tensor \[[0-9, ]+]"
    return f"{type(error).__name__}: {re.sub(pattern, '...', str(error))}"


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = case.make().double()
    return model, copy.deepcopy(model)
