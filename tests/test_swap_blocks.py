"""Batch norms fused with the sum and the ReLU behind them, where something else is called between: nothing may move."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import no_fallback
from swap_blocks import (
    BLOCKS,
    Block,
    ConvNorm,
    OfTransformers,
    fused_calls,
    identical,
    steps,
    with_shortcut,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastops

pytestmark = no_fallback


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_and_the_same(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, pairs, sums = BLOCKS[name]
    eager = make().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    expected = steps(eager, torch.float64)
    with fused_calls(monkeypatch) as seen:
        found = steps(swapped, torch.float64)
    assert seen == {"batch_norm_relu": 3 * pairs, "batch_norm_add_relu": 3 * sums}
    torch.testing.assert_close(found, expected)
    assert backend != "torch" or identical(found, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_bit_for_bit_on_the_torch_expression(name: str, channels_last: bool) -> None:
    eager = BLOCKS[name][0]()
    if channels_last:
        eager = eager.to(memory_format=torch.channels_last)
    swapped = fastops.swap(copy.deepcopy(eager))
    with fastops.backend("torch"):
        assert identical(*(steps(model, torch.float32) for model in (swapped, eager)))


def _functional(model: nn.Module, x: Tensor) -> Tensor:
    state = {name: tensor * 1 for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    result: Tensor = functional_call(model, state, (x,))
    return result


def _checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(model, x, use_reentrant=False)
    return result


@pytest.mark.parametrize("run", [_functional, _checkpointed])
@pytest.mark.parametrize("name", ["torchvision", "torchvision, shortcut", "transformers, shortcut"])
def test_calls_of_other_kinds(name: str, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    eager = BLOCKS[name][0]()
    with fastops.backend("torch"):
        assert identical(*(steps(m, torch.float32, run) for m in (fastops.swap(copy.deepcopy(eager)), eager)))


# Changes after the swap -----------------------------------------------------------------------------------------------


def last_norm(model: Any) -> Any:
    """The batch norm of the shortcut, which is fused where there is one."""
    return model.downsample[1] if isinstance(model, Block) else model.shortcut.normalization


def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def _hooked(model: Any) -> None:
    last_norm(model).register_forward_hook(double)


def _hooked_around(model: Any) -> None:
    (model.downsample if isinstance(model, Block) else model.shortcut).register_forward_hook(double)


def _pre_hooked(model: Any) -> None:
    last_norm(model).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def _kept(model: Any) -> None:
    """A hook that keeps what it sees: in place, the sum is written into that."""
    norm = model.bn2 if isinstance(model, Block) else model.layer[-1].normalization
    model.seen = []
    norm.register_forward_hook(lambda module, inputs, output: model.seen.append(output))


def _shared(model: Any) -> None:
    """One batch norm in both branches: the order of its running statistics is seen."""
    if isinstance(model, Block):
        assert isinstance(model.downsample, nn.Sequential)
        model.downsample[1] = model.bn2
    else:
        model.shortcut.normalization = model.layer[-1].normalization


def _shared_and_run(model: Any) -> None:
    """As before, and the shortcut runs it at once."""
    if isinstance(model, Block):
        model.downsample = nn.Sequential(model.bn2, nn.Hardtanh(-9, 9))
    else:
        model.shortcut = nn.Sequential(model.layer[-1].normalization, nn.Hardtanh(-9, 9))


def _momentum(model: Any) -> None:
    last_norm(model).momentum = None


def _frozen(model: Any) -> None:
    last_norm(model).requires_grad_(False)
    last_norm(model).train = lambda mode=True: last_norm(model)
    last_norm(model).training = False


def _untracked(model: Any) -> None:
    last_norm(model).track_running_stats = False


def _random(model: Any) -> None:
    (model.downsample if isinstance(model, Block) else model.layer).append(nn.Dropout(0.5))


def _own_forward(model: Any) -> None:
    last_norm(model).forward = lambda x: x + 1


def _replaced(model: Any) -> None:
    if isinstance(model, Block):
        model.downsample = nn.Conv2d(4, 4, 1)
    else:
        model.shortcut = nn.Conv2d(4, 4, 1)


CHANGES = [_hooked, _hooked_around, _pre_hooked, _kept, _shared, _momentum, _frozen, _untracked, _random, _own_forward]
REPLACED = [_replaced, _shared_and_run]


@pytest.mark.parametrize("change", [*CHANGES, *REPLACED])
@pytest.mark.parametrize("kind", [Block, OfTransformers])
def test_changes_after_the_swap(kind: type[nn.Module], change: Callable[[nn.Module], None], backend: str) -> None:
    eager = with_shortcut(kind)().double()
    swapped = fastops.swap(copy.deepcopy(eager))
    for model in (eager, swapped):
        torch.manual_seed(2)
        change(model)
        model.double()
    found, expected = (steps(model, torch.float64) for model in (swapped, eager))
    torch.testing.assert_close(found, expected)
    assert backend != "torch" or identical(found, expected)
    if change is _kept:
        for one, other in zip(swapped.seen, eager.seen, strict=True):
            torch.testing.assert_close(one, other)


def test_a_class_with_another_forward_after_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = OfTransformers(shortcut=True)
    swapped = fastops.swap(copy.deepcopy(eager))
    monkeypatch.setattr(ConvNorm, "forward", lambda self, input: self.convolution(input) - 3)
    with fastops.backend("torch"):
        assert identical(*(steps(model, torch.float32) for model in (swapped, eager)))


def test_sequential_with_another_forward_after_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = Block(shortcut=True)
    swapped = fastops.swap(copy.deepcopy(eager))
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: self[0](input) - 3)
    with fastops.backend("torch"):
        assert identical(*(steps(model, torch.float32) for model in (swapped, eager)))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(make: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = OfTransformers(shortcut=True)
    twin = make(fastops.swap(copy.deepcopy(eager)))
    assert list(twin.state_dict()) == list(eager.state_dict())
    with fastops.backend("torch"), fused_calls(monkeypatch) as seen:
        assert identical(*(steps(model, torch.float32) for model in (fastops.swap(twin), eager)))
    assert seen["batch_norm_add_relu"] == 3


def test_nothing_of_timm_is_looked_for() -> None:
    assert "timm" not in sys.modules
