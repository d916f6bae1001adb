"""`swap` keeps every promise of the model that it is given: results, gradients, identity, state, and the way back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_models import CASES, Case, Functional, count_fused, pair
from torch import Tensor, nn

import fastops
from fastops import backport
from fastops.ops import OPS

# On the torch expression a swapped model computes bit for bit what eager computes.
pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The weight shapes of all fused calls so far."""
    return count_fused(monkeypatch)


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
    before_classes = {name: type(module) for name, module in model.named_modules()}
    fastops.unswap(fastops.swap(model))
    parametrized = {name for name, module in model.named_modules() if hasattr(module, "parametrizations")}
    for (name, module), other, state in zip(model.named_modules(), reference.modules(), before, strict=True):
        assert module.__dict__.keys() == state.keys()
        assert all(module.__dict__[key] is value for key, value in state.items())
        assert type(module) is (before_classes[name] if name in parametrized else type(other))
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
@pytest.mark.parametrize("make", [_again, _part_first, _deepcopy, _shallow_copy, _unswapped_and_swapped, _replicated])
def test_fusion_survives(make: Callable[[nn.Module], nn.Module], name: str, fused_calls: list[Any]) -> None:
    case = CASES[name]
    model, reference = pair(case)
    swapped = make(model)
    if make is _replicated:  # its parameters are no longer parameters, so that only outputs can be compared
        inputs = case.inputs()
        assert torch.equal(swapped(*inputs), reference(*inputs))
        assert len(fused_calls) == case.fused
    else:
        assert_same(swapped, reference, case)
        assert len(fused_calls) == 2 * case.fused
    assert type(swapped).__name__ == type(reference).__name__


@pytest.mark.parametrize("load", [lambda data: pickle.loads(data), lambda data: copy.copy(pickle.loads(data))])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("name", ["Sequential", "shared ReLU module", "control flow in the root", "tied weights"])
def test_pickle_restores_the_users_class(name: str, protocol: int, load: Callable[[bytes], Any]) -> None:
    case = CASES[name]
    model, reference = pair(case)
    loaded = load(pickle.dumps(fastops.swap(model), protocol))
    assert type(loaded) is type(reference)
    assert {type(child) for child in loaded.modules() if isinstance(child, nn.Linear)} == {fastops.nn.Linear}
    assert_same(loaded, reference, case)
    assert fastops.report(fastops.swap(loaded)).fused > 0


def test_save_and_load() -> None:
    model, reference = pair(CASES["functional relu"])
    fastops.swap(model)
    for saved, weights_only in ((model, False), (model.state_dict(), True)):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        if weights_only:
            assert list(loaded) == list(reference.state_dict())
            fresh = Functional().double()
            fresh.load_state_dict(loaded)
            loaded = fresh
        assert_same(loaded, reference, CASES["functional relu"])


def test_optimizer_goes_on() -> None:
    model, reference = pair(CASES["functional relu"])
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, reference)]
    ids = [id(parameter) for parameter in model.parameters()]
    for step in range(6):
        if step == 2:
            fastops.swap(model)
        if step == 4:
            fastops.unswap(model)
        x = torch.randn(5, 6, dtype=torch.float64)
        for candidate, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            candidate(x).square().sum().backward()
            optimizer.step()
    assert [id(parameter) for parameter in model.parameters()] == ids
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), reference.parameters(), strict=True))


def test_hooks_from_before_the_swap_stay() -> None:
    model, _ = pair(CASES["Sequential"])
    seen: list[tuple[str, bool]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.append((name, bool((output < 0).any()))))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    before = list(seen)
    seen.clear()
    assert torch.equal(fastops.swap(model)(x), expected)
    assert seen == before
    assert ("0", True) in seen  # the hook on the layer still sees what goes into the ReLU


def test_global_hook_sees_every_layer(fused_calls: list[Any]) -> None:
    model, _ = pair(CASES["functional relu"])
    fastops.swap(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        model(torch.randn(5, 6, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen == [model.fc1, model.fc2, model.fc3, model]
    assert not fused_calls


LOSSES = [op.module for op in OPS.values() if op.module is not None and op.module.__name__.endswith("Loss")]
LOSSES.remove(backport.LinearCrossEntropyLoss)  # which has parameters, as layers have


@pytest.mark.parametrize("plain", LOSSES, ids=lambda plain: plain.__name__)
def test_losses(plain: type[nn.Module]) -> None:
    criterion = plain(reduction="none")
    input, target = torch.randn(2, 4, 3).unbind()
    before = criterion(input, target.softmax(1))
    assert type(fastops.swap(criterion)) is getattr(fastops.nn, plain.__name__)
    assert torch.equal(criterion(input, target.softmax(1)), before)
    assert type(fastops.unswap(criterion)) is plain


@pytest.mark.parametrize("verb", ["swap", "unswap", "report"])
@pytest.mark.parametrize("value", [None, nn.Linear, [nn.ReLU()], torch.ones(2)], ids=lambda value: type(value).__name__)
def test_no_module(verb: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{verb} expects a torch.nn.Module, not {type(value).__name__}$"):
        getattr(fastops, verb)(value)


def test_without_fusion(fused_calls: list[Any]) -> None:
    case = CASES["functional relu"]
    model, reference = pair(case)
    fastops.swap(model, fuse=False)
    assert type(model) is Functional and type(model.fc1) is fastops.nn.Linear
    assert_same(fastops.swap(fastops.swap(model), fuse=False), reference, case)
    assert type(model) is Functional
    assert not fused_calls


class Subclass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _replaced_forward() -> nn.Linear:
    layer = nn.Linear(6, 6)
    layer.forward = lambda input: input * 2  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Subclass(6, 6), "its class Subclass is a subclass of Linear with its own forward"),
        (_replaced_forward, "its forward was replaced on the object"),
        (lambda: nn.LazyLinear(6), "it has no weights yet: run it once, then swap again"),
    ],
    ids=["subclass", "forward replaced", "lazy"],
)
def test_layers_left_alone(make: Callable[[], nn.Module], reason: str, fused_calls: list[Any]) -> None:
    layer = make()
    found = type(layer)
    model = fastops.swap(nn.Sequential(layer, nn.ReLU()))
    assert type(layer) is found
    assert fastops.report(model).rows[0].outcome == f"not swapped: {reason}"
    x = torch.randn(5, 6)
    assert torch.equal(model(x), F.relu(layer(x)))
    assert not fused_calls
    if found is nn.LazyLinear:
        assert fastops.report(fastops.swap(model)).fused == 1


def test_parametrizations_come_off(fused_calls: list[Any]) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(layer, nn.ReLU())
    twin = copy.deepcopy(model)  # shares the class of the parametrized layer, and is not swapped
    x = torch.randn(5, 6)
    expected = model(x)
    assert torch.equal(fastops.swap(model)(x), expected) and len(fused_calls) == 1
    assert isinstance(layer, fastops.nn.Linear) and not isinstance(twin[0], fastops.nn.Linear)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fastops.nn.Linear
    assert torch.equal(fastops.swap(model)(x), expected) and len(fused_calls) == 2
    assert type(fastops.unswap(layer)) is nn.Linear


def test_parametrized_after_the_swap_and_unswapped() -> None:
    case = CASES["tied weights"]
    model, _ = pair(case)
    inner = fastops.swap(model).inner
    nn.utils.parametrize.register_parametrization(inner, "bias", nn.Softplus())
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(fastops.unswap(model)(x), expected)
    assert type(inner).__bases__ == (nn.Linear,)
    assert torch.equal(fastops.swap(model)(x), expected)


REGISTERED: list[type] = []


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        REGISTERED.append(cls)


class Registered(Functional, metaclass=Meta):
    """Its metaclass and its `__init_subclass__` have effects, it has slots, a `__setattr__` and its own copies."""

    __slots__ = ("extra",)

    def __init_subclass__(cls) -> None:
        REGISTERED.append(cls)

    def __setattr__(self, name: str, value: object) -> None:
        assert name != "__class__"
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Registered:
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin.double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Documented."""
        return super().forward(x)


def test_unusual_class(fused_calls: list[Any]) -> None:
    REGISTERED.clear()
    model = Registered().double()
    fastops.swap(model)
    assert not REGISTERED
    found = type(model)
    assert isinstance(model, Registered) and issubclass(found, Registered) and type(found) is Meta
    assert (found.__name__, found.__qualname__, found.__module__) == ("Registered", "Registered", __name__)
    assert found.__doc__ == Registered.__doc__
    assert repr(model).startswith("Registered(")
    assert str(inspect.signature(model.forward)) == str(inspect.signature(Registered().forward))
    x = torch.randn(5, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)  # by the class's own __deepcopy__: with plain torch layers inside
    assert type(twin.fc1) is nn.Linear
    assert torch.equal(twin(x), model(x)) and len(fused_calls) == 2
    assert torch.equal(model.forward(x), fastops.unswap(model)(x)) and len(fused_calls) == 4
    assert type(model) is Registered


def test_equal_modules_share_a_class() -> None:
    models = [fastops.swap(Functional()) for _ in range(2)]
    assert type(models[0]) is type(models[1]) is not Functional


def test_sequential_behaves_as_sequential() -> None:
    model, reference = pair(CASES["Sequential"])
    fastops.swap(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    for index in (slice(2), slice(1, None), slice(None, None, 2), slice(None)):
        part = model[index]
        assert isinstance(part, nn.Sequential) and list(part) == list(model)[index]
        assert [*part.state_dict()] == [*reference[index].state_dict()]
        if index != slice(None, None, 2):
            y = x if index.start is None else torch.randn(5, 8, dtype=torch.float64)
            assert torch.equal(part(y), reference[index](y))
        assert type(fastops.unswap(copy.deepcopy(part))) is nn.Sequential
    assert len(model) == 5 and [*model] == [*model.children()]
    assert torch.equal((model[:2] + model[2:])(x), reference(x))


def test_kernels_compute_the_same() -> None:
    """The same models through the Triton kernels, in the interpreter."""
    for name in ("functional relu", "shared ReLU module", "residual", "parametrized layer", "nested Sequentials"):
        model, reference = pair(CASES[name])
        (x,) = CASES[name].inputs()
        with fastops.backend("triton"):
            found = fastops.swap(model)(x)
            found.sum().backward()
        reference(x).sum().backward()
        torch.testing.assert_close(found, reference(x))
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
