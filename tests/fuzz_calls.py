"""A call of a public op as code that can be pasted, and what must hold of it.

A failure of `tests/test_fuzz.py` shrinks to code such as ::

    check(Call("linear", {"input": Given((3, 2), "float32"), "weight": Given((1, 2), "float32")}))

that runs as it stands: CONTRIBUTING.md says how.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from interpreter.accuracy import NUMBERS, near
from torch import Tensor
from triton.runtime import interpreter

import fastops
import fastops.functional as FF
from fastops.accuracy import error_share
from fastops.cli.examples import torch_function
from fastops.guard import checked_addresses, same_bits
from fastops.kernels import batch_norm, configs, conv, cross_entropy, depthwise, elementwise, matmul, max_pool
from fastops.ops import OPS
from fastops.ops.op import failed

__all__ = ["Call", "Given", "check"]

# Arguments ------------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "channels_last", "offset")
VALUES = ("normal", "large", "special", "subnormal", "equal")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Given:
    """A tensor. ``seed`` draws its values; integers are drawn from ``low`` up to ``high``, which is left out."""

    shape: tuple[int, ...]
    dtype: str
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    low: int = 0
    high: int = 1

    def tensor(self) -> Tensor:
        return laid_out(self._values(), self.layout)

    def _values(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(repr((self.shape, self.values, self.seed)).encode()))
        if not dtype.is_floating_point:
            return torch.randint(self.low, self.high, self.shape, generator=generator, dtype=dtype)
        if self.values in ("probabilities", "positive"):
            return torch.rand(self.shape, generator=generator, dtype=torch.float64).to(dtype)
        drawn = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.values == "large":
            drawn = drawn * 1e4
        elif self.values == "small":
            drawn = drawn / 1000
        elif self.values == "subnormal":
            drawn = drawn * torch.finfo(dtype).tiny / 4
        elif self.values == "equal":  # ties, and zeros of both signs
            drawn = drawn.round()
        elif self.values in ("special", "finite or NaN") and drawn.numel():
            odd = torch.tensor([torch.nan, -0.0, torch.finfo(dtype).tiny / 2, 1e4, torch.inf, -torch.inf])
            odd = odd[: 6 if self.values == "special" else 4]
            count = max(1, drawn.numel() // 16)
            where = torch.randint(drawn.numel(), (count,), generator=generator)
            drawn.flatten()[where] = odd[torch.randint(len(odd), (count,), generator=generator)].double()
        return drawn.to(dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of these values whose memory is another; NaN, or the largest integer, lies between its elements."""
    if layout == "channels_last" and values.dim() in (4, 5):
        return values.to(memory_format=(torch.channels_last, torch.channels_last_3d)[values.dim() - 4])
    if layout == "transposed" and values.dim() > 1:
        return values.mT.contiguous().mT
    if layout == "expanded" and values.dim() and values.shape[0] > 1:
        return values[:1].clone().expand(values.shape)
    if layout in ("sliced", "offset"):
        sliced = layout == "sliced" and values.dim() > 0
        shape = [*values.shape[:-1], 2 * values.shape[-1]] if sliced else [values.numel()]
        poison = torch.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
        memory = torch.full((1 + int(np.prod(shape)),), poison, dtype=values.dtype)
        result = memory[1:].view(shape)
        result = result[..., ::2] if sliced else result.view(values.shape)
        return result.copy_(values)
    return values.contiguous()


@dataclass(frozen=True)
class Call:
    """A call of the public function ``op`` with tensors and options by keyword.

    ``needs`` are the tensors whose gradients are asked for, ``grad`` says how that of the result lies and what it is,
    ``backend`` which way it goes. With ``small_tiles`` few elements are several tiles. The call runs once more with the
    programs of a launch in another ``order``, unless that is "forward".
    """

    op: str
    tensors: dict[str, Given]
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    grad: tuple[str, str] = ("contiguous", "normal")
    backend: str = "triton"
    small_tiles: bool = False
    order: str = "forward"


# What must hold -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The results of a call, or its error; ``changed`` is the first tensor that it wrote to, though torch does not."""

    results: list[Tensor] = field(default_factory=list)
    error: Exception | None = None
    changed: str | None = None


def _bits(tensor: Tensor) -> bytes:
    """All memory of a tensor, what lies between its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).numpy().tobytes()


def run(function: Callable[..., Tensor], call: Call, tensors: dict[str, Tensor], grad: Tensor | None) -> Outcome:
    """Result, gradients and what a batch norm moves. Without ``grad`` one is drawn for the result."""
    variables = [tensors[name].requires_grad_() for name in call.needs]
    before = {name: _bits(tensor) for name, tensor in tensors.items()}
    try:
        output = function(**tensors, **call.options)
        results = [output.detach()]
        if output.requires_grad and variables:
            grad = grad_output(call, output) if grad is None else grad
            found = torch.autograd.grad(output, variables, grad, allow_unused=True)
            results += [torch.zeros(0) if gradient is None else gradient for gradient in found]
    except Exception as error:  # whatever torch raises is what is compared
        return Outcome(error=error)
    moved = [name for name in tensors if name.startswith("running_")] if call.options.get("training") else []
    changed = next((n for n, tensor in tensors.items() if n not in moved and _bits(tensor) != before[n]), None)
    return Outcome(results + [tensors[name].detach() for name in moved], changed=changed)


def grad_output(call: Call, output: Tensor) -> Tensor:
    layout, values = call.grad
    return Given(tuple(output.shape), str(output.dtype)[6:], layout, values, seed=99).tensor()


@contextmanager
def ordered(order: str) -> Iterator[None]:
    """Inside, the programs of a launch run in "reverse" or "shuffled"."""
    builder = interpreter.InterpreterBuilder
    original = builder.set_grid_idx

    def set_grid_idx(self: Any, *index: int) -> None:
        count, number = int(np.prod(self.grid_dim)), int(np.ravel_multi_index(index, self.grid_dim))
        another = count - 1 - number if order == "reverse" else np.random.RandomState(count).permutation(count)[number]
        original(self, *(int(i) for i in np.unravel_index(another, self.grid_dim)))

    with mock.patch.object(builder, "set_grid_idx", set_grid_idx):
        yield


@contextmanager
def small_tiles() -> Iterator[None]:
    """Inside, kernels take tiles of about 16 elements a side, and split sums that they never split for a CPU."""

    def small(*sizes: int) -> list[int]:
        return [min(16, power_of_2(size)) for size in sizes]

    def norm(call: batch_norm.Call, *activation: Any) -> batch_norm.Tiling:
        return gpus_norm(call._replace(device=torch.device("meta")), *activation)

    def classes(width: int, inner: int, *_: Any) -> cross_entropy.CrossEntropyConfig:
        return cross_entropy.CrossEntropyConfig(min(4, power_of_2(inner)), small(width)[0], 1)

    def pool(_: Any, *sizes: Any) -> tuple[int, ...]:
        return tuple(min(n, 16) for n in gpus_pool(torch.device("meta"), *sizes))

    gpus_norm, gpus_pool, power_of_2 = batch_norm.tiling, max_pool.tile_shape, matmul.triton.next_power_of_2
    patches = [
        (elementwise, "elementwise_config", lambda size, *_: (small(size)[0], 1)),
        (configs, "_INTERPRETED", (configs.MatmulConfig(16, 16, 16, 1, 1),)),
        (configs, "_INTERPRETED_POSITIONS", 16),
        (matmul, "inner_splits", lambda *_: 2),
        (conv, "inner_splits", lambda *_: 2),
        (batch_norm, "tiling", norm),
        (batch_norm, "register_limit", lambda *_, **__: {}),
        (batch_norm, "ELEMENTS", 256),
        (cross_entropy, "cross_entropy_config", classes),
        (depthwise, "_LEAST_LANES", 1),
        (depthwise, "_lanes", lambda _: {"BLOCK": 64}),
        (max_pool, "tile_shape", pool),
    ]
    configs.forget_plans()
    with ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
    configs.forget_plans()


def check(call: Call) -> None:
    """Hold a call to torch's: errors by type and words, results by shape, dtype, memory format and the accuracy rule.

    Kernels may touch nothing but elements of their tensors, and the order of their programs may not matter.

    Raises:
        AssertionError: says what differs.
    """
    failed.clear()  # or a kernel that failed in an earlier call would not be tried again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", fastops.FallbackWarning)
        _check(call)


def _check(call: Call) -> None:
    torchs, ours = torch_function(OPS[call.op]), getattr(FF, call.op)
    made = {name: given.tensor() for name, given in call.tensors.items()}
    expected = run(torchs, call, {name: given.tensor() for name, given in call.tensors.items()}, None)
    with fastops.backend(call.backend), checked_addresses(), small_tiles() if call.small_tiles else nullcontext():
        found = run(ours, call, made, None)
        if call.order != "forward" and not found.error:
            with ordered(call.order):
                again = run(ours, call, {name: given.tensor() for name, given in call.tensors.items()}, None)
            assert same_bits(tuple(found.results), tuple(again.results)), "results depend on the order of programs"
    if expected.error or found.error:
        assert _words(found.error) == _words(expected.error), f"{found.error!r} is not torch's {expected.error!r}"
        return
    assert found.changed is None, f"{found.changed} was modified"
    assert len(found.results) == len(expected.results)
    for number, (result, torchs_own) in enumerate(zip(found.results, expected.results, strict=True)):
        kinds = [(t.dtype, t.shape, t.layout, t.device) for t in (result, torchs_own)]
        assert kinds[0] == kinds[1], f"result {number}: {kinds[0]} is not torch's {kinds[1]}"
    # torch's conv3d keeps channels last where it takes oneDNN alone. Its conv1d takes a transposed weight for channels
    # last, from which it keeps inputs.
    by_chance = call.op.endswith("3d") or (call.op.endswith("1d") and call.tensors["weight"].layout == "transposed")
    if not by_chance:
        strides = [_strides(outcome.results[0]) for outcome in (found, expected)]
        assert strides[0] == strides[1], f"strides {strides[0]} are not torch's {strides[1]}"
    if not same_bits(tuple(found.results), tuple(expected.results)):  # as the torch expression always is
        judge(call, torchs, found.results, expected.results)


def _words(error: Exception | None) -> tuple[type, str]:
    """Type and words, without the list of types where torch tells what it was called with, by name or by position."""
    return type(error), str(error).split(" - got (")[0]


def _strides(tensor: Tensor) -> list[int]:
    """Those that say where an element is."""
    if not tensor.numel():
        return []
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def judge(call: Call, torchs: Callable[..., Tensor], ours: list[Tensor], expected: list[Tensor]) -> None:
    """The accuracy rule. torch's error in a few numbers may be nothing by luck: so it computes others near to them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: given.tensor() for name, given in call.tensors.items()}
    grad = grad_output(call, expected[0]) if len(ours) > 1 and call.needs else None

    def computed(dtype: torch.dtype | None, given: dict[str, Tensor], grad: Tensor | None) -> list[Tensor]:
        def cast(tensor: Tensor) -> Tensor:
            floating = tensor.is_floating_point() and dtype is not None
            own = tensor.detach().to(dtype if floating else tensor.dtype).clone()
            # A CPU's torch adds up the statistics of a batch norm in float64 where the numbers of a channel are side by
            # side. A GPU's adds up in float32, as it does itself in the other layout.
            return _channels_last(own) if call.op.startswith("batch_norm") and dtype is None else own

        outcome = run(torchs, call, {n: cast(t) for n, t in given.items()}, None if grad is None else cast(grad))
        return outcome.results

    doubles = ours[0].dtype is torch.float64
    exact = [computed(torch.float64, tensors, grad)]
    own = [computed(torch.float32, tensors, grad) if doubles else expected]
    for numbers in (NUMBERS, 32 * NUMBERS):
        while len(exact) * max(1, min(result.numel() for result in ours)) < numbers:
            drawn = {name: _near(tensor, generator) for name, tensor in tensors.items()}
            another = None if grad is None else _near(grad, generator)
            both = (computed(dtype, drawn, another) for dtype in (torch.float64, torch.float32 if doubles else None))
            for results, kept in zip(both, (exact, own), strict=True):
                kept.append(results)
            if not own[-1]:  # torch takes two dtypes together in some layouts alone: no other numbers are had
                del exact[-1], own[-1]
                break
        shares = [
            _share(result, [each[number] for each in own], [each[number] for each in exact], _slack(call, number))
            for number, result in enumerate(ours)
        ]
        if max(shares) <= 1:
            return
    raise AssertionError(f"shares of the allowed error: {', '.join(f'{share:.3g}' for share in shares)}")


def _near(tensor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = near(tensor, generator)
    assert drawn is not None
    return drawn


def _slack(call: Call, number: int) -> float:
    """One rounding of the largest number that goes into a running mean.

    The sum of a few 16-bit numbers is exact in float32, and torch's error nothing, whatever numbers are drawn. What is
    left of a mean beside the mean so far can be far smaller than both.
    """
    if number != 1 or "running_mean" not in call.tensors or not call.options.get("training"):
        return 0.0
    given = call.tensors["input"].tensor().double().nan_to_num(0, 0, 0)
    return torch.finfo(torch.float32).eps / 2 * given.abs().max().item() if given.numel() else 0.0


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() < 2 else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _share(result: Tensor, own: Sequence[Tensor], exact: Sequence[Tensor], slack: float) -> float:
    """Of the error that is allowed, where torch's own result stands for ours but for the first one.

    Where torch's own is no number though the exact one is, or the other way round, ours may be either of the two.
    """
    if not result.numel():
        return 0.0
    if not result.is_floating_point():
        return 0.0 if torch.equal(result, own[0]) else float("inf")
    rest = exact if result.dtype is torch.float64 else own
    results = torch.stack([result, *(tensor.to(result.dtype) for tensor in rest[1:])]).detach()
    owns, exacts = torch.stack(list(own)).detach(), torch.stack(list(exact)).detach()
    rounded = exacts.to(results.dtype)
    if result.dtype is torch.float64:  # float32's error alone counts, not where it overflows
        owns = torch.where(owns.isfinite() & exacts.isfinite(), owns.double(), exacts)
    error = (results - exacts).abs()
    exempt = error <= slack * (result.element_size() == 4)
    if result.element_size() == 2:  # torch rounds between its steps, and overflows there: nobody has to
        overflown = results.isfinite() & ~owns.isfinite()
        owns = torch.where(overflown, rounded, owns)
        # What its error would be is not known then. One rounding of the largest: others may be what is left of such.
        exempt |= overflown & (error <= torch.finfo(result.dtype).eps / 2 * exacts.nan_to_num(0, 0, 0).abs().max())
    odd = ~owns.isfinite() | ~rounded.isfinite()
    exempt |= odd & ((results == rounded) | (results.isnan() & rounded.isnan()))
    return error_share(*(tensor.masked_fill(exempt, 0) for tensor in (results, owns, exacts)))
