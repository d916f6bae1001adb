"""`report` says what is swapped and fused, and why the rest is not, from nothing but the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from swap_models import CASES, ControlFlow, FlatLeNet, Functional, LeNet, Residual, SharedReLU, UsedTwice, sequential
from torch import Tensor, nn

import fastops

LENET = """\
relu(max_pool2d)  ReLU    not fused: its input is max_pool2d, not a layer
conv1             Conv2d  fastops.nn.Conv2d fused with its ReLU
relu(conv1)       ReLU    fused with conv1
conv2             Conv2d  fastops.nn.Conv2d
fc1               Linear  fastops.nn.Linear fused with its ReLU
relu(fc1)         ReLU    fused with fc1
fc2               Linear  fastops.nn.Linear fused with its ReLU
relu(fc2)         ReLU    fused with fc2
fc3               Linear  fastops.nn.Linear
3 of 3 linear layers swapped, 2 of 2 convolutions swapped, 3 of 4 ReLUs fused"""

UNSWAPPED = """\
0  Linear  not swapped
1  ReLU    not fused: fastops.swap would fuse it
2  Linear  not swapped
3  ReLU    not fused: fastops.swap would fuse it
4  Linear  not swapped
0 of 3 linear layers swapped, 0 of 2 ReLUs fused"""

CONTROL_FLOW = """\
body.fc1        Linear  fastops.nn.Linear fused with its ReLU
body.relu(fc1)  ReLU    fused with fc1
body.fc2        Linear  fastops.nn.Linear fused with its ReLU
body.relu(fc2)  ReLU    fused with fc2
body.fc3        Linear  fastops.nn.Linear
head            Linear  fastops.nn.Linear fused with its ReLU
relu(head)      ReLU    fused with head
4 of 4 linear layers swapped, 3 of 3 ReLUs fused"""

SHARED = """\
fc1   Linear  fastops.nn.Linear fused with its ReLU
fc2   Linear  fastops.nn.Linear fused with its ReLU
fc3   Linear  fastops.nn.Linear
relu  ReLU    fused with fc1
relu  ReLU    not fused: its input is sub, not a layer
relu  ReLU    fused with fc2
3 of 3 linear layers swapped, 2 of 3 ReLUs fused"""


class Modes(Functional):
    """Has another ReLU in each mode."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc2(self.fc1(x))) if self.training else self.fc3(self.fc2(self.fc1(x).relu()))


MODES = """\
fc1        Linear  fastops.nn.Linear fused with its ReLU
relu(fc1)  ReLU    fused with fc1
fc2        Linear  fastops.nn.Linear fused with its ReLU
relu(fc2)  ReLU    fused with fc2
fc3        Linear  fastops.nn.Linear
3 of 3 linear layers swapped, 2 of 2 ReLUs fused"""


class Activations(Functional):
    """Has GELU behind one layer, and another activation in each mode behind the next."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(x))
        return self.fc3(torch.relu(self.fc2(y)) if self.training else torch.tanh(self.fc2(y)))


ACTIVATIONS = """\
fc1        Linear  fastops.nn.Linear fused with its GELU
gelu(fc1)  GELU    fused with fc1
fc2        Linear  fastops.nn.Linear fused with its ReLU and its Tanh
relu(fc2)  ReLU    fused with fc2
tanh(fc2)  Tanh    fused with fc2
fc3        Linear  fastops.nn.Linear
3 of 3 linear layers swapped, 1 of 1 ReLUs fused, 2 of 2 other activations fused"""

LEVEL_0 = """\
fc1   Linear  fastops.nn.Linear
fc2   Linear  fastops.nn.Linear
relu  ReLU    not fused: fastops.swap would fuse it
relu  ReLU    not fused: fastops.swap would fuse it
2 of 2 linear layers swapped, 0 of 2 ReLUs fused"""


def plain(model: nn.Module) -> nn.Module:
    return model


def level_0(model: nn.Module) -> nn.Module:
    return fastops.swap(model, fuse=False)


def with_hook(model: nn.Module) -> nn.Module:
    fastops.swap(model)[3].register_forward_hook(lambda *_: None)
    return model


def with_another_layer(model: nn.Module) -> nn.Module:
    return fastops.swap(model).append(nn.Linear(3, 3))


HOOKED = """\
0  Linear  fastops.nn.Linear fused with its ReLU
1  ReLU    fused with 0
2  Linear  fastops.nn.Linear
3  ReLU    not fused: 3 has hooks or a replaced forward
4  Linear  fastops.nn.Linear
3 of 3 linear layers swapped, 1 of 2 ReLUs fused"""

CHANGED = """\
0  Linear  fastops.nn.Linear fused with its ReLU
1  ReLU    fused with 0
2  Linear  fastops.nn.Linear fused with its ReLU
3  ReLU    fused with 2
4  Linear  fastops.nn.Linear
5  Linear  not swapped
3 of 4 linear layers swapped, 2 of 2 ReLUs fused"""

TWICE = """\
relu(z)  ReLU    not fused: the output of fc is used elsewhere too
fc       Linear  fastops.nn.Linear
1 of 1 linear layers swapped, 0 of 1 ReLUs fused"""


def table(report: fastops.Report) -> str:
    """All rows one by one, and the totals."""
    cells = [(row.name, row.layer, row.outcome) for row in report.rows]
    first, second = (max((len(cell[column]) for cell in cells), default=0) for column in (0, 1))
    return "\n".join([*(f"{name:{first}}  {kind:{second}}  {why}" for name, kind, why in cells), report.summary()])


@pytest.mark.parametrize(
    ("make", "prepare", "text"),
    [
        (FlatLeNet, fastops.swap, LENET),
        (sequential, plain, UNSWAPPED),
        (sequential, lambda model: fastops.unswap(fastops.swap(model)), UNSWAPPED),
        (ControlFlow, fastops.swap, CONTROL_FLOW),
        (ControlFlow, lambda model: copy.deepcopy(fastops.swap(model)), CONTROL_FLOW),
        (SharedReLU, fastops.swap, SHARED),
        (Modes, fastops.swap, MODES),
        (Activations, fastops.swap, ACTIVATIONS),
        (Residual, level_0, LEVEL_0),
        (sequential, with_hook, HOOKED),
        (sequential, with_another_layer, CHANGED),
        (UsedTwice, fastops.swap, TWICE),
        (nn.MSELoss, plain, "(model)  MSELoss  not swapped\n0 of 1 losses swapped"),
        (nn.MSELoss, fastops.swap, "(model)  MSELoss  fastops.nn.MSELoss\n1 of 1 losses swapped"),
        (nn.ReLU, plain, "(model)  ReLU  not fused: no call of it was found in the source\n0 of 1 ReLUs fused"),
        (
            nn.Tanh,
            plain,
            "(model)  Tanh  not fused: no call of it was found in the source\n0 of 1 other activations fused",
        ),
        (nn.Dropout, plain, "nothing here that fastops knows"),
        (
            lambda: fastops.nn.LinearReLU(2, 2),
            fastops.swap,
            "(model)  LinearReLU  fastops.nn.LinearReLU\n1 of 1 linear layers swapped",
        ),
    ],
)
def test_table(make: Callable[[], nn.Module], prepare: Callable[[nn.Module], nn.Module], text: str) -> None:
    model = prepare(make())
    classes = [type(module) for module in model.modules()]
    report = fastops.report(model)
    assert table(report) == text
    assert fastops.report(model) == report
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_counts(case: object) -> None:
    model = fastops.swap(case.make())  # type: ignore[attr-defined]
    report = fastops.report(model)
    assert isinstance(report, fastops.Report)
    ours = (fastops.nn.Linear, fastops.nn.Conv2d)
    assert report.swapped == sum(isinstance(m, ours) for m in model.modules())
    assert report.fused == sum(row.outcome.startswith("fused with") for row in report.rows)
    reasons = [row.outcome for row in report.rows if not row.done and row.group != "not covered"]
    assert all(reason.startswith(("not swapped", "not fused: ", "not looked into: ")) for reason in reasons)
    assert fastops.report(fastops.unswap(model)).fused == fastops.report(model).swapped == 0


def test_torch_wrappers_are_not_looked_into_but_what_they_hold_is() -> None:
    report = fastops.report(fastops.swap(nn.DataParallel(sequential())))
    assert report.rows[0].outcome == "not looked into: its class DataParallel comes from torch"
    assert (report.swapped, report.fused) == (3, 2)


def activation(x: Tensor) -> Tensor:
    return torch.relu(x)


class Unclear(Functional):
    """What `report` cannot judge, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.ReLU()])

    def over_layers(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def in_try(self, x: Tensor) -> Tensor:
        try:
            x = self.fc1(x)
            x = torch.relu(x)
        finally:
            pass
        return x

    def outside(self, x: Tensor) -> Tensor:
        return activation(self.fc1(x))

    @staticmethod
    def act(x: Tensor) -> Tensor:
        return torch.relu(x)

    looks = lambda self, x: torch.relu(self.fc1(x))  # noqa: E731

    def reads_its_variables(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        return x * len(locals())


class BehindALoop(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def activated(self, x: Tensor) -> Tensor:
        for layer in [self.fc1, self.fc2, self.fc3]:
            x = layer(x)
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.fc1, self.fc2, self.fc3]:
            x = layer(x)
        return self.bn(x)


def test_what_stands_behind_a_loop_shows_only_when_it_runs() -> None:
    outcomes = {row.outcome for row in fastops.report(fastops.swap(BehindALoop())).rows}
    why = "what the loop before it gives shows only when it runs"
    assert {f"not folded: {why}", f"not fused: {why}"} <= outcomes


def test_what_shows_only_when_it_runs_and_what_was_not_looked_into() -> None:
    model = fastops.swap(Unclear())
    outcomes = {row.name: row.outcome for row in fastops.report(model).rows}
    assert outcomes["over_layers over self.layers"].endswith("is decided when it runs")
    assert outcomes["relu(x)"] == "not fused: the output of fc1 is in a block that may catch an exception"
    assert outcomes["activation(..)"] == "activation was not looked into: it is a function outside of a class"
    assert outcomes["act"] == "act was not looked into: it is a static method"
    assert outcomes["looks"] == "looks was not looked into: it is a lambda"
    reason = "it calls locals, which may look at its variables"
    assert outcomes["reads_its_variables"] == f"reads_its_variables was not looked into: {reason}"


def test_replaced_after_the_swap_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastops.swap(Functional())
    monkeypatch.setattr(Functional, "forward", Modes.forward)
    assert "not fused: the model was changed since it was swapped: swap again" in str(fastops.report(model))
    assert fastops.report(fastops.swap(model)).fused == 2


def test_lenet_of_the_tutorial_is_fused_whole() -> None:
    class Net(LeNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            x = x.view(-1, self.num_flat_features(x))
            x = F.relu(self.fc1(x))
            x = F.relu(self.fc2(x))
            return self.fc3(x)

    assert fastops.report(fastops.swap(Net())).fused == 4
