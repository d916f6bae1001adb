"""The cross-entropy kernels in the interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from guard import call_plainly, run_guarded, same_bits
from launches import record_stores
from torch import Tensor
from triton.runtime import interpreter

from fastops.kernels import cross_entropy as kernels
from fastops.kernels.launch import Plan, launch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
NAN, INF = float("nan"), float("inf")
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
# Lanes outside a row compute what is thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Options(NamedTuple):
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0


DEFAULTS = Options()


class Case(NamedTuple):
    """One way to call the loss."""

    probabilities: bool = False
    weighted: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def tensors(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Options]:
        N, C, D = shape
        weight = torch.rand(C).to(dtype) if self.weighted else None
        target = torch.randint(C, (N, D))
        if N > 1:
            target[1] = self.ignore_index
        if self.probabilities:
            target = torch.rand(shape).to(dtype)
        return torch.randn(shape).to(dtype), target, Options(weight, self.ignore_index, self.label_smoothing)


INDICES = Case()
ALL_OF_INDICES = Case(weighted=True, ignore_index=-7, label_smoothing=0.2)
ALL_OF_PROBABILITIES = Case(probabilities=True, weighted=True, label_smoothing=0.2)
CASES = {
    "indices": INDICES,
    "weight": Case(weighted=True),
    "smoothing": Case(label_smoothing=0.1),
    "smoothing_1": Case(label_smoothing=1.0),
    "ignore_a_class": Case(ignore_index=1),
    "all_of_indices": ALL_OF_INDICES,
    "probabilities": Case(probabilities=True),
    "all_of_probabilities": ALL_OF_PROBABILITIES,
}


def use_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, classes: int) -> None:
    """Small tiles, so that there are several."""

    def config(all_classes: int, inner: int, *_: Any) -> kernels.CrossEntropyConfig:
        power_of_2 = kernels.triton.next_power_of_2
        return kernels.CrossEntropyConfig(min(rows, power_of_2(inner)), min(classes, power_of_2(all_classes)), 1)

    monkeypatch.setattr(kernels, "cross_entropy_config", config)


@pytest.fixture(params=["table", "tile128x4"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tile of the table, which holds all there is here, or a small one."""
    if request.param != "table":
        use_tiles(monkeypatch, 128, 4)
    return str(request.param)


@pytest.fixture
def judged_dtype(tile: str) -> torch.dtype:
    """With several tiles of classes, backward's float32 includes the rounding of the log-sum-exp: judge bfloat16."""
    return torch.float32 if tile == "table" else torch.bfloat16


def torchs(reduction: str, options: Options) -> Callable[..., tuple[Tensor, ...]]:
    """``(loss, grad_input, grad_target)`` of torch; no grad_target for class indices."""

    def reference(input: Tensor, target: Tensor, weight: Tensor | None, grad_output: Tensor) -> tuple[Tensor, ...]:
        variables = [tensor.detach().requires_grad_() for tensor in (input, target) if tensor.is_floating_point()]
        input, target = variables if len(variables) == 2 else (variables[0], target)
        loss = F.cross_entropy(input, target, reduction=reduction, **options._replace(weight=weight)._asdict())
        return loss.detach(), *torch.autograd.grad(loss, variables, grad_output)

    return reference


def run(
    call: Callable[..., Any],
    input: Tensor,
    target: Tensor,
    reduction: str,
    options: Options,
    grad_output: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """What `torchs` returns, from the kernels, and the tensors it is to be called with."""
    arguments = (input, target, options.weight)
    loss, *saved = call(kernels.cross_entropy, *arguments, reduction, *options[1:])
    grad = torch.rand_like(loss) + 0.5 if grad_output is None else grad_output
    need_target = target.is_floating_point()
    gradients = call(
        kernels.cross_entropy_backward, grad, *arguments, *saved, reduction, *options[1:], True, need_target
    )
    return (loss, *gradients[: 1 + need_target]), (*arguments, grad)


def check(
    input: Tensor, target: Tensor, reduction: str, options: Options = DEFAULTS, grad_output: Tensor | None = None
) -> None:
    """Loss and gradients of a guarded run against torch's."""
    guarded = run(run_guarded, input, target, reduction, options, grad_output)
    assert_as_accurate_as_torch(torchs(reduction, options), guarded)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [*itertools.product(DTYPES, ["none"]), *itertools.product(DTYPES[2:], ["mean", "sum"])],
    ids=str,
)
def test_options(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str, case: Case) -> None:
    """Three programs, in 16 bits each with two tiles of classes; the last programs overlap those before."""
    use_tiles(monkeypatch, 128, 8 if dtype.itemsize == 2 else 16)
    input, target, options = case.tensors((300, 7, 1), dtype)
    check(input, target, reduction, options)


@pytest.mark.parametrize("case", [ALL_OF_INDICES, ALL_OF_PROBABILITIES], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "mean"), (torch.float32, "sum"), (torch.float64, "mean")], ids=str
)
def test_rounded_sums(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str, case: Case) -> None:
    """Torch's error in one sum may be nothing by luck: sixteen sums are judged together."""
    use_tiles(monkeypatch, 128, 8)
    options = case.tensors((300, 7, 1), dtype)[2]

    def draw() -> Any:
        input, target, _ = case.tensors((300, 7, 1), dtype)
        return run(call_plainly, input, target, reduction, options)

    assert_as_accurate_as_torch(torchs(reduction, options), *(draw() for _ in range(16)))


@pytest.mark.parametrize("case", [ALL_OF_INDICES, ALL_OF_PROBABILITIES], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (127, 13, 1),
        (128, 3, 1),
        (129, 4, 1),
        (300, 5, 1),
        (1, 5, 300),
        (9, 4, 37),
        (3, 9, 128),
        (3, 8, 129),
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, int, int], case: Case, judged_dtype: torch.dtype) -> None:
    input, target, options = case.tensors(shape, judged_dtype)
    check(input, target, "none", options)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch_last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "strided": lambda x: F.pad(x, (0, x.shape[2], 2, 1))[:, 2:-1, ::2],
    "same_in_the_batch": lambda x: x[:1].expand(x.shape),
    "same_at_each_position": lambda x: x[:, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("case", [INDICES, ALL_OF_PROBABILITIES], ids=["indices", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 7, 1), (3, 6, 130)], ids=str)
def test_layouts(shape: tuple[int, int, int], layout: str, case: Case, judged_dtype: torch.dtype) -> None:
    input, target, options = case.tensors(shape, judged_dtype)
    arrange = LAYOUTS[layout]
    target = arrange(target) if case.probabilities else arrange(target.unsqueeze(1)).squeeze(1)
    check(arrange(input), target, "none", options)


def test_gradients_keep_the_layout_of_their_inputs() -> None:
    input, target, options = ALL_OF_PROBABILITIES.tensors((3, 6, 4), torch.float32)
    input = LAYOUTS["channels_last"](input)
    (_, grad_input, grad_target), _ = run(call_plainly, input, target, "mean", options)
    assert grad_input.stride() == input.stride() and grad_target.stride() == target.stride()


@pytest.mark.parametrize(
    "grad_output",
    [torch.tensor(3.0).expand(5, 70), torch.arange(5.0)[:, None].expand(5, 70), torch.arange(350.0).view(70, 5).t()],
    ids=["scalar", "per_sample", "transposed"],
)
def test_none_takes_every_gradient(grad_output: Tensor, judged_dtype: torch.dtype) -> None:
    input, target, options = ALL_OF_INDICES.tensors((5, 7, 70), judged_dtype)
    check(input, target, "none", options, grad_output.to(judged_dtype))


ROWS = [
    [INF, 0, 1, 2, -1, 0],
    [NAN, 0, 1, 2, -1, 0],
    [0, 0, 1, 2, -1, NAN],
    [-INF] * 6,
    [-INF, -INF, -INF, -INF, 0, 1],  # the first tile of four is all -inf
    [-INF, 1, -INF, 2, 3, -INF],
    [1, 2, 3, 4, 5, 6],
]


def beside_finite_rows(*rows: list[float]) -> Tensor:
    return torch.cat((torch.tensor(rows), torch.randn(300, 6))).unsqueeze(-1)


@NUMPY_WARNINGS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("ignored", [False, True], ids=["kept", "ignored"])
def test_nan_and_inf_spread_as_in_torch(ignored: bool, case: Case, judged_dtype: torch.dtype) -> None:
    """Also where the position is ignored."""
    input = beside_finite_rows(*ROWS).to(judged_dtype)
    _, target, options = case.tensors((len(input), 6, 1), judged_dtype)
    if not case.probabilities:
        target[: len(ROWS)] = options.ignore_index if ignored else 4
    check(input, target, "none", options)


@NUMPY_WARNINGS
@pytest.mark.parametrize("target", [0, 5, -100])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_mean_of_nan_and_inf(row: list[float], target: int) -> None:
    input = beside_finite_rows(row).bfloat16()
    targets = torch.randint(6, (len(input), 1))
    targets[0] = target
    check(input, targets, "mean")


@NUMPY_WARNINGS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(reduction: str, label_smoothing: float) -> None:
    """The mean of nothing is NaN, as in torch, but no gradient is."""
    target = torch.full((3, 1), -100)
    options = Options(label_smoothing=label_smoothing)
    (loss, grad_input), _ = run(run_guarded, torch.randn(3, 5, 1), target, reduction, options)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert (grad_input == 0).all()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_backward_is_given(reduction: str, case: Case) -> None:
    """The log-sum-exp of every position, and the denominator."""
    input, target, options = case.tensors((5, 7, 3), torch.bfloat16)
    _, log_sum_exp, denominator = run_guarded(kernels.cross_entropy, input, target, None, reduction, *options[1:])
    assert_as_accurate_as_torch(lambda x: [torch.logsumexp(x, 1)], ([log_sum_exp], [input.float()]))
    kept = 15 if case.probabilities else (target != options.ignore_index).sum()
    assert denominator.dtype is torch.float32 and denominator == (kept if reduction == "mean" else 1)


LARGE = pytest.mark.parametrize(("scale", "offset"), [(10, 0), (1, 1e4), (1, -1e4)])


@pytest.mark.usefixtures("tile")
@LARGE
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_of_large_logits(case: Case, scale: float, offset: float) -> None:
    """All sums are relative to the maximum: large logits, and a constant added to all, cost no accuracy."""
    input, target, options = case.tensors((300, 7, 1), torch.float32)
    tensors = scale * input + offset, target, options.weight, torch.ones(300, 1)
    loss, _, _ = run_guarded(kernels.cross_entropy, *tensors[:3], "none", *options[1:])
    assert_as_accurate_as_torch(lambda *arguments: torchs("none", options)(*arguments)[:1], ([loss], tensors))


@LARGE
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_large_logits(case: Case, scale: float, offset: float) -> None:
    """Where a tile holds all classes, backward makes up for the rounding of the log-sum-exp."""
    input, target, options = case.tensors((300, 7, 1), torch.float32)
    check(scale * input + offset, target, "none", options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_true_class_gradient_is_not_rounded_before_the_subtraction(dtype: torch.dtype) -> None:
    """p = 0.99909 is 1 in bfloat16: the gradient p - 1 would be lost."""
    input, target = torch.tensor([[7.0, 0.0]]).unsqueeze(-1).to(dtype), torch.tensor([[0]])
    (_, grad_input), _ = run(call_plainly, input, target, "mean", DEFAULTS, torch.ones((), dtype=dtype))
    exact = torch.softmax(input.double(), 1) - torch.tensor([[[1.0], [0.0]]])
    assert ((grad_input.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("case", [ALL_OF_INDICES, ALL_OF_PROBABILITIES], ids=["indices", "probabilities"])
def test_two_runs_are_equal(case: Case) -> None:
    input, target, options = case.tensors((300, 7, 1), torch.float32)
    grad_output = torch.tensor(1.5)
    first, second = (run(call_plainly, input, target, "mean", options, grad_output)[0] for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.usefixtures("tile")
def test_second_backward_is_independent_of_the_first() -> None:
    input, target, options = ALL_OF_INDICES.tensors((5, 7, 1), torch.float32)
    arguments = (input, target, options.weight)
    saved = kernels.cross_entropy(*arguments, "mean", *options[1:])[1:]
    first, second = (
        kernels.cross_entropy_backward(
            torch.tensor(grad_output), *arguments, *saved, "mean", *options[1:], True, False
        )[0]
        for grad_output in (1.0, -4.0)
    )
    assert torch.equal(second, -4 * first)


@pytest.mark.parametrize("classes", [13, 16])
def test_every_gradient_is_written_once(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share 16 bytes belong to programs that run side by side."""
    use_tiles(monkeypatch, 64, 8)
    input, target, _ = INDICES.tensors((129, classes, 1), torch.float32)
    saved = kernels.cross_entropy(input, target, None, "mean", -100, 0.0)[1:]
    written = record_stores(monkeypatch)
    options = (*saved, "mean", -100, 0.0, True, False)
    kernels.cross_entropy_backward(torch.ones(()), input, target, None, *options)
    addresses = np.concatenate(written)
    assert len(addresses) == len(np.unique(addresses)) == input.numel()


@pytest.mark.usefixtures("tile")
def test_only_needed_gradients() -> None:
    input, target, options = ALL_OF_PROBABILITIES.tensors((5, 7, 3), torch.float32)
    arguments = (input, target, options.weight)
    saved = kernels.cross_entropy(*arguments, "sum", *options[1:])[1:]

    def gradients(*needed: bool) -> tuple[Tensor | None, Tensor | None]:
        return run_guarded(
            kernels.cross_entropy_backward, torch.tensor(2.0), *arguments, *saved, "sum", *options[1:], *needed
        )

    both, for_input, for_target = gradients(True, True), gradients(True, False), gradients(False, True)
    assert for_input[1] is None and torch.equal(for_input[0], both[0])
    assert for_target[0] is None and torch.equal(for_target[1], both[1])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wrong", [5, -1, -99, 2**40])
def test_target_out_of_range(wrong: int, label_smoothing: float) -> None:
    input, target = torch.randn(2, 5, 2), torch.tensor([[0, -100], [wrong, 4]])
    with pytest.raises(IndexError) as torchs_error:
        F.cross_entropy(input, target, label_smoothing=label_smoothing)
    with pytest.raises(IndexError) as error:
        kernels.cross_entropy(input, target, None, "mean", -100, label_smoothing)
    assert str(error.value) == str(torchs_error.value) == f"Target {wrong} is out of bounds."


@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_kernel_stops_at_a_target_out_of_range(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, where the launcher must not wait for the targets to look at them."""
    armed = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", armed)
    monkeypatch.setattr(kernels, "check_targets", lambda *_: None)
    kernels.cross_entropy(torch.randn(2, 5, 1), torch.tensor([[-100], [4]]), None, "mean", -100, 0.0)
    with pytest.raises(Exception, match=r"Target is out of bounds\."):
        kernels.cross_entropy(torch.randn(2, 5, 1), torch.tensor([[-100], [wrong]]), None, "mean", -100, 0.0)


def test_offsets_beyond_2_to_the_31(tmp_path: Path) -> None:
    """Logits of a strided batch in a sparse file of 8 GiB."""
    far = 2**31 + 3
    storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * far, dtype=torch.float16)
    input = storage.as_strided((2, 5, 1), (far, 1, 1))
    input.copy_(torch.randn(2, 5, 1))
    near, target = input.contiguous(), torch.tensor([[3], [4]])
    loss, *saved = kernels.cross_entropy(input, target, None, "none", -100, 0.0)
    expected, *_ = kernels.cross_entropy(near, target, None, "none", -100, 0.0)
    assert torch.equal(loss, expected)
    gradients = (
        kernels.cross_entropy_backward(torch.ones(2, 1), x, target, None, *saved, "none", -100, 0.0, True, False)[0]
        for x in (input, near)
    )
    assert torch.equal(*gradients)


@pytest.mark.parametrize("mean", [False, True])
def test_many_partial_sums(mean: bool) -> None:
    losses, weights = torch.randint(9, (2, 2500)).float()
    loss, denominator = torch.empty(()), torch.empty(())
    plan = Plan(kernels.cross_entropy_total_kernel, (1,), 2500, MEAN=mean, LABEL_SMOOTHING=0.0, BLOCK=1024)
    launch(plan, losses, weights, loss, denominator)
    assert denominator == (weights.sum() if mean else 1)
    assert loss == losses.sum() / denominator
