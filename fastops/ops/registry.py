"""How a raw op is registered, run and batched."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("fastops", "DEF")


class FallbackWarning(RuntimeWarning):
    """A kernel failed to compile or launch on a device that should run it; the torch expression ran instead."""


class RawOp(NamedTuple):
    """An op of ``torch.ops.fastops``, and the function that the dispatcher calls for it in the end."""

    op: Callable[..., Any]
    implementation: Callable[..., Any]


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
) -> RawOp:
    """Define the op ``fastops::<schema>``. ``vmap`` is a `torch.library.register_vmap` rule that also takes the op."""
    name = "fastops::" + _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,)).split("::")[-1]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    op = getattr(torch.ops.fastops, name.split("::")[1])
    torch.library.register_vmap(name, functools.partial(vmap, op), lib=_library)
    _library.impl(name, _without_derivatives(name, op), "Autograd")

    return RawOp(op, implementation)


def _without_derivatives(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` for the dispatcher's autograd: without this, gradients and tangents through it would silently be lost."""
    message = f"{name} is a raw op without derivatives: differentiate the functions of fastops.functional instead"

    class WithoutDerivatives(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(message)

    def call(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            tensors = (argument for argument in arguments if isinstance(argument, Tensor))
            if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
                raise RuntimeError(message)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(message)
            return WithoutDerivatives.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


def loop_over_batch(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The vmap rule that calls ``op`` once per sample and stacks the results. Only a tensor's dimension is a number."""
    if info.batch_size == 0:
        samples = [
            a.new_zeros(a.shape[:dim] + a.shape[dim + 1 :]) if isinstance(dim, int) else a
            for a, dim in zip(arguments, in_dims, strict=True)
        ]
        result = op(*samples)
        if isinstance(result, tuple):
            return tuple(part.new_empty((0, *part.shape)) for part in result), (0,) * len(result)
        return result.new_empty((0, *result.shape)), 0
    results = [
        op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
    return torch.stack(results), 0


def or_empty(like: Tensor, gradient: Tensor | None) -> Tensor:
    """A schema has no optional results: an empty tensor stands for a gradient that nobody asked for."""
    return like.new_empty(0) if gradient is None else gradient


_warned: set[tuple[str, torch.device]] = set()


@contextlib.contextmanager
def failures_raised() -> Iterator[None]:
    """A kernel that fails raises its `FallbackWarning` inside, whether it was given before or not."""
    before = _warned.copy()
    _warned.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            yield
    finally:
        _warned.update(before)


def run_kernel(op: str, kernel: Callable[..., Any], torch_expression: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``kernel``; if Triton cannot compile or launch it, warn once per op and device and run ``torch_expression``.

    An exhausted memory or a stopped device is no failure of the kernel and is raised as it is.
    """
    try:
        return kernel(*arguments)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        from triton.errors import TritonError

        if not isinstance(error, (RuntimeError, TritonError)):
            raise
        if any(words in str(error) for words in ("out of memory", "device-side assert", "illegal memory access")):
            raise
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        device = tensors[0].device
        if (op, device) not in _warned:
            _warned.add((op, device))
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            warnings.warn(
                f"the Triton kernel of {op} failed for shapes {shapes} on {device}; torch runs instead: {error}",
                FallbackWarning,
                stacklevel=3,
            )
        return torch_expression(*arguments)
