"""Batch norms fused with the sum and the ReLU behind them, where something else is called between: nothing may move."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastops
import fastops.functional as FF

pytestmark = no_fallback


class Block(nn.Module):
    """As in torchvision's ResNet: the shortcut may be a call, between the batch norm and the sum."""

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample: nn.Module | None = None
        if shortcut:
            self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Nested(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)) + x)


class OtherOrder(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.bn2(self.conv2(x))
        return torch.relu_(y)


class BothCalled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


class ByAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(x))
        out = torch.add(x, out)
        return out.relu()


class ByMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.bn2(self.conv2(x))).relu_()


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out += self.bn2(self.conv2(x))
        return self.relu(out)


class ConvNorm(nn.Module):
    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class OfTransformers(nn.Module):
    """As in Hugging Face's ResNet: both summands come out of other modules."""

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.shortcut = ConvNorm() if shortcut else nn.Identity()
        self.layer, self.activation = nn.Sequential(ConvNorm(relu=True), ConvNorm()), nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


class NormAct(nn.BatchNorm2d):
    """As timm's ``BatchNormAct2d``, which calls the function."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            momentum,
            eps=self.eps,
        )
        x = self.drop(x)
        x = self.act(x)
        return x


class OfTimm(nn.Module):
    """As timm's RegNet: batch norms that have their activations, and calls that may do nothing around the sum."""

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), NormAct(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, bias=False), NormAct(4, relu=False)
        self.drop_path, self.act = nn.Identity(), nn.ReLU(inplace=True)
        self.downsample = NormAct(4, relu=False) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = self.conv2(x)
        x = self.bn2(x)
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = aa(x)
        x = self.drop_path(x) + self.downsample(shortcut)
        return self.act(x)


def with_shortcut(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: kind(True)  # type: ignore[call-arg]


# Each with how often one call fuses a batch norm and ReLU, and how often these and the sum between them.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchvision": (Block, 1, 1),
    "torchvision, shortcut": (with_shortcut(Block), 1, 1),
    "nested": (Nested, 0, 1),
    "other order": (OtherOrder, 0, 1),
    "both called": (BothCalled, 0, 1),
    "torch.add": (ByAdd, 0, 1),
    "method": (ByMethod, 0, 1),
    "in place": (InPlace, 0, 1),
    "transformers": (OfTransformers, 1, 1),
    "transformers, shortcut": (with_shortcut(OfTransformers), 1, 1),
    "timm": (OfTimm, 1, 1),
    "timm, shortcut": (with_shortcut(OfTimm), 1, 1),
}


@contextmanager
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each of the two functions is called inside."""
    seen = {"batch_norm_relu": 0, "batch_norm_add_relu": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        original = getattr(FF, name)

        def function(*arguments: Any, **keywords: Any) -> Tensor:
            seen[name] += 1
            return original(*arguments, **keywords)

        return function

    with monkeypatch.context() as patch:
        for name in seen:
            patch.setattr(FF, name, counted(name))
        yield seen


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def steps(model: nn.Module, dtype: torch.dtype, run: Callable[[nn.Module, Tensor], Tensor] = plainly) -> list[Any]:
    """Two steps of training and one of evaluation: outputs, gradients and buffers."""
    torch.manual_seed(1)
    found: list[Any] = []
    for training in (True, True, False):
        model.train(training)
        x = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
        output = run(model, x * 1)
        output.square().sum().backward()
        found += [output.detach(), x.grad]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*found, *gradients, *(buffer.clone() for buffer in model.buffers())]


def identical(found: list[Any], expected: list[Any]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


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


# Effects --------------------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no shortcut")


def test_an_error_between_finds_what_eager_has_done() -> None:
    """The statistics of the batch norm before it have moved, and the variables have their values."""
    eager = Block()
    eager.downsample = Fails()
    swapped = fastops.swap(copy.deepcopy(eager))
    values = []
    for model in (eager, swapped):
        torch.manual_seed(1)
        with fastops.backend("torch"), pytest.raises(RuntimeError, match="no shortcut") as caught:
            model(torch.randn(2, 4, 5, 6))
        frames = [entry.frame for entry in caught.traceback if entry.name == "forward"]
        variables = next(dict(frame.f_locals) for frame in frames if "identity" in frame.f_locals)
        values.append([variables["out"], *model.buffers()])
        assert model.bn2.num_batches_tracked == 1
    assert identical(*values)


class Misses(Block):
    """Its statistics move before the statement that fails."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(x)
        scale = self.missing
        y = self.relu(y)
        return y * scale


class MissesInALoop(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in [self.bn2, self.relu, self.bn2]:
            y = layer(y)
        scale = self.missing
        return F.relu(y) * scale


class MissesOfFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.bn2.running_mean, self.bn2.running_var
        y = F.batch_norm(x, mean, var, training=True)
        scale = self.missing
        y = F.relu(y)
        return y * scale


class FailsBefore(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(x[:, :3])
        scale = self.missing
        y = self.relu(y)
        return y * scale


@pytest.mark.parametrize("kind", [Misses, MissesInALoop, MissesOfFunction, FailsBefore])
def test_a_statement_that_fails_finds_what_eager_has_done(kind: type[Block]) -> None:
    """What waited for the statement behind it has run, and if it fails by itself that is the error."""
    eager = kind()
    swapped, errors = fastops.swap(copy.deepcopy(eager)), []
    for model in (eager, swapped):
        torch.manual_seed(1)
        with fastops.backend("torch"), pytest.raises((AttributeError, RuntimeError)) as caught:
            model(torch.randn(2, 4, 5, 6))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert identical(list(swapped.buffers()), list(eager.buffers()))
    assert kind is FailsBefore or not torch.equal(swapped.bn2.running_mean, torch.zeros(4))


class Aliased(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.bn2(self.conv2(x))
        seen = out
        out += x
        return self.relu(out), seen


class UsedAgain(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.bn1(self.conv1(x))
        y = F.relu(out + x)
        return y, out


class Broadcast(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first = self.relu(self.bn2(self.conv2(x)) + x[:1, :, :1])
        return first, F.relu(2 + self.bn1(self.conv1(x)))


class OfItself(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.bn2(self.conv2(x))
        y = self.relu(y + y)
        z = self.conv1(x)
        return y, F.relu(self.bn1(z) + z)


class UnderNoGrad(Block):
    """A promise must not leave the ``with`` that it was made in."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.relu(self.inner(x) + x), x * 2

    def inner(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.bn2(self.conv2(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.norm(self.conv(x))


class LeavesNoGrad(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.relu(self.inner(x))
        return y * x, x


@pytest.mark.parametrize("kind", [Aliased, UsedAgain, Broadcast, OfItself, UnderNoGrad, LeavesNoGrad])
def test_what_else_sees_the_values(kind: type[nn.Module], backend: str) -> None:
    eager = kind().double()
    swapped = fastops.swap(copy.deepcopy(eager))

    def both(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model(x)
        return torch.cat([first.flatten(), second.flatten()])

    found, expected = (steps(model, torch.float64, both) for model in (swapped, eager))
    torch.testing.assert_close(found, expected)
    assert backend != "torch" or identical(found, expected)


class Reversed(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.relu(y + self.bn1(x))


class Into(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        out = self.bn1(x)
        out += y
        return self.relu(out)


@pytest.mark.parametrize("kind", [Reversed, Into])
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_memory_formats_of_two_summands(kind: type[nn.Module], first: torch.memory_format) -> None:
    eager = kind()
    swapped = fastops.swap(copy.deepcopy(eager))
    x = torch.randn(2, 4, 5, 6).to(memory_format=first)
    with fastops.backend("torch"):
        for y in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)):
            for other in (y, y.double(), y[:1]):
                found, expected = swapped(x, other), eager(x, other)
                assert torch.equal(found, expected)
                assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        if kind is Into:
            for model in (swapped, eager):
                with pytest.raises(RuntimeError, match="broadcast"):
                    model(x[:1], torch.randn(2, 4, 5, 6))


def test_nothing_of_timm_is_looked_for() -> None:
    assert "timm" not in sys.modules
