"""Be exactly torch: one test for each defect that a library of this kind has shipped, on every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    Case,
    every_case,
    gradients,
    no_fallback,
    onednn_in_float64,
    torch_linear_relu,
)
from interpreter import guard
from interpreter.accuracy import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastops
import fastops.functional as FF
from fastops import backport, dispatch
from fastops import nn as fnn
from fastops.kernels import chunked_logits
from fastops.kernels import cross_entropy as cross_entropy_kernels
from fastops.kernels import linear as linear_kernels
from fastops.kernels.activation import NONE, RELU
from fastops.nn.activated import Activated

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]
NAN, INF = float("nan"), float("inf")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
_WORDS: dict[type[nn.Module], tuple[Any, ...]] = {  # what torch's constructors get; losses without are made by ()
    nn.Linear: (5, 3),
    backport.LinearCrossEntropyLoss: (5, 3),
    nn.SmoothL1Loss: (None, None, "sum", 0.3),
    nn.HuberLoss: ("sum", 0.3),
    nn.CrossEntropyLoss: (torch.rand(3),),
    nn.BCEWithLogitsLoss: (torch.rand(3),),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (4, 6, 3, 2, 1)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (5, 0.1, 0.3)),
    nn.MaxPool2d: (3, 2, 1),
}
MODULES = [  # every module of the package that takes what torch's takes, beside torch's
    pytest.param(ours, torchs, _WORDS.get(torchs, ()), id=ours.__name__)
    for ours in vars(fnn).values()
    if isinstance(ours, type) and issubclass(ours, nn.Module) and not issubclass(ours, Activated)
    for torchs in ours.__bases__
]


def assert_exactly(ours: Any, torchs: Any) -> None:
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


def test_backend_of_this_file_is_what_it_says(backend: str) -> None:
    assert dispatch.selected_backend() == backend
    assert fastops.explain("linear", torch.randn(4, 3), torch.randn(2, 3)).backend == backend


# Inputs and memory ----------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_inputs_are_never_modified(
    case: Case, grad_enabled: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    onednn_in_float64(monkeypatch)
    tensors = case.tensors()
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    with torch.set_grad_enabled(grad_enabled):
        result = case.ours(*tensors)
    if grad_enabled:
        grad_output = torch.randn_like(result)
        kept = grad_output.clone(), result.detach().clone()
        result.backward(grad_output)
        assert_exactly((grad_output, result.detach()), kept)
    assert_exactly([t.detach() for t in tensors], before)
    assert [t._version for t in tensors] == versions


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_logits_of_ignored_rows_stay(reduction: str, backend: str) -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, -100, 2, -100])
    before = logits.clone()
    with torch.no_grad():
        FF.cross_entropy(logits, target, reduction=reduction)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (16, 64, 16), (17, 65, 15), (129, 130, 7)], ids=str)
def test_linear_kernels_touch_nothing_else(relu: bool, shape: tuple[int, int, int]) -> None:
    """Poison surrounds all memory, and every address is checked: no store is unmasked, no load out of range."""
    M, K, N = shape
    input, weight, bias = torch.randn(K, M).t(), torch.randn(N, 2 * K)[:, ::2], torch.randn(N)
    output = guard.run_guarded(linear_kernels.linear, input, weight, bias, RELU if relu else NONE)
    torch.testing.assert_close(output, (torch_linear_relu if relu else F.linear)(input, weight, bias))
    grad = torch.randn(N, M).t()
    mask = output if relu else None
    found = guard.run_guarded(linear_kernels.linear_backward, grad, input, weight, mask, True)
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    expected = gradients(torch_linear_relu if relu else F.linear, *leaves, grad_output=grad)[1:]
    torch.testing.assert_close(list(found), expected)


@every_case
def test_bits_repeat(case: Case, backend: str) -> None:
    """No atomics, no timing: the same call gives the same bits again."""
    first, again = (gradients(case.ours, *case.tensors(torch.float32)) for _ in range(2))
    assert_exactly(again, first)


class NoHostSynchronisation(TorchDispatchMode):
    """Raises at every read of a value by Python: on a GPU that would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique")
        return func(*args, **(kwargs or {}))


@every_case
def test_host_never_waits_for_a_value(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for two, on the CPU, where nothing is waited for: class indices (a kernel checks them on a GPU), and whether
    the gradient of a loss is finite whose own gradients were made in its forward pass (never on a GPU)."""
    onednn_in_float64(monkeypatch)
    monkeypatch.setattr(cross_entropy_kernels, "check_targets", lambda *_: None)
    monkeypatch.setattr(chunked_logits, "check_targets", lambda *_: None)
    monkeypatch.setattr("fastops.ops.linear_cross_entropy.is_finite", lambda _: True)
    tensors = case.tensors()
    with NoHostSynchronisation():
        result = case.ours(*tensors)
        torch.autograd.grad(result, tensors, torch.ones_like(result))


def test_targets_of_a_gpu_are_not_read_by_the_host() -> None:
    target = torch.empty(4, dtype=torch.int64, device="meta")
    chunked_logits.check_targets(target, 3, -100)  # a read of a meta tensor's value would raise


# Cross-entropy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0])])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_targets_ignored(weight: Tensor | None, label_smoothing: float, reduction: str, backend: str) -> None:
    """NaN for the mean of nothing, 0 for its sum, and no gradient."""
    target = torch.full((4,), -100)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        return gradients(lambda x: function(x, target, weight, **options), torch.ones(4, 3, requires_grad=True))

    assert_exactly(run(FF.cross_entropy), run(F.cross_entropy))


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.tensor([0.0, 1.0, 2.0])], ids=["all", "some"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_class_weights_of_zero(weight: Tensor, label_smoothing: float, backend: str) -> None:
    target = torch.tensor([0, 1, 0, 0])

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        logits = torch.arange(12.0).view(4, 3).sin().requires_grad_()
        return gradients(lambda x: function(x, target, weight, label_smoothing=label_smoothing), logits)

    torch.testing.assert_close(run(FF.cross_entropy), run(F.cross_entropy), equal_nan=True)


LOGITS: dict[str, list[float]] = {
    "minus infinity first": [-INF, -INF, 1.0, 2.0],
    "minus infinity last": [1.0, 2.0, -INF, -INF],
    "minus infinity but one": [-INF, -INF, -INF, 3.0],
    "minus infinity at the target": [1.0, -INF, 2.0, 3.0],
    "minus infinity everywhere": [-INF] * 4,
    "infinity": [1.0, INF, 2.0, 3.0],
    "nan": [1.0, 2.0, NAN, 3.0],
    "huge": [1e30, -1e30, 3e38, 0.0],
    "equal": [5.0] * 4,
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("target", [1, 3])
@pytest.mark.parametrize("block", [None, 2], ids=["one tile", "two tiles"])
def test_extreme_logits(
    name: str, target: int, block: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose first tile is -inf keeps its loss; NaN and infinity come out where torch's do."""
    if block is not None:
        config = cross_entropy_kernels.CrossEntropyConfig(2, block, 1)
        monkeypatch.setattr(cross_entropy_kernels, "cross_entropy_config", lambda *_: config)
    rows, targets = torch.tensor([LOGITS[name], [0.0, 1.0, 2.0, 3.0]]), torch.tensor([target, 2])

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        logits = rows.clone().requires_grad_()
        return gradients(lambda x: function(x, targets, reduction="none"), logits)

    torch.testing.assert_close(run(FF.cross_entropy), run(F.cross_entropy), equal_nan=True)


@HALF
def test_gradient_of_a_confident_class(dtype: torch.dtype) -> None:
    """At p = 0.999 rounding p before the subtraction of 1 would leave nothing of the gradient."""
    logits = torch.tensor([[6.9, 0.0], [0.0, 6.9], [9.0, 0.0], [-3.0, 4.0]], dtype=dtype).requires_grad_()
    target = torch.tensor([0, 1, 0, 1])
    with fastops.backend("triton"):
        found = gradients(lambda x: FF.cross_entropy(x, target, reduction="sum"), logits)[1]
    exact = gradients(lambda x: F.cross_entropy(x, target, reduction="sum"), logits.detach().double().requires_grad_())
    assert (found.double() - exact[1]).abs().div(exact[1].abs()).max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 3, 4, 7, 127, 128, -(2**63), 2**63 - 1, 2**31, -(2**31) - 1])
def test_any_ignore_index(ignore_index: int, backend: str) -> None:
    """In range, out of range, and where a tile wider than the three classes has columns of padding."""
    target = torch.tensor([0, ignore_index, 2, 1])

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        logits = torch.arange(12.0).view(4, 3).sin().requires_grad_()
        return gradients(lambda x: function(x, target, ignore_index=ignore_index), logits)

    torch.testing.assert_close(run(FF.cross_entropy), run(F.cross_entropy))


@pytest.mark.parametrize("bad", [3, 4, -1, -100, 2**40, -(2**63)])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 2)], ids=str)
def test_target_out_of_range_is_torchs_error(bad: int, shape: tuple[int, ...], backend: str) -> None:
    target = torch.full(shape[:1] + shape[2:] if len(shape) > 1 else (), bad)
    errors = []
    for function in (FF.cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError) as raised:
            function(torch.randn(shape), target, ignore_index=1)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


# Shapes ---------------------------------------------------------------------------------------------------------------

EMPTY: dict[str, Callable[[Any], list[Tensor]]] = {
    "linear no rows": lambda f: gradients(f.linear, leaf(0, 3), leaf(2, 3), leaf(2)),
    "linear no rows 3d": lambda f: gradients(f.linear, leaf(2, 0, 3), leaf(2, 3), leaf(2)),
    "linear no inputs": lambda f: gradients(f.linear, leaf(4, 0), leaf(2, 0), leaf(2)),
    "linear no outputs": lambda f: gradients(f.linear, leaf(4, 3), leaf(0, 3), leaf(0)),
    "relu no rows": lambda f: gradients(linear_relu_of(f), leaf(0, 3), leaf(2, 3), leaf(2)),
    "relu no inputs": lambda f: gradients(linear_relu_of(f), leaf(4, 0), leaf(2, 0), leaf(2)),
    "mse mean": lambda f: gradients(f.mse_loss, leaf(0, 3), leaf(0, 3)),
    "mse none": lambda f: gradients(lambda a, b: f.mse_loss(a, b, reduction="none"), leaf(0, 3), leaf(0, 3)),
    "mse sum": lambda f: gradients(lambda a, b: f.mse_loss(a, b, reduction="sum"), leaf(0), leaf(0)),
    "cross-entropy no rows": lambda f: gradients(lambda a: f.cross_entropy(a, no_targets()), leaf(0, 3)),
    "cross-entropy no rows sum": lambda f: gradients(
        lambda a: f.cross_entropy(a, no_targets(), reduction="sum"), leaf(0, 3)
    ),
    "cross-entropy no positions": lambda f: gradients(
        lambda a: f.cross_entropy(a, no_targets(2), reduction="none"), leaf(2, 3, 0)
    ),
    "mse 0d": lambda f: gradients(f.mse_loss, leaf(), leaf()),
    "mse 0d none": lambda f: gradients(lambda a, b: f.mse_loss(a, b, reduction="none"), leaf(), leaf()),
    "linear 1d": lambda f: gradients(f.linear, leaf(3), leaf(2, 3), leaf(2)),
    "linear 5d": lambda f: gradients(f.linear, leaf(1, 2, 1, 2, 3), leaf(2, 3), leaf(2)),
    "relu one": lambda f: gradients(linear_relu_of(f), leaf(1), leaf(1, 1), leaf(1)),
    "bce mean": lambda f: gradients(f.binary_cross_entropy_with_logits, leaf(0, 3), leaf(0, 3)),
    "bce 0d": lambda f: gradients(f.binary_cross_entropy_with_logits, leaf(), leaf()),
    "cross-entropy one class": lambda f: gradients(lambda a: f.cross_entropy(a, torch.zeros(2).long()), leaf(2, 1)),
    "cross-entropy 5d": lambda f: gradients(
        lambda a: f.cross_entropy(a, torch.ones(2, 1, 2, 2).long()), leaf(2, 3, 1, 2, 2)
    ),
}


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4, INF])
def test_bce_is_stable(scale: float, backend: str) -> None:
    """Logits of +-1e4 overflow no exponential."""
    target, pos_weight = torch.tensor([0.0, 1.0, 0.5, 0.25]), torch.tensor(3.0)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        logits = (scale * torch.tensor([1.0, -1.0, 1.0, -1.0])).requires_grad_()
        variables = logits, target.clone().requires_grad_()
        return gradients(lambda x, y: function(x, y, pos_weight=pos_weight, reduction="none"), *variables)

    found, expected = run(FF.binary_cross_entropy_with_logits), run(F.binary_cross_entropy_with_logits)
    torch.testing.assert_close(found, expected, equal_nan=True)


def leaf(*shape: int) -> Tensor:
    return (
        torch.linspace(-1, 1, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
        .reshape(shape)
        .requires_grad_()
    )


def no_targets(*shape: int) -> Tensor:
    return torch.zeros(*shape, 0, dtype=torch.int64)


def linear_relu_of(namespace: Any) -> Callable[..., Tensor]:
    return torch_linear_relu if namespace is F else FF.linear_relu


@pytest.mark.parametrize("name", EMPTY)
def test_empty_and_odd_shapes(name: str, backend: str) -> None:
    found, expected = EMPTY[name](FF), EMPTY[name](F)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert [t.stride() for t in found[:1]] == [t.stride() for t in expected[:1]]


FAR = 2**30 + 2048  # elements from row to row: fits into 32 bits, twice as much does not


@pytest.fixture(scope="module")
def far_rows() -> Iterator[Callable[[int], Tensor]]:
    """[3, columns] views in bfloat16 whose last row lies beyond 2^31 elements. Untouched memory costs nothing."""
    storage = torch.empty(2 * FAR + 2048, dtype=torch.bfloat16)
    offset = 0

    def rows(columns: int) -> Tensor:
        nonlocal offset
        offset += columns
        view = storage.as_strided((3, columns), (FAR, 1), offset - columns)
        return view.copy_(torch.randn(3, columns))

    yield rows


@pytest.mark.parametrize(
    "op",
    [
        "linear",
        "linear_relu",
        "mse_loss",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "cross_entropy of columns",
    ],
)
def test_more_than_2_to_the_31_elements(op: str, far_rows: Callable[[int], Tensor]) -> None:
    """Offsets are 64 bits wide: of arguments and of the gradient that comes in."""
    input, other, grad_output = far_rows(3), far_rows(3), far_rows(3)
    target = torch.tensor([0, 2, 1])

    def run(namespace: Any, *tensors: Tensor) -> list[Tensor]:
        input, other, grad_output = tensors
        leaf = input.detach().requires_grad_()
        if op.startswith("cross_entropy"):
            return gradients(lambda x: namespace.cross_entropy(x.t() if "columns" in op else x, target), leaf)
        if op in ("mse_loss", "binary_cross_entropy_with_logits"):
            loss = getattr(namespace, op)
            pointwise = gradients(lambda x: loss(x, other, reduction="none"), leaf, grad_output=grad_output)
            return [*pointwise, *gradients(loss, leaf, other)]
        function = linear_relu_of(namespace) if op == "linear_relu" else namespace.linear
        return gradients(function, leaf, other, grad_output=grad_output)

    with fastops.backend("triton"):
        found = run(FF, input, other, grad_output)
    torch.testing.assert_close(found, run(F, *(t.contiguous() for t in (input, other, grad_output))))


# NaN, dtypes and autocast ---------------------------------------------------------------------------------------------


@every_case
def test_nan_is_never_lost(case: Case, backend: str) -> None:
    for position in range(len(case.shapes)):
        tensors = case.tensors(torch.float32)
        with torch.no_grad():
            tensors[position].view(-1)[0] = NAN
        found, expected = gradients(case.ours, *tensors), gradients(case.torchs, *tensors)
        for ours, torchs in zip(found, expected, strict=True):
            lost, added = torchs.isnan() & ~ours.isnan(), ours.isnan() & ~torchs.isnan()
            assert not lost.any()
            # Zero padding times NaN is NaN for a kernel, and for some of torch's, where oneDNN leaves padding out. The
            # slope at NaN is NaN but for a ReLU's, and then the gradient that meets the padding.
            assert not added.any() or ("conv" in case.op and (position > 0 or "act" in case.op))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_accuracy_is_torchs(case: Case, dtype: torch.dtype) -> None:
    """On every backend the error against float64 is at most twice that of torch in the same dtype, plus one rounding.

    Of a result that is one number, eight are judged on each.
    """

    def results(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        return gradients(function, *(tensor.detach().requires_grad_() for tensor in tensors))

    numbers = case.torchs(*case.tensors()).numel()
    runs = []
    for backend in BACKENDS:
        drawn = [tuple(case.make(shape).to(dtype) for shape in case.shapes) for _ in range(8 if numbers == 1 else 2)]
        with fastops.backend(backend):
            runs += [(results(case.ours, *tensors), tensors) for tensors in drawn]
    assert_as_accurate_as_torch(functools.partial(results, case.torchs), *runs)


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "torchs", "arguments"), MODULES)
def test_modules_exchange_state_with_torchs(ours: type, torchs: type, arguments: tuple[Any, ...]) -> None:
    torch.manual_seed(1)
    our = ours(*arguments)
    torch.manual_seed(1)
    their = torchs(*arguments)
    assert isinstance(our, torchs)
    assert our.state_dict().keys() == their.state_dict().keys()
    assert_exactly(dict(our.state_dict()), dict(their.state_dict()))
    their.load_state_dict(our.state_dict())
    our.load_state_dict(their.state_dict())
    assert our.extra_repr() == their.extra_repr()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_modules_compute_what_torchs_do(reduction: str, backend: str) -> None:
    input, target, classes = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    options = {"weight": torch.rand(3), "ignore_index": 1, "label_smoothing": 0.1, "reduction": reduction}
    torch.testing.assert_close(
        fnn.MSELoss(reduction=reduction)(input, target), nn.MSELoss(reduction=reduction)(input, target)
    )
    torch.testing.assert_close(
        fnn.CrossEntropyLoss(**options)(input, classes), nn.CrossEntropyLoss(**options)(input, classes)
    )
    weights = {"weight": torch.rand(3), "pos_weight": torch.rand(4, 1), "reduction": reduction}
    torch.testing.assert_close(
        fnn.BCEWithLogitsLoss(**weights)(input, target), nn.BCEWithLogitsLoss(**weights)(input, target)
    )
    for bias in (True, False):
        plain = fnn.Linear(3, 2, bias=bias)
        fused = fnn.LinearReLU(3, 2, bias=bias)
        torch.testing.assert_close(plain(input), F.linear(input, plain.weight, plain.bias))
        torch.testing.assert_close(fused(input), F.linear(input, fused.weight, fused.bias).relu())


# What is not finite ---------------------------------------------------------------------------------------------------

TARGETS = {
    "indices": torch.tensor([1, 2, -100]),
    "one class": torch.tensor([1, 1, -100]),
    "all ignored": torch.tensor([-100, -100, -100]),
    "probabilities": torch.tensor([[0.0, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1]]),
}
WEIGHTS = {
    "none": None,
    "some zero": torch.tensor([1.0, 0, 1, 2]),
    "all zero": torch.zeros(4),
    "sum zero": torch.tensor([1.0, -1, 1, 2]),
}


def kinds(tensor: Tensor) -> Tensor:
    """0 for finite numbers; else NaN or the infinity itself."""
    return torch.where(tensor.isfinite(), 0.0, tensor.detach())


@pytest.mark.parametrize("grad_output", [1.0, INF, NAN])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_is_infinite_and_nan_where_torchs_is(
    reduction: str, target: str, weight: str, label_smoothing: float, grad_output: float, backend: str
) -> None:
    """Class weights that are all zero for the classes at hand or cancel, gradients that are not finite, and both."""
    options = {"weight": WEIGHTS[weight], "label_smoothing": label_smoothing, "reduction": reduction}
    x, w = torch.randn(3, 5).requires_grad_(), torch.randn(4, 5).requires_grad_()
    found = FF.cross_entropy(F.linear(x, w), TARGETS[target], **options)
    head = FF.linear_cross_entropy(x, w, TARGETS[target], **options)
    expected = F.cross_entropy(F.linear(x, w), TARGETS[target], **options)
    gradients = []
    for loss in (found, head, expected):
        upstream = torch.ones_like(loss)
        upstream.view(-1)[0] = grad_output
        gradients.append([kinds(loss), *map(kinds, torch.autograd.grad(loss, (x, w), upstream))])
        if (
            weight == "sum zero" and label_smoothing
        ):  # torch adds x / 0 and y / 0, fastops divides x + y: infinite or NaN
            gradients[-1] = [torch.where(each == 0, each, NAN) for each in gradients[-1]]
    torch.testing.assert_close(gradients[0], gradients[2], equal_nan=True)
    torch.testing.assert_close(gradients[1][:2], gradients[2][:2], equal_nan=True)
    # A row of logits' gradient that is NaN at one class and infinite at others is NaN throughout in the head.
    assert torch.equal(gradients[1][2] == 0, gradients[2][2] == 0)
