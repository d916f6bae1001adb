"""The first part: every kernel, in every dtype, on sizes and layouts that have gone wrong somewhere before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.accuracy import float32_products
from fastops.bench.cases import model_call
from fastops.cli import verify
from fastops.cli.examples import draw, torch_function
from fastops.cli.verify import CheckError, check_accuracy, value_and_gradients
from fastops.guard import run_guarded, same_bits
from fastops.models import FashionMLP, LeNet
from fastops.ops import Op
from fastops.ops.examples import LARGE, SMALL, Named, Sizes
from fastops.ops.op import failures_raised

from .cases import Case, Figures, NotRun, on_a_gpu
from .graphs import captured, need_memory

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32: Final = 2**31  # elements: behind them an offset of 32 bits is wrong
Layout = Callable[[Tensor], Tensor]


def misaligned(tensor: Tensor) -> Tensor:
    """The same strides, one element behind an aligned address."""
    memory = tensor.new_empty(tensor.untyped_storage().nbytes() // tensor.element_size() + 1)
    return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def padded(tensor: Tensor) -> Tensor:
    """Rows that are one element apart from each other."""
    return F.pad(tensor, (0, 1))[..., :-1] if tensor.dim() else tensor


def channels_last(tensor: Tensor) -> Tensor:
    """Channels in the last place in memory, where there are images or volumes."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.to(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor


def far(tensor: Tensor) -> Tensor:
    """The last row more than 2**31 elements behind the first one."""
    (dimension, *_) = [d for d, size in enumerate(tensor.shape) if size > 1]
    stride = list(tensor.contiguous().stride())
    stride[dimension] = INT32 // (tensor.shape[dimension] - 1) + 1
    span = 1 + sum(step * (size - 1) for step, size in zip(stride, tensor.shape, strict=True))
    return tensor.new_empty(span).as_strided(tensor.shape, stride).copy_(tensor)


def arrangements(op: Op, device: torch.device) -> dict[str, tuple[Sizes, Layout]]:
    """Sizes and layouts by name: odd ones, the edges of tiles, and one element behind them."""
    plain: Layout = lambda tensor: tensor  # noqa: E731
    odd, tile = (LARGE, 256) if on_a_gpu(device) else (SMALL, 16)
    full, behind = Sizes(tile, tile, tile), Sizes(tile + 1, tile + 1, tile + 1)
    if op.name.startswith("conv"):  # whose examples make 1 + features // 8 channels of 1 + outputs // 4
        full, behind = Sizes(tile, 2 * tile - 8, tile - 4), Sizes(tile, 2 * tile, tile)
    return {
        "odd sizes": (odd, plain),
        "full tiles": (full, plain),
        "one behind full tiles": (behind, plain),
        "misaligned": (odd, misaligned),
        "padded rows": (odd, padded),
        "channels last": (odd, channels_last),
    }


@contextmanager
def guarded(op: Op) -> Iterator[None]:
    """Inside, its launchers run in guarded memory."""
    launchers = tuple(partial(run_guarded, launcher) for launcher in op.launchers)
    with patch.dict(vars(op), launchers=launchers):
        yield


def _check(case: verify.Case, dtype: torch.dtype, device: torch.device) -> Figures:
    """Errors, guard bands and bits, in every arrangement. The figures are the largest errors, in units of torch's."""
    errors, without = dict[str, float](), dict[str, str]()
    for name, (sizes, layout) in arrangements(case.op, device).items():
        try:
            errors[name] = _errors(case, dtype, sizes, layout, device)
        except NotRun as reason:  # no kernel takes that arrangement
            without[name] = str(reason)
        except (CheckError, AssertionError) as error:
            raise CheckError(f"{name}: {error}") from error
    if not errors:
        raise NotRun(next(iter(without.values())))
    return {"errors in units of torch's": errors} | ({"no kernel": without} if without else {})


def _errors(
    case: verify.Case,
    dtype: torch.dtype,
    sizes: Sizes,
    layout: Layout,
    device: torch.device,
    guards: bool = True,
) -> float:
    def arguments(seed: int) -> tuple[Named, Named]:
        drawn = draw(case.example, sizes, torch.Generator().manual_seed(seed), dtype, device)
        variables, constants = ({name: layout(tensor) for name, tensor in named.items()} for named in drawn)
        return variables, constants

    variables, constants = arguments(0)
    options, function = case.example.options, getattr(FF, case.op.name)
    with fastops.backend("triton"):
        way = fastops.explain(case.op.name, **variables, **constants, **options)
    if way.backend != "triton":
        raise NotRun(way.reason)
    run = partial(value_and_gradients, function, variables, constants, options, dtype)
    with fastops.backend("triton", strict=True), failures_raised():
        _, error = check_accuracy(case, dtype, arguments, draws_at_first=1)
        results = tuple(run())
        if not same_bits(results, tuple(run())):
            raise CheckError("two runs differ")
        if guards:
            with guarded(case.op):
                if not same_bits(results, tuple(run())):
                    raise CheckError("other memory gives other results")
    return round(error, 3)


def _rounded(case: verify.Case, device: torch.device) -> Figures:
    """Products of float32 numbers rounded to tf32: largest errors, as shares of what two roundings can do.

    Triton cuts operands off behind the eleventh bit, which errs by 2**-10 at most, and there are two.
    """
    if not on_a_gpu(device):
        raise NotRun("on a CPU float32 stays float32")
    function, options, shares = getattr(FF, case.op.name), case.example.options, dict[str, float]()

    def results(of: Callable[..., Tensor], arguments: Named) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in arguments.values()]
        value = of(**dict(zip(arguments, leaves, strict=True)), **options)
        return [value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value))]

    for name, (sizes, layout) in arrangements(case.op, device).items():
        drawn, _ = draw(case.example, sizes, torch.Generator().manual_seed(0), torch.float32, device)
        variables = {label: layout(tensor) for label, tensor in drawn.items()}
        with float32_products("tf32"), fastops.backend("triton", strict=True), failures_raised():
            ours = results(function, variables)
        exact = {label: tensor.double() for label, tensor in variables.items()}
        reference = torch_function(case.op)
        largest = results(reference, {label: tensor.abs() for label, tensor in exact.items()})
        found = zip(ours, results(reference, exact), largest, strict=True)
        shares[name] = max(((own - right).abs() / (1.02 * 2**-9 * bound)).max().item() for own, right, bound in found)
        if not shares[name] <= 1:
            raise CheckError(f"{name}: the error is {shares[name]:.3g} times that of two roundings to tf32")
    return {"shares of two roundings to tf32": {name: round(share, 3) for name, share in shares.items()}}


def _far(case: verify.Case, dtype: torch.dtype, device: torch.device) -> Figures:
    """The first argument, and others of its shape, take memory of ``INT32`` elements each."""
    need_memory(5 * INT32 * dtype.itemsize, device)
    variables, _ = case.example.draw(SMALL, torch.Generator())
    shape = next(iter(variables.values())).shape

    def layout(tensor: Tensor) -> Tensor:
        return far(tensor) if tensor.shape == shape and tensor.is_floating_point() else tensor

    return {"errors in units of torch's": {"large offsets": _errors(case, dtype, SMALL, layout, device, guards=False)}}


def _graph(build: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device) -> Figures:
    """Three steps of training, and three replays of a graph of one."""
    model, criterion = fastops.swap(build().to(device)), fastops.swap(nn.CrossEntropyLoss())
    inputs, targets = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def three(step: Callable[[], object]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        for _ in range(3):
            step()
        return tuple(parameter.detach().clone() for parameter in model.parameters())

    with fastops.backend("triton"), failures_raised():
        step = model_call(model, lambda output: criterion(output, targets), (inputs,), training=True, lr=0.1)
        replay = captured(step, device)
        if not same_bits(three(step), three(replay)):
            raise CheckError("the replayed graph gives other bits")
    return {}


def cases(device: torch.device) -> list[Case]:
    """The first example of each op in every dtype, CUDA graphs, the other examples, and large offsets."""

    def kernel(example: verify.Case, dtype: torch.dtype) -> Case:
        name = f"{example.name} / {str(dtype).removeprefix('torch.')}"
        return Case(name, partial(_check, example, dtype))

    first = [case for case in verify.CASES if case.example is case.op.examples[0]]
    others = [case for case in verify.CASES if case not in first]
    graphs = {"FashionMLP": (FashionMLP, (64, 784)), "LeNet": (LeNet, (64, 1, 32, 32))}
    return [
        *(kernel(case, dtype) for dtype in DTYPES for case in first),
        *(Case(f"{c.name} / tf32", partial(_rounded, c)) for c in first if c.op.name in ("linear", "conv2d")),
        *(Case(f"{name} / CUDA graph", partial(_graph, *words)) for name, words in graphs.items()),
        *(kernel(case, dtype) for dtype in DTYPES for case in others),
        *(
            Case(f"{case.name} / {str(dtype).removeprefix('torch.')} / large offsets", partial(_far, case, dtype))
            for dtype in (torch.bfloat16, torch.float32)
            for case in first
        ),
    ]
