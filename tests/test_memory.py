"""What is kept for backward: checkpoints, hooks on saved tensors, compiled autograd, and only what is needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import Case, every_case, gradients, no_fallback, one_case_per_op
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastops
import fastops.functional as FF

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.mark.usefixtures("others_frozen")
@pytest.mark.parametrize("op", ["linear", "linear_relu"])
@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_no_gradient_needs_is_not_kept(op: str, frozen: str, backend: str) -> None:
    """grad_weight needs the input, grad_input the weight: if one is frozen the other's memory is free after forward."""
    input, weight = (
        (torch.randn(4, 3) * 1).requires_grad_(frozen == "weight"),
        torch.randn(2, 3).requires_grad_(frozen == "input"),
    )
    kept = input * 1 if frozen == "weight" else weight * 1
    watched = weakref.ref(kept)
    output = getattr(FF, op)(*((kept, weight) if frozen == "weight" else (input, kept)))
    del kept
    gc.collect()
    assert output.requires_grad
    assert watched() is None


@pytest.mark.usefixtures("others_frozen")
@every_case
def test_saved_tensors_are_freed_by_backward(case: Case, backend: str) -> None:
    tensors = tuple(t * 1 for t in case.tensors())
    watched = [weakref.ref(t) for t in tensors]
    result = case.ours(*tensors)
    del tensors
    result.sum().backward()
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        result.sum().backward()


@one_case_per_op
def test_a_saved_tensor_changed_in_place_is_noticed(case: Case, backend: str) -> None:
    """Where torch notices, so do we, in its words; of two losses torch keeps copies and our kernels the arguments.

    In front of a pooling torch keeps what its ReLU made, and fastops, which pools first, the argument.
    """

    def error(function: Callable[..., Tensor]) -> str | None:
        tensors = tuple(t * 1 for t in case.tensors(torch.float32))
        result = function(*tensors)
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(2)
        try:
            result.sum().backward()
        except RuntimeError as error:
            return str(error).split(":")[0]
        return None

    expected = error(case.torchs)
    if case.op == "relu_max_pool2d" or (case.op in ("cross_entropy", "l1_loss") and backend == "triton"):
        expected = "one of the variables needed for gradient computation has been modified by an inplace operation"
    assert error(case.ours) == expected


def _saved_through(hooks: Callable[[], object]) -> Callable[..., Tensor]:
    def run(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        with hooks():
            return function(*tensors)

    return run


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps between them, which hold others."""
    return tensor.new_full((*tensor.shape, 2), 3)[..., 1].copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """The same values in the reversed order of dimensions in memory."""
    dimensions = list(range(tensor.dim()))[::-1]
    return tensor.permute(dimensions).contiguous().permute(dimensions)


MEANS: dict[str, Callable[..., Tensor]] = {
    "checkpoint": lambda f, *tensors: checkpoint(f, *tensors, use_reentrant=False),
    "nested checkpoints": lambda f, *tensors: checkpoint(
        lambda *t: checkpoint(f, *t, use_reentrant=False), *tensors, use_reentrant=False
    ),
    "packed as float64": _saved_through(
        lambda: saved_tensors_hooks(
            lambda t: (t.dtype, t.double() if t.is_floating_point() else t), lambda p: p[1].to(p[0])
        )
    ),
    "save_on_cpu": _saved_through(save_on_cpu),
    "handed back in another layout": _saved_through(lambda: saved_tensors_hooks(lambda t: t, spread)),
    "handed back with another order of dimensions": _saved_through(lambda: saved_tensors_hooks(lambda t: t, turned)),
}


@one_case_per_op
@pytest.mark.parametrize("means", MEANS)
def test_saved_some_other_way(case: Case, means: str, backend: str) -> None:
    found = gradients(lambda *tensors: MEANS[means](case.ours, *tensors), *case.tensors(torch.float32))
    torch.testing.assert_close(found, gradients(case.torchs, *case.tensors(torch.float32)))


@one_case_per_op
def test_reentrant_checkpoint(case: Case, backend: str) -> None:
    """That kind works with `backward` alone."""
    grads = []
    for function in (case.ours, case.torchs):
        tensors = case.tensors(torch.float32)
        checkpoint(function, *tensors, use_reentrant=True).sum().backward()
        grads.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*grads)


@one_case_per_op
def test_compiled_autograd(case: Case) -> None:
    """The whole backward as one graph, after a forward in eager: of raw ops, whose way is but an argument."""
    tensors = case.tensors(torch.float32)
    torch._dynamo.reset()
    with fastops.backend("triton"), torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        case.ours(*tensors).sum().backward()
    torch.testing.assert_close([t.grad for t in tensors], gradients(case.torchs, *case.tensors(torch.float32))[1:])


class Ran(TorchDispatchMode):
    """The arguments of all raw ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[object, ...]] = {}

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func.namespace == "fastops":
            self.calls[func.overloadpacket.__name__] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", ["input", "weight", "bias"])
@pytest.mark.parametrize("op", ["linear", "linear_relu", "conv2d", "conv_relu2d"])
@pytest.mark.parametrize("way", ["triton", "onednn"])
def test_only_what_is_asked_for_is_computed(op: str, needed: str, way: str) -> None:
    """The raw backward op gets no operand for a gradient that nobody needs."""
    shapes = ((2, 3, 4, 4), (5, 3, 2, 2), (5,)) if "conv" in op else ((4, 3), (5, 3), (5,))
    tensors = [
        torch.randn(shape).requires_grad_(name == needed)
        for name, shape in zip(("input", "weight", "bias"), shapes, strict=True)
    ]
    with fastops.backend(way), Ran() as ran:
        getattr(FF, op)(*tensors).sum().backward()
    _, input, weight, output, *_, need_bias, _ = ran.calls[f"{op}_backward"]
    assert ((weight is not None), (input is not None), need_bias) == tuple(
        needed == name for name in ("input", "weight", "bias")
    )
    assert (output is not None) == ("relu" in op)
