"""What the Functions of all ops share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Function(torch.autograd.Function):
    """A Function whose vmap rule is derived from its own forward, backward and jvp."""

    generate_vmap_rule = True
    _eager: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls) -> None:
        """Derive a twin in the older style, forward with ctx: for the newer torch binds a signature at each call."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cls.forward(*arguments)
            cls.setup_context(ctx, arguments, output)
            return output

        methods = {"forward": forward, "backward": cls.backward, "jvp": cls.jvp}
        namespace = {name: staticmethod(method) for name, method in methods.items()}
        metaclass: Any = type(torch.autograd.Function)
        cls._eager = metaclass(cls.__name__, (torch.autograd.Function,), namespace)


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, the shortest way: the entries of torch cost more than a small kernel's launch."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return function.apply(*arguments)
    if forward_ad._current_level < 0:
        if not torch.is_grad_enabled():
            return function.forward(*arguments)
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                break
        else:
            return function.forward(*arguments)
    return super(torch.autograd.Function, function._eager).apply(*arguments)  # type: ignore[misc]


def differentiable() -> bool:
    """Whether a backward that runs now may itself be differentiated: it then has to go through a Function."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def gradients(function: type[Function], op: Any, needs: tuple[bool, ...], *arguments: Any) -> tuple[Tensor | None, ...]:
    """What a backward returns: ``op``'s results, through ``function`` where they may be differentiated again."""
    results = apply(function, *arguments) if differentiable() else op(*arguments)
    return tuple(gradient if needed else None for gradient, needed in zip(results, needs, strict=True))


def add(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are there."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def rows(tensor: Tensor) -> Tensor:
    """[..., K] -> [M, K]. (``flatten(0, -2)`` has no batching rule and is wrong for one dimension.)"""
    return tensor.reshape(-1, tensor.shape[-1])
