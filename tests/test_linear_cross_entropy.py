"""Linear + cross-entropy: what is allocated, and whose the gradients are that the forward pass makes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from interpreter.accuracy import Run, assert_as_accurate_as_torch
from interpreter.launches import replace_launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastops
import fastops.functional as FF
from fastops import backport
from fastops.kernels import onednn
from fastops.nn import LinearCrossEntropyOptions
from fastops.ops import linear_cross_entropy as head

pytestmark = no_fallback


class Largest(TorchDispatchMode):
    """Finds how many elements the largest storage has that any op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(rows: int, classes: int, features: int, options: LinearCrossEntropyOptions | None, **keywords: Any) -> int:
    input, weight = torch.ones(rows, features), torch.zeros(classes, features)
    target = torch.zeros(rows, dtype=torch.int64)
    input.requires_grad_(), weight.requires_grad_()
    with Largest() as mode:
        loss = FF.linear_cross_entropy(input, weight, target, options=options, **keywords)
        torch.autograd.grad(loss.sum(), (input, weight))
    return mode.elements


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_never_have_all_logits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10^8 of them; kernels launch nothing here."""
    replace_launch(monkeypatch, lambda *_: None)
    with fastops.backend("triton"):
        assert largest(10**4, 10**4, 2, None, reduction=reduction) <= (32 << 20) // 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget", [4 * 64 * 500, 4000])
def test_products_never_have_all_logits(budget: int, reduction: str) -> None:
    options = LinearCrossEntropyOptions(memory_budget=budget)
    with fastops.backend("onednn"):
        assert largest(1000, 500, 3, options, reduction=reduction) <= max(budget // 4, 3000)


def test_gradients_of_the_forward_pass_are_scaled_anew_each_time() -> None:
    """What a caller does to gradients changes nothing while the graph is kept; the last ones need no copy."""
    input, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((70, 4), (30, 4), (30,)))
    target = torch.randint(30, (70,))
    variables = (input, weight, bias)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*variables), target), variables)
    with fastops.backend("onednn"):
        loss = FF.linear_cross_entropy(input, weight, target, linear_bias=bias)
        for factor in (3.0, 1.0, -2.0):
            found = torch.autograd.grad(loss, variables, torch.tensor(factor), retain_graph=True)
            torch.testing.assert_close(found, [factor * gradient for gradient in expected])
            for gradient in found:
                gradient.zero_()
        created = torch.autograd.grad(loss, variables, create_graph=True)
        torch.testing.assert_close(created, expected)
        assert all(gradient.requires_grad for gradient in created)
        loss.backward(torch.tensor(0.5))
    torch.testing.assert_close([v.grad for v in variables], [0.5 * gradient for gradient in expected])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.float32])
def test_float32_beside_16_bits_makes_a_float32_loss(
    target_dtype: torch.dtype, weight_dtype: torch.dtype | None, reduction: str
) -> None:
    """As torch promotes class probabilities and weights of classes, and logits with them."""
    x, w = (torch.randn(shape, dtype=torch.float16, requires_grad=True) for shape in ((4, 3), (5, 3)))
    target = torch.rand(4, 5).softmax(1).to(target_dtype)
    weight = None if weight_dtype is None else torch.rand(5, dtype=weight_dtype)

    def outcome(backend: str) -> list[Tensor]:
        with fastops.backend(backend):
            loss = FF.linear_cross_entropy(x, w, target, weight=weight, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), (x, w))]

    for ours, torchs in zip(outcome("triton"), outcome("torch"), strict=True):
        assert ours.dtype is torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=2e-3, atol=2e-3)


def test_class_indices_with_weights_of_another_dtype_are_torchs_error() -> None:
    x, w, target = torch.randn(4, 3).half(), torch.randn(5, 3).half(), torch.tensor([0, 1, 2, 4])
    with fastops.backend("triton"), pytest.raises(RuntimeError, match="expected scalar type Half but found Float"):
        FF.linear_cross_entropy(x, w, target, weight=torch.rand(5))


@pytest.mark.parametrize("backend", ["onednn", "triton"])
def test_of_one_class_nothing_is_left(backend: str) -> None:
    """Its softmax is 1 whatever the logit, so that what remains of the gradient is rounding alone: torch's is 0."""
    x, w, target = torch.randn(3, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True), torch.rand(3, 1)
    with fastops.backend(backend, strict=True):
        loss = FF.linear_cross_entropy(x, w, target)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=3))
def test_gradients_that_the_forward_pass_made_must_be_all_that_are_needed(needs: tuple[bool, ...]) -> None:
    """In a graph that was captured where fewer were wanted they are not."""
    one, none = torch.ones(2), torch.empty(0)
    made = head._made((torch.ones(()), *[None] * 9, one, none, none, *needs, False))
    assert made is None if any(needs[1:]) else made == (one if needs[0] else None, None, None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("faster", [None, onednn.Gain(1), onednn.Gain(1, products=False)])
def test_products_of_either_library(bias: bool, faster: onednn.Gain | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL's into memory that is there, or oneDNN's in parts, where the table says that they are faster."""
    monkeypatch.setattr(onednn, "FASTER_FROM", faster)
    monkeypatch.setattr(onednn, "_LEAST_PART", 64)

    def gradients(function: Any, target: Tensor, *values: Tensor, **options: Any) -> list[Tensor]:
        own = [value.detach().requires_grad_() for value in values]
        loss = function(*own[:2], target, linear_bias=own[2] if bias else None, **options)
        return [loss.detach(), *torch.autograd.grad(loss, own)]

    products, product = [], onednn.product
    monkeypatch.setattr(onednn, "product", lambda *words: (products.append(1), product(*words))[1])
    options = LinearCrossEntropyOptions(memory_budget=4 * 150 * 80)  # blocks of 80 rows, or 64

    def run() -> Run:
        tensors = torch.randint(150, (200,)), torch.randn(200, 6), torch.randn(150, 6), torch.randn(150)
        with fastops.backend("onednn"):
            found = gradients(FF.linear_cross_entropy, *tensors[: 3 + bias], options=options)
        assert bool(products) == (faster is not None and faster.products)
        return found, tensors[: 3 + bias]

    assert_as_accurate_as_torch(functools.partial(gradients, backport.linear_cross_entropy), *(run() for _ in range(4)))
