"""`swap(include=.., exclude=..)`: what is left alone is torch's in every way, the rest is swapped and fused as ever."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_models import FlatLeNet, sequential
from test_swap_fold import Norms
from torch import Tensor, nn

import fastops
from fastops.models import CIFARNet
from fastops.tuning import Example, calls_of


class Block(nn.Module):
    """Has every kind of what may be fused: modules, functions, sums, a batch norm, a pooling and an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        y = torch.relu(y + x)
        y = self.tail(y).mean((2, 3))
        y = torch.tanh(F.linear(y, self.head.weight))
        return torch.sigmoid(self.head(y))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


x = torch.randn(2, 3, 6, 6)
BN, SUM, F_LINEAR, HEAD, SECOND = "batch_norm_relu", "add_relu", "linear_act", "linear_act", "linear_act"
TAIL = ("conv2d", "relu_max_pool2d")
ALL = ["conv2d", BN, SUM, *TAIL, F_LINEAR, HEAD, SECOND]


def calls(model: nn.Module, x: Tensor = x) -> list[str]:
    """The functions of fastops that one run calls, by name."""
    with fastops.backend("torch"):
        return [call.name for call in calls_of(model, Example(x, None))]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, ALL),
        ({"include": "*"}, ALL),
        ({"include": ""}, ALL),
        ({"exclude": ()}, ALL),
        ({"exclude": "*"}, []),
        ({"exclude": ""}, []),
        ({"exclude": Net}, []),
        ({"include": ()}, []),
        ({"exclude": "first"}, [SECOND]),
        ({"exclude": ["first", "second"]}, []),
        ({"include": "second"}, [SECOND]),
        ({"include": "second.*"}, [SECOND]),
        ({"include": "first", "exclude": "first"}, []),
        ({"include": ["second", "first.head"]}, [HEAD, SECOND]),
        ({"exclude": {"first.conv"}}, [BN, SUM, *TAIL, F_LINEAR, HEAD, SECOND]),
        ({"exclude": "first.act"}, ["conv2d", SUM, *TAIL, F_LINEAR, HEAD, SECOND]),
        ({"exclude": nn.BatchNorm2d}, ["conv2d", SUM, *TAIL, F_LINEAR, HEAD, SECOND]),
        ({"exclude": "first.tail"}, ["conv2d", BN, SUM, F_LINEAR, HEAD, SECOND]),
        ({"exclude": "first.tail.0"}, ["conv2d", BN, SUM, F_LINEAR, HEAD, SECOND]),
        ({"exclude": nn.Identity}, ["conv2d", BN, SUM, "conv2d", F_LINEAR, HEAD, SECOND]),
        ({"exclude": "first.tail.2"}, ["conv2d", BN, SUM, "conv2d", F_LINEAR, HEAD, SECOND]),
        ({"exclude": nn.ReLU}, ["conv2d", SUM, "conv2d", F_LINEAR, HEAD, SECOND]),
        ({"exclude": nn.GELU}, ["conv2d", BN, SUM, *TAIL, F_LINEAR, HEAD, "linear"]),
        ({"exclude": nn.Linear}, ["conv2d", BN, SUM, *TAIL, F_LINEAR]),
        ({"include": nn.Module, "exclude": nn.Sequential}, ["conv2d", BN, SUM, F_LINEAR, HEAD]),
        ({"include": nn.Linear}, [HEAD, "linear"]),
        ({"include": (nn.Linear, nn.GELU)}, [HEAD, SECOND]),
        ({"include": Block}, ["conv2d", BN, SUM, *TAIL, F_LINEAR, HEAD]),
        ({"include": ["*.conv", "*.bn", nn.ReLU]}, ["conv2d", BN]),
        ({"include": nn.modules.conv._ConvNd}, ["conv2d", "conv2d"]),
    ],
)
def test_what_runs(choice: dict[str, Any], expected: list[str]) -> None:
    eager = Net()
    swapped = fastops.swap(copy.deepcopy(eager), **choice)
    assert calls(swapped) == expected
    assert calls(copy.deepcopy(swapped)) == expected
    assert calls(copy.copy(swapped)) == expected
    with fastops.backend("torch"):
        assert torch.equal(swapped(x), eager(x))
    assert calls(fastops.swap(swapped)) == ALL  # which chooses anew
    assert calls(fastops.swap(swapped, **choice)) == expected
    plain = pickle.loads(pickle.dumps(fastops.unswap(swapped)))
    for before, after, loaded in zip(eager.modules(), swapped.modules(), plain.modules(), strict=True):
        assert type(before) is type(after) is type(loaded)
        assert vars(before).keys() == vars(after).keys() == vars(loaded).keys()


def test_what_is_left_alone_keeps_its_class() -> None:
    model, choice = Net(), {"include": "first", "exclude": ["first.tail", nn.BatchNorm2d, "*.act", "first.conv"]}
    before = {path: type(module) for path, module in model.named_modules()}
    fastops.swap(fastops.swap(model), **choice)
    changed = {path for path, module in model.named_modules() if type(module) is not before[path]}
    assert changed == {"", "first", "first.head"}
    reasons = {row.name: row.outcome for row in fastops.report(model).rows if not row.done}
    assert reasons == {
        "first.conv": "not swapped: excluded",
        "first.bn": "not folded: excluded",
        "first.act": "not fused: excluded",
        "first.tail.0": "not swapped: excluded",
        "first.tail.2": "not fused: excluded",
        "second.0": "not swapped: not included",
        "second.1": "not fused: not included",
    }


def test_the_report_says_what_else_is_not_fused_for_that() -> None:
    def outcomes(**choice: Any) -> dict[str, str]:
        return {row.name: row.outcome for row in fastops.report(fastops.swap(Net(), **choice)).rows}

    assert outcomes(exclude=nn.BatchNorm2d)["first.act"] == "not fused: bn is excluded"
    assert outcomes(exclude="first.conv")["first.bn"] == "not folded: conv is excluded"
    found = outcomes(include="first.head")
    assert found["first.relu(sum)"] == "not fused: Block is not included"
    assert found["first.sigmoid(head)"] == "fused with head"
    assert outcomes(exclude="first")["first.relu(sum)"] == "not fused: excluded"
    assert outcomes(exclude=nn.GELU)["second.1"] == "not fused: excluded"


def test_a_sum_into_what_an_excluded_batch_norm_gives() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            out = self.bn(x)
            out += y
            return torch.relu(out)

    model, x = Sums(), torch.randn(4, 3)
    assert calls(fastops.swap(model), x) == ["batch_norm_add_relu"]
    assert calls(fastops.swap(model, exclude="bn"), x) == []
    assert "not fused: bn is excluded" in [row.outcome for row in fastops.report(model).rows]


def test_no_excluded_batch_norm_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastops.fold.SMALLER", 0)
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(2, 3, 4, 4)
    for choice, count in (({"exclude": "0"}, 1), ({"exclude": "1"}, 1), ({"include": "0"}, 1), ({"include": "?"}, 0)):
        fastops.swap(model, **choice)  # type: ignore[arg-type]
        with torch.no_grad(), fastops.backend("triton"), Norms() as norms:
            model(x)
        assert norms.count == count


def test_no_excluded_pooling_is_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2))
    assert "relu_max_pool2d" in calls(fastops.swap(model))
    assert calls(fastops.swap(model, exclude=nn.MaxPool2d)) == ["conv_relu2d"]


def test_one_module_at_two_places_is_excluded_by_either() -> None:
    model = sequential()
    model.append(model[0])
    fastops.swap(model, exclude="5")
    assert type(model[0]) is nn.Linear and type(model[2]) is fastops.nn.Linear
    fastops.swap(model, include="5")
    assert type(model[0]) is fastops.nn.Linear and type(model[2]) is nn.Linear


def test_classes_that_swap_made_or_put_there_stand_for_the_plain_ones() -> None:
    model = fastops.swap(Net())
    fastops.swap(model, exclude=[type(model.first), fastops.nn.Linear])
    assert type(model.first) is Block and calls(model) == []


def test_parametrized_layers_and_own_layers_of_fastops() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(parametrized, fastops.nn.Linear(3, 3), fastops.nn.LinearReLU(3, 3))
    kind = type(parametrized)
    fastops.swap(model)
    assert calls(model, torch.randn(2, 3)) == ["linear", "linear", "linear_relu"]
    fastops.swap(model, exclude=nn.Linear)
    assert type(model[0]) is kind and type(model[1]) is nn.Linear
    assert calls(model, torch.randn(2, 3)) == ["linear_relu"]  # what it is has no plain class


def test_scripted_modules_and_wrapped_models() -> None:
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Linear(3, 3))
    model = nn.DataParallel(nn.Sequential(scripted, nn.Linear(3, 3), nn.ReLU()))
    fastops.swap(model, exclude=["module.0", "*.1"])
    assert "_fastops_left_alone" not in vars(scripted) and type(model.module[1]) is nn.Linear
    assert model(torch.randn(2, 3)).shape == (2, 3)
    fastops.swap(model, include="module")
    assert type(model.module[1]) is fastops.nn.Linear


def test_losses() -> None:
    criterion = fastops.swap(nn.CrossEntropyLoss(), exclude=nn.CrossEntropyLoss)
    assert type(criterion) is nn.CrossEntropyLoss
    assert fastops.report(criterion).rows[0].outcome == "not swapped: excluded"
    assert type(fastops.swap(criterion, include=nn.modules.loss._Loss)) is fastops.nn.CrossEntropyLoss


def test_layers_alone() -> None:
    model = fastops.swap(Net(), fuse=False, include="first", exclude="*.head")
    assert calls(model) == ["conv2d", "conv2d"]
    assert type(model) is Net and type(model.first.head) is nn.Linear


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("third", ValueError, "nothing in Net matches 'third'"),
        (["first", "first.*.5"], ValueError, "nothing in Net matches 'first.*.5'"),
        (nn.Conv3d, ValueError, "nothing in Net matches Conv3d"),
        (5, TypeError, "expects name patterns, module classes or a sequence of them, not int"),
        (["first", None], TypeError, "not NoneType"),
        (int, TypeError, "not the class int"),
        (b"first", TypeError, "not int"),
        (nn.Sequential(nn.ReLU()), TypeError, "not ReLU"),
        (nn.ReLU(), TypeError, "not ReLU"),
    ],
)
def test_errors_change_nothing(option: str, given: Any, error: type[Exception], words: str) -> None:
    model = fastops.swap(Net(), exclude="second")
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(error) as caught:
        fastops.swap(model, **{option: given})
    assert str(caught.value).startswith(option) and str(caught.value).endswith(words)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


def test_an_error_later_on_changes_nothing_either() -> None:
    model = fastops.swap(Net(), exclude="second")
    with pytest.raises(TypeError):
        fastops.swap(model, include="second", memory_format="last")  # type: ignore[arg-type]
    assert calls(model) == ALL[:-1]


def test_verify_takes_the_choice_as_it_is() -> None:
    model, x = sequential(), torch.randn(2, 6)
    with fastops.backend("triton"):
        assert fastops.verify(fastops.swap(model, exclude=["0", "2"]), x).ways["triton"] == 3
        assert not fastops.verify(fastops.swap(model, exclude="*"), x).ways


def test_print_shows_what_is_fused_now() -> None:
    model = CIFARNet()
    plain = repr(model)
    shown = repr(fastops.swap(model)).splitlines()
    assert [line for line in shown if line not in plain.splitlines()] == [
        line[:-1] + ", fused with ReLU)" for line in plain.splitlines() if line[:-1] + ", fused with ReLU)" in shown
    ]
    assert sum("fused with ReLU" in line for line in shown) == fastops.report(model).fused > 0
    assert repr(fastops.swap(model, exclude="*")) == repr(fastops.swap(model, fuse=False)) == plain
    assert repr(fastops.unswap(fastops.swap(model))) == plain


def test_print_follows_hooks_and_the_outermost_module() -> None:
    model = nn.Sequential(sequential(), nn.BatchNorm1d(3), nn.SiLU())
    plain = repr(fastops.swap(model)[0][0])
    assert "fused" not in plain  # alone it is behind nothing
    assert repr(model).count("fused with ReLU)") == 2 and repr(model).count("fused with SiLU)") == 1
    assert repr(model[0]).count("fused") == 2
    inner = fastops.swap(nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.ReLU()))
    assert repr(inner).count("fused") == 1 and "fused" not in repr(inner[0])  # which does not know what is behind it
    handle = model[0][0].register_forward_hook(lambda *_: None)
    assert repr(model).count("fused with ReLU)") == 1
    handle.remove()
    assert repr(nn.DataParallel(model)).count("fused with") == 3 and repr(copy.deepcopy(model)) == repr(model)


def test_print_says_all_that_a_layer_may_be_fused_with() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(x)) if self.training else torch.tanh(self.fc(x))

        def __repr__(self) -> str:
            return f"<{super().__repr__()}>"

        def extra_repr(self) -> str:
            return "mine"

    class Own(nn.Linear):
        def extra_repr(self) -> str:
            return "own"

    model = fastops.swap(Modes())
    assert repr(model).startswith("<Modes(\n  mine\n") and "bias=True, fused with ReLU or Tanh)" in repr(model)
    model.fc = fastops.swap(Own(2, 2))
    assert "(fc): Own(own)" in repr(model)


def test_a_model_of_the_tutorials() -> None:
    model = fastops.swap(FlatLeNet(), exclude="fc[12]")
    assert {path for path, module in model.named_modules() if type(module) is nn.Linear} == {"fc1", "fc2"}
    assert fastops.report(model).fused == 1


@pytest.mark.parametrize("choice", [{"include": ["first.head", nn.GELU]}, {"exclude": [nn.ReLU, "second.0"]}], ids=str)
def test_compiled_whole(choice: dict[str, Any]) -> None:
    torch._dynamo.reset()
    eager = Net()
    swapped = fastops.swap(copy.deepcopy(eager), **choice)
    with fastops.backend("torch"):
        found = torch.compile(swapped, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, eager(x))


class EverySum(nn.Module):
    """A sum of each kind, of layers: in a module that is not included they are Python's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        x = torch.relu(self.bn(x) + y)
        x = torch.relu(torch.add(self.fc(x), x))
        x = torch.relu(x.add(self.fc(x)))
        y = self.bn(x)
        y += x
        return torch.relu(y)


def test_sums_in_a_module_that_is_not_included() -> None:
    eager, x = EverySum(), torch.randn(4, 3)
    swapped = copy.deepcopy(eager)
    assert calls(fastops.swap(swapped), x) == ["batch_norm_add_relu", *["linear", "add_relu"] * 2, "add_relu"]
    assert calls(fastops.swap(swapped, include=["fc", "bn"]), x) == ["linear", "linear"]
    with fastops.backend("torch"):
        assert torch.equal(swapped(x), eager(x))
