"""torch.func: every transform of every function, on every way down."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Case, no_fallback, one_case_per_op
from torch import Tensor, nn

import fastops
import fastops.functional as FF

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::FutureWarning")]
FLOAT64 = torch.float64


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], object]] = {
    "grad": lambda f, a: torch.func.grad(lambda *t: f(*t).square().sum(), tuple(range(len(a))))(*a),
    "jacrev": lambda f, a: torch.func.jacrev(f, tuple(range(len(a))))(*a),
    "jacfwd": lambda f, a: torch.func.jacfwd(f, tuple(range(len(a))))(*a),
    "hessian": lambda f, a: torch.func.hessian(lambda *t: f(*t).square().sum())(*a),
    "vmap": lambda f, a: torch.vmap(f)(*(torch.stack([t, -t, 2 * t]) for t in a)),
    "functionalize": lambda f, a: torch.func.functionalize(f)(*a),
    "vmap of the first": lambda f, a: torch.vmap(f, (1, *(None,) * (len(a) - 1)))(
        torch.stack([a[0], -a[0]], 1), *a[1:]
    ),
    "vmap of grad": lambda f, a: torch.vmap(torch.func.grad(lambda *t: f(*t).sum()))(
        *(torch.stack([t, -t]) for t in a)
    ),
    "vmap with in_dims and out_dims": lambda f, a: torch.vmap(f, (-1, *(None,) * (len(a) - 1)), -1)(
        torch.stack([a[0], -a[0]], -1), *a[1:]
    ),
    "vmap of the others": lambda f, a: (
        torch.vmap(f, (None, *(0,) * (len(a) - 1)))(a[0], *(torch.stack([t, -t]) for t in a[1:]))
        if len(a) > 1
        else None
    ),
    "linearize": lambda f, a: torch.func.linearize(f, *a)[1](*a),
    "jvp of grad": lambda f, a: torch.func.jvp(torch.func.grad(lambda *t: f(*t).square().sum()), a, a),
}


@one_case_per_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(case: Case, transform: str, backend: str) -> None:
    tensors = case.tensors(requires_grad=False)
    try:
        expected = TRANSFORMS[transform](case.torchs, tensors)
    except NotImplementedError as error:  # what torch lacks is missing in its words
        with pytest.raises(NotImplementedError, match=re.escape(str(error))):
            TRANSFORMS[transform](case.ours, tensors)
        return
    torch.testing.assert_close(TRANSFORMS[transform](case.ours, tensors), expected)


@pytest.mark.parametrize(
    "target", [torch.tensor([0, 2, 1, 0]), torch.eye(3, dtype=FLOAT64)[[0, 2, 1, 0]]], ids=["indices", "probabilities"]
)
def test_derivatives_for_class_weights(target: Tensor, backend: str) -> None:
    """Class weights are constants to the kernels; where torch differentiates them, so do we."""
    input, weight = torch.randn(4, 3, dtype=FLOAT64), torch.rand(3, dtype=FLOAT64)

    def mixed(function: Callable[..., Tensor]) -> object:
        grad_input = torch.func.grad(function)
        return torch.func.jvp(lambda w: grad_input(input, target, w), (weight,), (torch.ones_like(weight),))

    def along(function: Callable[..., Tensor]) -> object:
        return torch.func.jvp(lambda w: function(input, target, w), (weight,), (torch.ones_like(weight),))

    for derivative in (mixed, along):
        torch.testing.assert_close(derivative(FF.cross_entropy), derivative(F.cross_entropy))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def test_functional_call_of_an_ensemble(backend: str) -> None:
    """Many models at once, as torch's tutorial does it: stacked parameters, one vmap."""
    models = [fastops.swap(network()) for _ in range(3)]
    for scale, model in enumerate(models, 1):
        for parameter in model.parameters():
            parameter.data.mul_(scale)
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(4, 3, dtype=FLOAT64)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    found = torch.vmap(call, (0, 0, None))(parameters, buffers, x)
    gradients = torch.autograd.grad(found.square().sum(), list(parameters.values()))
    expected = torch.stack([fastops.unswap(model)(x) for model in models])
    torch.testing.assert_close(found, expected)
    for gradient, *own in zip(gradients, *(model.parameters() for model in models), strict=True):
        grads = torch.autograd.grad(expected.square().sum(), own, retain_graph=True)
        torch.testing.assert_close(gradient, torch.stack(grads))


@one_case_per_op
def test_gradient_of_vmap_for_one_argument(case: Case, backend: str) -> None:
    """Trained through vmap with the others frozen: what their gradients would take is not saved, but is batched."""

    def slope(function: Callable[..., Tensor], which: int) -> object:
        tensors = [
            torch.stack([t, -t, 2 * t]).requires_grad_(i == which)
            for i, t in enumerate(case.tensors(requires_grad=False))
        ]
        return torch.autograd.grad(torch.vmap(function)(*tensors).square().sum(), tensors[which])

    for which in range(len(case.shapes)):
        torch.testing.assert_close(slope(case.ours, which), slope(case.torchs, which))


@one_case_per_op
def test_batched_gradients_keep_their_graph(case: Case, backend: str) -> None:
    """torch drops the graph of a Function whose backward runs for a batch of gradients."""

    def penalty(function: Callable[..., Tensor]) -> list[Tensor]:
        tensors = case.tensors()
        result = function(*tensors).square()
        directions = torch.stack([torch.ones_like(result), torch.full_like(result, 2)])
        options = {"is_grads_batched": True, "create_graph": True}
        gradients = torch.autograd.grad(result, tensors, directions, **options)
        return [*gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)]

    torch.testing.assert_close(penalty(case.ours), penalty(case.torchs))


def test_gradients_of_each_sample(backend: str) -> None:
    model, plain = fastops.swap(network()), network()
    x, target = torch.randn(6, 3, dtype=FLOAT64), torch.tensor([0, 1, 1, 0, 1, 0])

    def loss(parameters: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        return FF.cross_entropy(torch.func.functional_call(model, parameters, (row,)), target)

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    for row in range(6):
        expected = torch.autograd.grad(F.cross_entropy(plain(x[row]), target[row]), list(plain.parameters()))
        torch.testing.assert_close([gradient[row] for gradient in found.values()], list(expected))
