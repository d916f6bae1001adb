"""What the Functions of all ops share."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops.registry import RawOp


class Function(torch.autograd.Function):
    """A Function that computes the op `raw`, of what `raw_arguments` makes of its arguments.

    Its vmap rule is derived from its own forward, backward and jvp.
    """

    generate_vmap_rule = True
    raw: ClassVar[RawOp]
    _eager: ClassVar[type[torch.autograd.Function]]

    @staticmethod
    def raw_arguments(*arguments: Any) -> tuple[Any, ...]:
        return arguments

    def __init_subclass__(cls) -> None:
        """Add ``forward``, and a twin in the older style, with ctx: torch binds a signature per call of the newer."""
        cls.forward = staticmethod(lambda *arguments: cls.raw.op(*cls.raw_arguments(*arguments)))  # type: ignore[method-assign]

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cls.compute(arguments)
            cls.setup_context(ctx, arguments, output)
            return output

        def backward(ctx: Any, *gradients: Any) -> Any:
            return cls.backward(ctx, *gradients)

        def jvp(ctx: Any, *tangents: Any) -> Any:
            return cls.jvp(ctx, *tangents)

        namespace = {method.__name__: staticmethod(method) for method in (forward, backward, jvp)}
        metaclass: Any = type(torch.autograd.Function)
        cls._eager = metaclass(cls.__name__, (torch.autograd.Function,), namespace)

    @classmethod
    def compute(cls, arguments: tuple[Any, ...]) -> Any:
        """`forward` while the dispatcher is idle: past it, for plain tensors."""
        for argument in arguments:
            if isinstance(argument, Tensor) and (
                type(argument) not in _PLAIN_TYPES or argument.is_neg() or argument._is_zerotensor()
            ):
                return cls.forward(*arguments)
        return cls.raw.implementation(*cls.raw_arguments(*arguments))


# The dispatcher's state outside of all modes, transforms and tracers; the second is inference mode's.
_BACKEND_SELECT: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_IDLE: Final = (
    (_BACKEND_SELECT | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)).raw_repr(),
    _BACKEND_SELECT.raw_repr(),
)
_VMAP_MODE: Final = torch._C._dispatch_key_parse("VmapMode")
_PLAIN_TYPES: Final = (Tensor, torch.nn.Parameter)
# By name: a lookup through modules at each call adds up.
_include_set: Final = torch._C._dispatch_tls_local_include_set
_profiler_enabled: Final = torch._C._autograd._profiler_enabled
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_is_grad_enabled: Final = torch.is_grad_enabled
_any_requires_grad: Final = torch._C._any_requires_grad


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, the shortest way: torch's entries take longer than a small kernel's launch."""
    if _is_dynamo_compiling() or _include_set().raw_repr() not in _IDLE or _profiler_enabled():
        return function.apply(*arguments)
    if (_is_grad_enabled() and _any_requires_grad(*arguments)) or forward_ad._current_level >= 0:
        return super(torch.autograd.Function, function._eager).apply(*arguments)  # type: ignore[misc]
    return function.compute(arguments)


class _Context:
    """What `setup_context` and `jvp` need of a ctx."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *_: Tensor | None) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def _batched_and_recorded() -> bool:
    """Whether `torch.autograd.grad` runs a backward for a batch of gradients, and is to record it.

    Its vmap, older than torch.func's, drops the graph of a Function.
    """
    return _is_grad_enabled() and _include_set().has(_VMAP_MODE)


def gradients(function: type[Function], needs: tuple[bool, ...], *arguments: Any) -> tuple[Tensor | None, ...]:
    """What a backward returns: ``function``'s results where they are needed.

    They are linear in the first argument, the gradient of the output: so its jvp along that is the same in plain torch.
    """
    if _batched_and_recorded():
        ctx = _Context()
        function.setup_context(ctx, arguments, None)
        results = function.jvp(ctx, arguments[0], *(None,) * (len(arguments) - 1))
    else:
        results = apply(function, *arguments)
    return tuple(gradient if needed else None for gradient, needed in zip(results, needs, strict=True))


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether a backward pass is the last to see what its forward pass made and saved: the graph is not kept."""
    return (
        not (_is_dynamo_compiling() or _is_grad_enabled())
        and _include_set().raw_repr() in _IDLE
        and all(type(tensor) in _PLAIN_TYPES for tensor in tensors)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def saved_for(ctx: Any) -> tuple[bool, bool]:
    """Whether to save what the gradients of the first two arguments take. torch's vmap needs all that jvp does."""
    if torch._C._are_functorch_transforms_active():
        return True, True
    needs: tuple[bool, bool] = ctx.needs_input_grad[:2]
    return needs


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
