"""The kernels of linear + cross-entropy in the interpreter, and the tiles of products that stand in for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_torch
from guard import call_plainly, run_guarded, same_bits
from torch import Tensor
from triton.runtime import interpreter

from fastops.kernels import chunked_logits, configs, onednn
from fastops.kernels import linear_cross_entropy as kernels
from fastops.kernels.chunked_logits import Target, losses, tile_shape

INF = float("inf")
ALL_NEEDED = (True, True, True, True)
WAYS = pytest.mark.parametrize("way", [kernels, onednn], ids=["kernels", "products"])
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


class Case(NamedTuple):
    """One way to call the loss."""

    bias: bool = True
    probabilities: bool = False
    weighted: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def tensors(self, M: int, K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Input, weight, bias, target, class weights."""
        target = torch.rand(M, N).to(dtype) if self.probabilities else torch.randint(N, (M,))
        if M > 1 and not self.probabilities:
            target[1] = self.ignore_index
        bias, weight = torch.randn(N).to(dtype) if self.bias else None, torch.rand(N).to(dtype)
        return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), bias, target, weight if self.weighted else None


PLAIN = Case(bias=False)
ALL_OF_INDICES = Case(weighted=True, ignore_index=-7, label_smoothing=0.2)
ALL_OF_PROBABILITIES = Case(probabilities=True, weighted=True, label_smoothing=0.2)
CASES = {"plain": PLAIN, "indices": ALL_OF_INDICES, "probabilities": ALL_OF_PROBABILITIES}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 x 16 x 16, so that there are several of everything."""
    monkeypatch.setattr(kernels, "matmul_config", lambda *_: configs.MatmulConfig(16, 16, 16, 1, 1))


def run(
    way: Any, call: Callable[..., Any], case: Case, tensors: tuple[Any, ...], scale: Tensor, budget: int
) -> tuple[Tensor, ...]:
    """Loss of each row and all gradients, in the accumulators' dtype."""
    target = tensors[3]

    def goal(target: Tensor, class_weight: Tensor | None) -> Target:
        return Target(target, class_weight, case.ignore_index, case.label_smoothing, len(tensors[1]))

    def forward(input: Any, weight: Any, bias: Any, target: Any, class_weight: Any) -> tuple[Tensor, ...]:
        own = goal(target, class_weight)
        return losses(way.linear_cross_entropy(input, weight, bias, own, budget), own)

    def backward(
        input: Any, weight: Any, bias: Any, target: Any, class_weight: Any, *saved: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = (True, True, bias is not None, case.probabilities)
        arguments = (input, weight, bias, goal(target, class_weight), *saved[1:], needs, budget)
        return way.linear_cross_entropy_backward(saved[0], *arguments)

    loss, *saved = call(forward, *tensors)
    if not case.probabilities:
        scale = scale.where(target != case.ignore_index, 0)
    gradients = call(backward, *tensors, scale.to(loss.dtype), *saved)
    return loss, *(gradient for gradient in gradients if gradient is not None)


def torchs(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    def reference(*tensors: Any) -> tuple[Tensor, ...]:
        *tensors, scale = tensors
        variables = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors[:4]]
        input, weight, bias, target = variables
        options = {"ignore_index": case.ignore_index, "label_smoothing": case.label_smoothing, "weight": tensors[4]}
        loss = F.cross_entropy(F.linear(input, weight, bias), target, reduction="none", **options)
        leaves = [t for t in variables if t is not None and t.requires_grad]
        return loss.detach(), *torch.autograd.grad(loss, leaves, scale)

    return reference


def check(
    way: Any, case: Case, shape: tuple[int, int, int], dtype: torch.dtype, budget: int = 1 << 20, runs: int = 3
) -> None:
    """A run under guard, judged together with others: one number of torch's may be exact by luck."""
    judged = []
    for number in range(8 if shape[0] == 1 else runs):
        tensors, scale = case.tensors(*shape, dtype), torch.rand(shape[0]).to(dtype) + 0.5
        results = run(way, call_plainly if number else run_guarded, case, tensors, scale, budget)
        judged.append((tuple(result.to(dtype) for result in results), (*tensors, scale)))
    assert_as_accurate_as_torch(torchs(case), *judged)


@WAYS
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, case: Case, way: Any) -> None:
    check(way, case, (19, 9, 37), dtype)


@pytest.mark.usefixtures("small_tiles")
@WAYS
@every_case
@pytest.mark.parametrize("shape", [(1, 3, 5), (1, 5, 47), (16, 16, 32), (33, 17, 49)], ids=str)
def test_shapes(shape: tuple[int, int, int], case: Case, way: Any) -> None:
    """One row, multiples of nothing, and tiles of logits that are cut in both directions."""
    check(way, case, shape, torch.bfloat16 if way is kernels else torch.float32, budget=2200)


@every_case
@pytest.mark.parametrize("shape", [(19, 9, 37), (1, 5, 47)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_the_forward_pass(dtype: torch.dtype, shape: tuple[int, int, int], case: Case) -> None:
    """Of four rows at a time. What is not needed is not made."""

    def reference(*tensors: Any) -> tuple[Tensor, ...]:
        return torchs(case)(*tensors)[: 3 + case.bias]

    judged = []
    for _ in range(8):
        tensors, scale = case.tensors(*shape, dtype), torch.rand(shape[0]).to(dtype) + 0.5
        *layer, target, class_weight = tensors
        goal = Target(target, class_weight, case.ignore_index, case.label_smoothing, shape[2])
        own = scale if case.probabilities else scale.where(goal.kept(), 0)
        budget = 4 * shape[2] * dtype.itemsize
        arguments, needs = (*layer, goal, own), (True, True, case.bias)
        (loss, *saved), gradients = onednn.linear_cross_entropy_with_gradients(*arguments, needs, budget)
        expected = losses(onednn.linear_cross_entropy(*layer, goal, budget), goal)
        torch.testing.assert_close((loss, *saved), expected)
        judged.append(((loss, *(gradient for gradient in gradients if gradient is not None)), (*tensors, scale)))
        for number in range(2 + case.bias):
            only = tuple(place == number for place in range(3))
            some = onednn.linear_cross_entropy_with_gradients(*arguments, only, budget)[1]
            assert [gradient is not None for gradient in some] == list(only)
            assert torch.equal(some[number], gradients[number])
    assert_as_accurate_as_torch(reference, *judged)


@WAYS
@every_case
def test_one_class(case: Case, way: Any) -> None:
    """Losses and gradients are zero but for roundings. Torch's happen to cancel: an error of zero is no measure."""
    tensors, scale = case.tensors(3, 2, 1, torch.float32), torch.ones(3)
    results = run(way, run_guarded, case, tensors, scale, 1 << 20)
    torch.testing.assert_close(results, torchs(case)(*tensors, scale))


@WAYS
def test_any_strides(way: Any) -> None:
    input, weight, bias = torch.randn(7, 20).t(), torch.randn(13, 14)[:, ::2], torch.randn(26)[::2]
    target, class_weight = torch.rand(13, 20).t(), torch.rand(1).expand(13)
    tensors = (input, weight, bias, target, class_weight)
    results = run(way, run_guarded, ALL_OF_PROBABILITIES, tensors, torch.ones(20), 1 << 20)
    expected = torchs(ALL_OF_PROBABILITIES)(*tensors, torch.ones(20))
    torch.testing.assert_close(results, expected)


@WAYS
@every_case
def test_only_needed_gradients(case: Case, way: Any) -> None:
    input, weight, bias, target, class_weight = case.tensors(20, 5, 30, torch.float32)
    goal = Target(target, class_weight, case.ignore_index, case.label_smoothing, 30)
    _, *saved = losses(way.linear_cross_entropy(input, weight, bias, goal, 1000), goal)
    arguments = (torch.rand(20), input, weight, bias, goal, *saved)
    possible = (True, True, bias is not None, case.probabilities)
    everything = way.linear_cross_entropy_backward(*arguments, possible, 1000)
    for number in range(4):
        needs = tuple(place == number and possible[place] for place in range(4))
        some = way.linear_cross_entropy_backward(*arguments, needs, 1000)
        assert [gradient is not None for gradient in some] == list(needs)
        assert not needs[number] or torch.equal(some[number], everything[number])


@NUMPY_WARNINGS
@pytest.mark.usefixtures("small_tiles")
@WAYS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_first_tiles_of_minus_infinity(label_smoothing: float, way: Any) -> None:
    """A running maximum of -inf makes no NaN; all logits at -inf do, as in torch."""
    input, weight = torch.randn(5, 3), torch.randn(50, 3)
    bias = torch.zeros(50)
    bias[:20] = -INF
    target = torch.tensor([20, 30, 49, 3, 47])
    case = Case(label_smoothing=label_smoothing)
    for everywhere in (False, True):
        bias = bias if not everywhere else torch.full((50,), -INF)
        goal = Target(target, None, -100, label_smoothing, 50)
        found = losses(way.linear_cross_entropy(input, weight, bias, goal, 400), goal)[0]
        expected = torchs(case)(input, weight, bias, target, None, torch.ones(5))[0]
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
@WAYS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_rows_ignored(label_smoothing: float, way: Any) -> None:
    case = Case(label_smoothing=label_smoothing)
    tensors = list(case.tensors(40, 5, 20, torch.float32))
    tensors[3] = torch.full((40,), -100)
    loss, *gradients = run(way, run_guarded, case, tuple(tensors), torch.ones(40), 1 << 20)
    assert not loss.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("small_tiles")
def test_ignored_blocks_of_rows_are_not_read() -> None:
    """Rows 16 to 31 are a block of their own. Huge ones cost nothing, and do no harm to their neighbours."""
    input, weight, bias, target, _ = Case().tensors(48, 5, 20, torch.float32)
    target[16:32] = -100
    finite = run(kernels, call_plainly, Case(), (input, weight, bias, target, None), torch.ones(48), 1 << 20)
    input[16:32] = float("nan")
    results = run(kernels, call_plainly, Case(), (input, weight, bias, target, None), torch.ones(48), 1 << 20)
    assert not results[0][16:32].any() and torch.equal(results[0], finite[0])
    assert torch.equal(results[1], finite[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@WAYS
def test_gradients_of_many_tiles_accumulate_in_float32(dtype: torch.dtype, way: Any) -> None:
    """300 equal rows, 100 or fewer at a time: in bfloat16 a running sum would be rounded each time."""
    input, weight, target = torch.ones(300, 1), torch.zeros(2, 1), torch.zeros(300, dtype=torch.int64)
    tensors = (input.to(dtype), weight.to(dtype), torch.zeros(2).to(dtype), target, None)
    _, _, grad_weight, grad_bias = run(way, call_plainly, Case(), tensors, torch.ones(300), 400)
    assert grad_weight.flatten().tolist() == grad_bias.tolist() == [-150, 150]


@WAYS
def test_two_runs_are_equal(way: Any) -> None:
    tensors = ALL_OF_INDICES.tensors(70, 9, 50, torch.float32)
    first, second = (run(way, call_plainly, ALL_OF_INDICES, tensors, torch.ones(70), 2000) for _ in range(2))
    assert same_bits(first, second)


@WAYS
def test_shards_of_classes_merge(way: Any) -> None:
    """Statistics of two ranges of classes are those of all, and each range has its own part of the gradient."""
    input, weight, bias, target, _ = Case().tensors(20, 5, 30, torch.float32)
    whole = Target(target, None, -100, 0.1, 30)
    parts = []
    for own in (slice(0, 11), slice(11, 30)):
        shard = whole._replace(target=(target - own.start).where(whole.kept(), -100))
        parts.append(way.linear_cross_entropy(input, weight[own], bias[own], shard, 1 << 20))
    merged = chunked_logits.Statistics(*(torch.stack(part) for part in zip(*parts, strict=True))).merged()
    expected = way.linear_cross_entropy(input, weight, bias, whole, 1 << 20)
    torch.testing.assert_close(losses(merged, whole), losses(expected, whole))


@pytest.mark.parametrize("budget", [1, 100, 1 << 13, 8 << 20, 32 << 20, 1 << 40])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4096, 32000), (10**6, 3), (3, 10**6), (257, 8191)])
def test_tiles_keep_to_the_budget(rows: int, classes: int, budget: int) -> None:
    block, width = tile_shape(rows, classes, 4, budget)
    assert 1 <= block <= rows and 1 <= width <= classes
    assert block * width * 4 <= max(budget, 4)


def test_splits_of_classes() -> None:
    """Every multiprocessor gets two programs, if there are as many tiles."""
    device = SimpleNamespace(type="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "multiprocessors", lambda _: 100)
        assert [configs.class_splits(device, rows, 250) for rows in (1, 32, 100, 1000)] == [200, 6, 2, 1]
        assert configs.class_splits(device, 1, 3) == 3


@pytest.mark.parametrize("case", ["aligned", "address", "row", "column"])
@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
def test_operands_that_are_not_aligned_have_their_own_tile(
    which: int, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses one by one take registers: the smallest tile, shared by more warps, in short steps."""
    for module in (configs, kernels):
        monkeypatch.setattr(module, "architecture", lambda _: "sm90")
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 1)
    memory, aligned = torch.empty(128 * 129, dtype=torch.bfloat16), torch.empty(128, 128, dtype=torch.bfloat16)
    operands = [aligned, aligned]
    operands[which] = {
        "aligned": aligned,
        "address": memory[1:].as_strided((128, 128), (128, 1)),
        "row": memory.view(128, 129)[:, :-1],
        "column": aligned.t(),
    }[case]
    target = Target(torch.zeros(128, dtype=torch.int64), None, -100, 0.0, 128)
    logits = kernels.Logits.of(operands[0], operands[1], None, target)
    _, config = logits._replace(device=torch.device("cuda")).constants()
    assert (config.BLOCK_K, config.num_warps) != (32, 8) if case == "aligned" else config[2:4] == (32, 8)


@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_kernel_stops_at_a_target_out_of_range(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does. Where assertions are not compiled the loss is NaN; a shard may have classes of others."""
    input, weight = torch.randn(2, 4), torch.randn(5, 4)

    def of(target: int, classes: int = 5) -> Tensor:
        goal = Target(torch.tensor([-100, target]), None, -100, 0.0, classes)
        return losses(kernels.linear_cross_entropy(input, weight, None, goal, 1 << 20), goal)[0]

    assert of(4).isfinite().all()
    assert of(wrong).isnan().tolist() == [False, True]
    armed = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", armed)
    of(4)
    of(wrong, classes=10)
    with pytest.raises(Exception, match=r"Target is out of bounds\."):
        of(wrong)
