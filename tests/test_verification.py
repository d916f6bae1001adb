"""`fastops.verify`: finds nothing in what is right, finds what is put in, and leaves everything as it was."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from torch import Tensor, nn

import fastops
from fastops import verification
from fastops.ops import OPS

pytestmark = no_fallback
EPS = torch.finfo(torch.float32).eps


@dataclass
class Output:
    """What pytrees do not look into."""

    values: Tensor
    best: dict[str, Tensor]


class Returning(nn.Module):
    """Returns a dataclass, which has values and indices of their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, input: Tensor) -> Output:
        values = self.layer(input).relu()
        return Output(values, {"index": values.argmax(1)})


class Taking(nn.Module):
    """Takes a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, input: Output) -> Tensor:
        return self.layer(input.values).relu() * input.best["factor"]


class Net(nn.Module):
    """Several inputs and outputs, nested; random numbers; parameters and inputs with and without gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, dtype=dtype), nn.BatchNorm2d(6, dtype=dtype)
        self.dropout, self.hidden = nn.Dropout(0.3), nn.Linear(96, 7, dtype=dtype)
        self.words = nn.Embedding(5, 7, dtype=dtype).requires_grad_(False)
        self.offset = torch.full((7,), 0.1, dtype=dtype)  # neither parameter nor buffer

    def forward(self, image: Tensor, word: Tensor, *, mask: dict[str, Tensor]) -> Any:
        hidden = self.dropout(F.relu(self.norm(self.conv(image)))).flatten(1)
        hidden = F.relu(self.hidden(hidden)) * mask["of"] + torch.rand_like(hidden[:, :7]) + self.offset
        return {"out": hidden + self.words(word), "more": (hidden.sum(), word, None)}


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    image, word = torch.randn(4, 3, 4, 4, dtype=dtype), torch.tensor([0, 4, 1, 1])
    mask = torch.rand(7, dtype=dtype, requires_grad=True)
    return {"example_input": (image, word), "example_kwargs": {"mask": {"of": mask}}}


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a launcher of an op wrong, forward (0) or backward (1), by a change of each tensor that it returns."""

    def put(op: str, direction: int, change: Callable[[Tensor], Tensor | None]) -> None:
        launchers = list(OPS[op].launchers)
        right = launchers[direction]

        def launcher(*words: Any, **options: Any) -> Any:
            results = right(*words, **options)
            if isinstance(results, Tensor):
                return change(results)
            return tuple(None if result is None else change(result) for result in results)

        launchers[direction] = launcher
        monkeypatch.setattr(OPS[op], "launchers", tuple(launchers))

    return put


# Nothing wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_right_model_is_ok(dtype: torch.dtype, swapped: bool) -> None:
    model = Net(dtype)
    if swapped:
        fastops.swap(model)
    found = fastops.verify(model, **arguments(dtype))
    assert found and found.ok and not found.differences, found
    # 3 outputs and 3 buffers, and gradients of 6 parameters and an input unless there are none
    assert found.compared == 13 + 13 + 6
    assert set(found.ways) == {"triton"} and found.ways["triton"] >= 3 * 2
    assert str(found).startswith("32 tensors compared, 0 differ\ncalls of fastops: ")


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "one input": (lambda: nn.Linear(3, 2), torch.randn(4, 3)),
    "an input with a gradient": (lambda: nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)),
    "loss": (nn.CrossEntropyLoss, (torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, 3, 0]))),
    "integers alone": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.tensor([1, 4])),
    "sparse gradients": (lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)), torch.tensor([1, 4])),
    "nothing to train": (lambda: nn.Linear(3, 2).requires_grad_(False), torch.randn(4, 3)),
    "folded batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        torch.randn(4, 3, 8, 8),
    ),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)),
    "compiled": (
        lambda: torch.compile(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), backend="aot_eager"),
        torch.randn(4, 3),
    ),
    "dataclass": (Returning, torch.randn(4, 3)),
    "dataclass as input": (Taking, Output(torch.randn(4, 3).requires_grad_(), {"factor": torch.randn(2)})),
    "layers of fastops": (lambda: fastops.nn.LinearReLU(3, 2), torch.randn(4, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_and_inputs(name: str) -> None:
    model, example = MODELS[name]
    found = fastops.verify(model(), example)
    assert found, found


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.float16)])
def test_modes_around_it(context: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with context():
        found = fastops.verify(model, torch.randn(4, 3))
    assert found and found.compared == 3 + 3 + 1, found


# Something wrong ------------------------------------------------------------------------------------------------------


def test_a_wrong_gradient_is_found(wrong: Callable[..., None]) -> None:
    wrong("linear_relu", 1, lambda gradient: gradient * 1.01)
    found = fastops.verify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))
    assert not found
    assert {(each.mode, each.name) for each in found.differences} == {
        (mode, f"gradient of 0.{name}") for mode in ("train", "eval") for name in ("weight", "bias")
    }
    line = next(line for line in str(found).splitlines() if line.startswith("train: gradient of 0.weight: error "))
    assert (
        line.endswith(" against float64, plus one rounding") and "times what is allowed: twice torch's own of" in line
    )


def test_wrong_integers_are_found(wrong: Callable[..., None]) -> None:
    """In fields of a dataclass too."""
    wrong("linear_relu", 0, lambda output: output.flip(1))
    found = {each.name: each.reason for each in fastops.verify(Returning(), torch.randn(64, 3)).differences}
    assert found.keys() >= {"output.values", "output.best['index']"}
    assert found["output.best['index']"].endswith(" elements differ")


class Named(nn.Module):
    """A parameter with the name of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(2, 3))

    def forward(self, input: Tensor) -> Tensor:
        return fastops.functional.linear(input, self.input)


def test_gradients_of_one_name_are_all_compared(wrong: Callable[..., None]) -> None:
    assert fastops.verify(Named(), torch.randn(4, 3).requires_grad_()).compared == 3 + 3 + 1
    wrong("linear", 1, lambda gradient: gradient * 7)
    found = fastops.verify(Named(), torch.randn(4, 3).requires_grad_())
    assert {each.name for each in found.differences} == {"gradient of input", "gradient of the input"}


def test_onednn_adds_up_in_another_order() -> None:
    with fastops.backend("onednn"):
        for seed in range(3):
            torch.manual_seed(seed)
            found = fastops.verify(nn.Sequential(nn.Linear(512, 256), nn.ReLU()), torch.randn(16, 512))
            assert found.ways == {"onednn": found.ways.total()} and found, found


def test_a_wrong_value_is_found_in_outputs_and_buffers(wrong: Callable[..., None]) -> None:
    wrong("conv2d", 0, lambda output: output + 0.01)
    found = fastops.verify(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(4, 3, 4, 4))
    names = {(each.mode, each.name) for each in found.differences}
    assert {("train", "buffer 1.running_mean"), ("eval", "output"), ("no_grad", "output")} <= names
    assert "buffer 1.num_batches_tracked" not in {name for _, name in names}


@pytest.mark.parametrize(
    ("direction", "change", "reason"),
    [
        (0, lambda output: output.double(), "output: it is torch.float64 (4, 2), not torch.float32 (4, 2)"),
        (0, lambda output: output[:3], "output: it is torch.float32 (3, 2), not torch.float32 (4, 2)"),
        (0, lambda output: output * torch.nan, "output: error nan, inf times what is allowed"),
        (1, lambda gradient: gradient.zero_(), "gradient of weight: error "),
    ],
)
def test_other_defects(wrong: Callable[..., None], direction: int, change: Any, reason: str) -> None:
    wrong("linear", direction, change)
    model = nn.Linear(3, 2).requires_grad_(direction == 1)
    found = fastops.verify(model, torch.randn(4, 3))
    assert not found and f"train: {reason}" in str(found), found


def test_a_kernel_that_fails_is_an_error(wrong: Callable[..., None]) -> None:
    def fail(output: Tensor) -> Tensor:
        raise RuntimeError("out of resource")

    wrong("linear", 0, fail)
    with pytest.raises(fastops.FallbackWarning, match="kernel of linear failed"):
        fastops.verify(nn.Linear(3, 2), torch.randn(4, 3))


class Odd(nn.Module):
    """Returns more, or uses more, when it is swapped."""

    def __init__(self, more: str) -> None:
        super().__init__()
        self.layer, self.other, self.more = nn.Linear(3, 2), nn.Linear(3, 2), more

    def forward(self, input: Tensor) -> Any:
        output = self.layer(input)
        if type(self.layer) is nn.Linear:
            return (output,)
        return (output, input) if self.more == "output" else (output + 0 * self.other(input),)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("output", "eval: output: it is another collection of tensors"),
        ("gradient", "eval: gradient of other.weight: there is one with fastops or without, not with both"),
    ],
)
def test_what_only_one_of_them_has(more: str, line: str) -> None:
    assert line in str(fastops.verify(Odd(more), torch.randn(4, 3)))


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.ReLU()])
def test_nothing_of_fastops_is_not_ok(model: nn.Module) -> None:
    with fastops.backend("torch"):
        found = fastops.verify(model, torch.randn(4, 3))
    assert not found and not found.differences
    calls = "3 on torch" if isinstance(model, nn.Linear) else "none"
    assert str(found).endswith(f"nothing of fastops ran, its calls: {calls}")


def test_no_reference_no_verdict() -> None:
    """A model that computes something else each time cannot be judged by its float64 run."""
    generator = torch.Generator()
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, input, output: output * torch.rand((), generator=generator))
    assert "output: torch's own run in float64 shares less than half" in str(fastops.verify(model, torch.randn(4, 3)))


# Luck -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "found"),
    [
        ([1, 1, 1, 1, 1], False),  # torch's own error, nothing in the first draw by luck, is one unit in others
        ([9, 0, 0, 0, 0], False),  # as of a ReLU that falls on the other side
        ([9, 9, 9, 0, 0], True),
        ([9, 9, 9, 9, 9], True),
    ],
)
def test_few_numbers_are_looked_at_again(units: list[int], found: bool) -> None:
    def run(kind: str, draw: int) -> verification.Results:
        exact = torch.ones(1, dtype=torch.float64)
        own = exact + (EPS if draw else 0)
        return {"output": {"ours": (exact + units[draw] * EPS).float(), "torch": own.float(), "exact": exact}[kind]}

    compared, wrong = verification._compare(run, Counter(), doubled=False)
    assert compared == 1 and bool(wrong) is found


@pytest.mark.parametrize(("off", "found"), [([0, 0, 0, 0, 0], 0), ([3, 0, 0, 1, 0], 0), ([2, 1, 1, 0, 0], 2)])
def test_integers_must_be_equal_in_most_draws(off: list[int], found: int) -> None:
    """As an index of a maximum, where two numbers are nearly equal, need not be in all of them."""

    def run(kind: str, draw: int) -> verification.Results:
        result = torch.zeros(4, dtype=torch.int64)
        return {"output": result + (torch.arange(4) < off[draw]) if kind == "ours" else result}

    _, wrong = verification._compare(run, Counter(), doubled=False)
    assert wrong == ({"output": f"{found} elements differ"} if found else {})


# What stays as it was -------------------------------------------------------------------------------------------------


def states(model: nn.Module) -> list[Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        [(type(module), module.training) for module in model.modules()],
        {name: (id(tensor), id(tensor.grad), tensor._version, tensor.tolist()) for name, tensor in tensors.items()},
        [None if tensor.grad is None else tensor.grad.tolist() for tensor in tensors.values()],
        (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        (torch.is_grad_enabled(), fastops.dispatch.selected_backend()),
    ]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_stays_as_it_was(swapped: bool, fails: bool) -> None:
    class Uneasy(Net):
        def forward(self, *words: Any, **options: Any) -> Any:
            random.random(), np.random.rand()
            if fails and not self.training:
                raise RuntimeError("not in eval")
            return super().forward(*words, **options)

    model = Uneasy()
    if swapped:
        fastops.swap(model)
    given = arguments()
    model(*given["example_input"], **given["example_kwargs"])["out"].sum().backward()
    model.norm.eval()
    before, inputs = states(model), copy.deepcopy(given)
    if fails:
        with pytest.raises(RuntimeError, match="not in eval"):
            fastops.verify(model, **given)
    else:
        assert fastops.verify(model, **given)
    assert states(model) == before
    torch.testing.assert_close(given, inputs, rtol=0, atol=0)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("a string", TypeError, "verify expects a torch.nn.Module, not str"),
        (nn.Module(), NotImplementedError, "forward"),
    ],
)
def test_errors(model: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fastops.verify(model, torch.randn(4, 3))


def test_a_model_for_one_dtype_is_an_error() -> None:
    model = nn.Linear(3, 2)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    with pytest.raises(RuntimeError, match="verify needs a model that runs in float64 as well: "):
        fastops.verify(model, torch.randn(4, 3))


def test_no_output_is_an_error() -> None:
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, input, output: {"nothing": None})
    with pytest.raises(TypeError, match="verify expects a model that returns tensors"):
        fastops.verify(model, torch.randn(4, 3))


def test_a_strict_backend_stays_strict() -> None:
    with fastops.backend("triton", strict=True):
        assert fastops.verify(nn.Linear(3, 2), torch.randn(4, 3))
        with pytest.raises(fastops.FallbackError):
            fastops.verify(nn.Linear(3, 2, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64))
