"""What a residual block has done where one of its statements fails, and what else sees the values between."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from swap_blocks import (
    Block,
    identical,
    steps,
)
from torch import Tensor, nn

import fastops

pytestmark = no_fallback


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
