"""Models whose classes have bases before or beside `torch.nn.Module`, which may lay out objects in another way."""

from __future__ import annotations

import abc
import copy
from typing import ClassVar, Generic, Protocol, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops

_T = TypeVar("_T")


class Slotted:
    __slots__ = ("own",)


class Announced:
    """Subclasses are announced, and objects of it have no ``__dict__``."""

    __slots__ = ()
    known: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        Announced.known.append(cls.__name__)


class AnnouncedWithDict:
    known: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        AnnouncedWithDict.known.append(cls.__name__)


class AbstractFirst(abc.ABC, nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class GenericFirst(Generic[_T], nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class SlottedFirst(Slotted, nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class AnnouncedAbstractFirst(abc.ABC, AnnouncedWithDict, nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class AnnouncedFirst(Announced, nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class AnnouncedWithDictFirst(AnnouncedWithDict, nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class HasForward(Protocol):
    def forward(self, x: Tensor) -> Tensor: ...


class ProtocolLast(nn.Module, HasForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


KINDS = (AbstractFirst, GenericFirst, SlottedFirst, AnnouncedWithDictFirst, AnnouncedAbstractFirst, ProtocolLast)


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        *((kind, 1) for kind in KINDS),
        (AnnouncedFirst, 0),
    ],
)
@pytest.mark.parametrize("looked", [False, True])
def test_bases_before_module(kind: type[nn.Module], fused: int, looked: bool) -> None:
    """Python lets an object change its class only where both lay out their objects alike."""
    model, x = kind(), torch.randn(2, 3)
    model.layer = nn.Linear(3, 3)
    expected, known = model(x), (Announced.known.copy(), AnnouncedWithDict.known.copy())
    if looked:
        fastops.report(model)
    report = fastops.report(fastops.swap(model))
    assert (report.swapped, report.fused) == (1, fused)
    assert ("its base Announced lays out objects in a way of its own" in str(report)) == (not fused)
    assert torch.equal(model(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    assert type(fastops.unswap(model)) is kind
    assert known == (Announced.known, AnnouncedWithDict.known)  # nothing of ours was announced


def test_a_layer_with_a_slotted_base() -> None:
    class Layer(Slotted, nn.Linear):
        pass

    model, x = nn.Sequential(Layer(3, 3), nn.ReLU()), torch.randn(2, 3)
    expected = model(x)
    assert fastops.report(fastops.swap(model)).fused == 1
    assert torch.equal(model(x), expected)
