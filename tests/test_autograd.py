"""Derivatives of every function, of every order and in every way that PyTorch asks for them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    ONE_CASE_PER_OP,
    Case,
    every_case,
    gradients,
    no_fallback,
    one_case_per_op,
    onednn_in_float64,
    tangent,
    torch_linear_relu,
)
from interpreter.accuracy import assert_as_accurate_as_torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastops
import fastops.functional as FF

pytestmark = no_fallback
EXPANDED = {"stride 0": lambda t: t[:1].expand_as(t), "transposed": lambda t: t.mT.contiguous().mT}
FLOAT64 = torch.float64


def assert_same(ours: list[Tensor], torchs: list[Tensor]) -> None:
    for our, their in zip(ours, torchs, strict=True):
        torch.testing.assert_close(our, their)


@every_case
def test_first_derivatives(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    assert gradcheck(
        case.ours,
        case.tensors(),
        fast_mode=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=case.op != "relu_max_pool2d",  # which torch lacks for its pooling
    )


@every_case
def test_second_derivatives(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, and gradients that are undefined, for one case of each op."""
    onednn_in_float64(monkeypatch)
    one = case in ONE_CASE_PER_OP
    assert gradgradcheck(case.ours, case.tensors(), fast_mode=True, check_batched_grad=one, check_undefined_grad=one)


@every_case
def test_forward_over_reverse(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    options = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    try:
        assert gradgradcheck(case.ours, case.tensors(), fast_mode=True, **options)
    except NotImplementedError as error:  # what torch lacks is missing in its words
        with pytest.raises(NotImplementedError, match=re.escape(str(error))):
            gradgradcheck(case.torchs, case.tensors(), fast_mode=True, **options)


@one_case_per_op
def test_rows_of_the_jacobian(case: Case) -> None:
    """A dozen, each the backward pass of a gradient that is zero but for one element. (All: `test_func.py`.)"""

    def jacobian(function: Callable[..., Tensor]) -> list[Tensor]:
        tensors = case.tensors()
        result = function(*tensors)
        rows = torch.eye(result.numel(), dtype=FLOAT64).view(-1, *result.shape)[:: -(-result.numel() // 12)]
        passes = (torch.autograd.grad(result, tensors, row, retain_graph=True) for row in rows)
        return list(map(torch.stack, zip(*passes, strict=True)))

    with fastops.backend("triton"):
        found = jacobian(case.ours)
    assert_same(found, jacobian(case.torchs))


@every_case
@pytest.mark.parametrize("layout", EXPANDED)
def test_grad_output_of_any_layout(case: Case, layout: str, backend: str) -> None:
    """Rows of `reduction='none'` have their own gradient (not the first one's), an expanded gradient has stride 0."""
    tensors = case.tensors()
    result = case.torchs(*tensors)
    grad_output = torch.randn_like(result)
    if result.dim() == 2:
        grad_output = EXPANDED[layout](grad_output)
    elif layout == "stride 0":
        grad_output = torch.tensor(3.0, dtype=FLOAT64).expand(result.shape)
    else:
        grad_output = torch.randn(*result.shape, 2, dtype=FLOAT64)[..., 0]
    expected = gradients(case.torchs, *tensors, grad_output=grad_output)
    assert_same(gradients(case.ours, *tensors, grad_output=grad_output), expected)


@every_case
def test_only_some_arguments_require_gradients(case: Case, backend: str) -> None:
    """Those that require none get None, not zeros. (Where all require one: above.)"""
    for needed in itertools.product((True, False), repeat=len(case.shapes)):
        if not all(needed):
            ours, torchs = (_backward(function, case.tensors(), needed) for function in (case.ours, case.torchs))
            assert [grad is None for grad in ours] == [grad is None for grad in torchs]
            assert_same(*([grad for grad in grads if grad is not None] for grads in (ours, torchs)))


def _backward(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    result = function(*leaves)
    assert result.requires_grad == any(needed)
    if any(needed):
        result.sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@every_case
def test_float32(case: Case) -> None:
    """First and second derivatives and tangents, on every backend: in the dtype that oneDNN's products take."""

    def all_derivatives(function: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
        tensors = tuple(value.detach().requires_grad_() for value in values)
        result = function(*tensors)
        first = torch.autograd.grad(result, tensors, torch.full_like(result, 2.0), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors, allow_unused=True)
        # Not all the same: the loss of logits that a constant is added to does not change, but for roundings.
        along = tangent(function, tensors, tuple(0.5 - t.detach() for t in tensors))
        return [
            result,
            *first,
            *(torch.zeros_like(t) if s is None else s for s, t in zip(second, tensors, strict=True)),
            along,
        ]

    runs = []
    for backend in BACKENDS:
        drawn = [tuple(map(case.make, case.shapes)) for _ in range(2)]
        with fastops.backend(backend):
            runs += [(all_derivatives(case.ours, *values), values) for values in drawn]
    assert_as_accurate_as_torch(functools.partial(all_derivatives, case.torchs), *runs)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(6, 5).t(),
    "strided": lambda: torch.randn(10, 12)[::2, ::2],
    "expanded rows": lambda: torch.randn(1, 6).expand(5, 6),
    "expanded columns": lambda: torch.randn(5, 1).expand(5, 6),
    "offset": lambda: torch.randn(31)[1:].view(5, 6),
    "1d strided": lambda: torch.randn(6, 3)[:, 1],
    "3d permuted": lambda: torch.randn(6, 2, 5).permute(1, 2, 0),
    "4d": lambda: torch.randn(2, 1, 3, 6),
    "size one": lambda: torch.randn(6, 1).t(),
}


@pytest.mark.parametrize("op", ["linear", "linear_relu", "mse_loss", "cross_entropy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: str, layout: str, backend: str) -> None:
    input = LAYOUTS[layout]()
    weight, bias = torch.randn(6, 4).t().requires_grad_(), torch.randn(8)[::2].requires_grad_()
    if op == "mse_loss":
        pair, others = (FF.mse_loss, F.mse_loss), (torch.randn(input.shape).requires_grad_(),)
    elif op == "cross_entropy":
        classes = input.shape[0 if input.dim() == 1 else 1]
        shape = input.shape[2:] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
        target = torch.randint(classes, shape)
        pair, others = (lambda x: FF.cross_entropy(x, target), lambda x: F.cross_entropy(x, target)), ()
    else:
        pair, others = (getattr(FF, op), F.linear if op == "linear" else torch_linear_relu), (weight, bias)
    results = [gradients(function, input.detach().requires_grad_(), *others) for function in pair]
    assert_same(*results)
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]


@pytest.mark.parametrize("op", ["linear", "linear_relu"])
def test_relu_at_zero_and_nan_has_torchs_gradient(op: str, backend: str) -> None:
    input = torch.tensor([[0.0], [-0.0], [float("nan")], [-1.0], [2.0], [float("inf")], [-float("inf")]])
    weight = torch.ones(1, 1)
    ours, torchs = getattr(FF, op), F.linear if op == "linear" else torch_linear_relu
    grad_output = torch.tensor([[3.0], [5.0], [7.0], [11.0], [13.0], [17.0], [19.0]])
    found, expected = (
        gradients(f, input.clone().requires_grad_(), weight, grad_output=grad_output) for f in (ours, torchs)
    )
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0, equal_nan=True)


@every_case
def test_second_backward_of_the_same_graph(case: Case, backend: str) -> None:
    """A backward is a pure function of what was saved: twice the same, and linear in grad_output."""
    tensors = case.tensors()
    result = case.ours(*tensors)
    grad_output = torch.randn_like(result)
    first = torch.autograd.grad(result, tensors, grad_output, retain_graph=True)
    again = torch.autograd.grad(result, tensors, grad_output, retain_graph=True)
    doubled = torch.autograd.grad(result, tensors, 2 * grad_output)
    for a, b, twice in zip(first, again, doubled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(twice, 2 * a)


@pytest.mark.parametrize("op", ["linear", "linear_relu"])
@pytest.mark.parametrize("subset", [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)], ids=str)
def test_second_derivatives_of_some_gradients_only(
    op: str, subset: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients that do not enter the second loss arrive undefined, not as zeros of some shape."""
    onednn_in_float64(monkeypatch)
    tensors = [torch.randn(shape, dtype=FLOAT64) for shape in ((4, 3), (2, 3), (2,))]
    found = []
    for function in (getattr(FF, op), F.linear if op == "linear" else torch_linear_relu):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(first[i].square().sum() for i in subset), leaves)
        found.append(list(second))
    assert_same(*found)


@every_case
def test_results_may_be_changed_in_place(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch: wherever no gradient needs the result. ReLU's does, and says so."""
    onednn_in_float64(monkeypatch)

    def changed(function: Callable[..., Tensor]) -> list[Tensor] | str:
        tensors = case.tensors()
        result = function(*tensors)
        result *= 3
        try:
            return list(torch.autograd.grad(result.sum(), tensors))
        except RuntimeError as error:
            return str(error)[:90]

    expected, found = changed(case.torchs), changed(case.ours)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
    else:
        assert_same(found, expected)


@one_case_per_op
def test_a_gradient_that_is_not_needed_stays_undefined(case: Case, backend: str) -> None:
    """Undefined gradients stay None through first and second backward, as with torch."""

    def second(function: Callable[..., Tensor]) -> list[bool]:
        tensors = case.tensors()
        first = torch.autograd.grad(function(*tensors).sum(), tensors[0], create_graph=True)[0]
        grads = torch.autograd.grad(first.sum(), tensors, allow_unused=True, materialize_grads=False)
        return [grad is None or not grad.any() for grad in grads]

    assert second(case.ours) == second(case.torchs)


def test_dual_tensors_without_gradients_keep_their_tangents(backend: str) -> None:
    """No shortcut for "nothing requires grad" may lose a tangent."""
    weight = torch.randn(2, 3)
    with torch.no_grad(), forward_ad.dual_level():
        input = forward_ad.make_dual(torch.ones(4, 3), torch.full((4, 3), 2.0))
        tangent_of_output = forward_ad.unpack_dual(FF.linear(input, weight)).tangent
    assert tangent_of_output is not None
    torch.testing.assert_close(tangent_of_output, F.linear(torch.full((4, 3), 2.0), weight))


def test_backward_while_autocast_is_on_for_another_device(backend: str) -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    torch.set_autocast_enabled("cuda", True)
    try:
        FF.linear_relu(x, w).sum().backward()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert x.grad is not None and x.grad.dtype is torch.float32
