"""`swap` keeps every promise of the model that it is given: results, gradients, identity, state, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_models import CASES, Case, ControlFlow, Functional, Residual, SharedReLU, TiedWeights, sequential
from torch import Tensor, nn

import fastops
from fastops import functional as FF


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """On the torch expression a swapped model computes bit for bit what eager computes."""
    with fastops.backend("torch"):
        yield


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The weight shapes of all fused calls so far."""
    calls: list[tuple[int, ...]] = []
    original = FF.linear_relu

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(tuple(weight.shape))
        return original(input, weight, bias)

    monkeypatch.setattr(FF, "linear_relu", counted)
    return calls


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def run(model: nn.Module, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all inputs and parameters."""
    torch.manual_seed(1)
    inputs, keywords = case.inputs(), case.keywords()
    tensors = [tensor.requires_grad_() for tensor in leaves((inputs, keywords))]
    model.zero_grad()
    torch.manual_seed(2)
    outputs = leaves(model(*inputs, **keywords))
    sum((output * torch.arange(output.numel()).view_as(output)).sum() for output in outputs).backward()
    gradients = [tensor.grad for tensor in (*tensors, *model.parameters()) if tensor.grad is not None]
    return [output.detach() for output in outputs], gradients


def assert_same(model: nn.Module, reference: nn.Module, case: Case) -> None:
    for mode in (True, False):
        model.train(mode)
        reference.train(mode)
        for kind, found, expected in zip(("output", "gradient"), run(model, case), run(reference, case), strict=True):
            assert len(found) == len(expected)
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(one, other), f"{kind} {index}, training={mode}"


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = case.make().double()
    return model, copy.deepcopy(model)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_results_and_gradients(case: Case, fused_calls: list[Any]) -> None:
    model, reference = pair(case)
    assert fastops.swap(model) is model
    assert_same(model, reference, case)
    assert len(fused_calls) == 2 * case.fused  # in training and in evaluation


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_unswap_restores_classes_and_state(case: Case) -> None:
    model, reference = pair(case)
    before = [dict(module.__dict__) for module in model.modules()]
    fastops.unswap(fastops.swap(model))
    parametrized = {name for name, module in model.named_modules() if hasattr(module, "parametrizations")}
    for (name, module), other, state in zip(model.named_modules(), reference.modules(), before, strict=True):
        assert module.__dict__.keys() == state.keys()
        assert all(module.__dict__[key] is value for key, value in state.items())
        assert type(module) is type(other) or (name in parametrized and type(module).__bases__ == (nn.Linear,))
    assert_same(model, reference, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_swap_leaves_no_trace_on_objects(case: Case) -> None:
    model, _ = pair(case)
    state = torch.get_rng_state()
    before = [dict(module.__dict__) for module in model.modules()]
    fastops.swap(model)
    for module, then in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == then.keys()
        assert all(module.__dict__[key] is value for key, value in then.items())
    assert torch.equal(torch.get_rng_state(), state)


def _again(model: nn.Module) -> nn.Module:
    return fastops.swap(fastops.swap(model))


def _part_first(model: nn.Module) -> nn.Module:
    for child in model.children():
        fastops.swap(child)
    return fastops.swap(model)


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(fastops.swap(model))


def _shallow_copy(model: nn.Module) -> nn.Module:
    return copy.copy(fastops.swap(model))


def _unswapped_and_swapped(model: nn.Module) -> nn.Module:
    return fastops.swap(fastops.unswap(fastops.swap(model)))


def _replicated(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` makes for each device, without the device."""
    originals = dict(fastops.swap(model).named_modules())
    replicas = {name: module._replicate_for_data_parallel() for name, module in originals.items()}
    for name, replica in replicas.items():
        for key, child in originals[name]._modules.items():
            if child is not None:
                replica._modules[key] = next(replicas[n] for n, module in originals.items() if module is child)
        for key, parameter in originals[name]._parameters.items():
            setattr(replica, key, parameter)
    return replicas[""]


@pytest.mark.parametrize("name", ["Sequential", "shared ReLU module", "shared linear layer", "helper methods"])
@pytest.mark.parametrize(
    "make", [_again, _part_first, _deepcopy, _shallow_copy, _unswapped_and_swapped, _replicated], ids=lambda f: f.__name__
)
def test_fusion_survives(make: Callable[[nn.Module], nn.Module], name: str, fused_calls: list[Any]) -> None:
    case = CASES[name]
    model, reference = pair(case)
    swapped = make(model)
    if make is _replicated:
        assert torch.equal(swapped(*case.inputs()), reference(*case.inputs())) is False  # different random inputs
        inputs = case.inputs()
        assert torch.equal(swapped(*inputs), reference(*inputs))
    else:
        assert_same(swapped, reference, case)
    assert len(fused_calls) >= 2 * case.fused
    assert type(swapped).__name__ == type(reference).__name__
