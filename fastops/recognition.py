"""What a callable is: a layer of ours, an activation, a pooling, or something that only its own call may run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Final

from torch import Tensor, nn

from .fusions import LAYERS, ORIGINALS, Layer, activation_of_function, activation_of_module
from .kernels import private
from .kernels.activation import Activation
from .nn.overrides import MODULE_CALL, MODULE_CALL_IMPL, overrides, replaced
from .ops.activations import MODULES

LEFT_ALONE: Final = "_fastops_left_alone"  # the attribute of a module that `fastops.swap` was to leave alone: why


def untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but run the forward of its class, and fastops may do it instead."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or LEFT_ALONE in module.__dict__
        or module._compiled_call_impl is not None
        or type(module).__call__ is not MODULE_CALL
        or nn.Module._call_impl is not MODULE_CALL_IMPL
        or private.has_global_hooks()
    )


def layer_of(module: Any) -> Layer | None:
    """How ``module`` runs, if it is a layer of ours that nobody watches or changed."""
    forward = getattr(type(module), "forward", None)
    layer = LAYERS.get(forward) if type(forward) is FunctionType else None
    if layer is None or not untouched(module) or replaced(layer.original) or "_conv_forward" in module.__dict__:
        return None
    return layer


def activation_of(
    function: Any, options: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
) -> Activation | None:
    """The activation that ``function(x, *options, **keywords)`` is and nothing else, None if it is none."""
    kind = type(function)
    if kind in MODULES:
        if options or keywords or not untouched(function) or replaced(kind):
            return None
        return activation_of_module(function)
    activation = None if isinstance(function, nn.Module) else activation_of_function(function, options, keywords)
    if activation is None or function is F_RELU:  # that one is whole, whatever became of `torch.nn.ReLU`
        return None if activation is not None and replaced(F_RELU) else activation
    return None if replaced(MODULE_OF[activation[0]]) else activation


F_RELU: Final = nn.functional.relu
MODULE_OF: Final = {**{name: kind for kind, name in MODULES.items()}, "gelu_tanh": nn.GELU}


def is_pool(function: Any) -> bool:
    """Whether ``function`` is a maximum pooling, before which or behind which a ReLU gives the same."""
    return (
        type(function) is nn.MaxPool2d
        and not function.return_indices
        and untouched(function)
        and not replaced(nn.MaxPool2d)
    )


def forward_that_holds(module: Any) -> Callable[[Any, Any], Any] | None:
    """The forward of ``module`` that may return a promise, if `fastops.swap` made one and nobody watches the call."""
    held = getattr(getattr(type(module), "forward", None), "_fastops_holds", None)
    if held is None or not untouched(module) or private.tracing_state() is not None:
        return None
    result: Callable[[Any, Any], Any] = held
    return result


def is_plain(value: Any) -> bool:
    return type(value) is Tensor or (isinstance(value, Tensor) and not overrides(value))


def joins(following: Any, *attribute: str) -> bool:
    """Whether holding a call back pays if ``following``, or its ``attribute``, is what comes next.

    An attribute that is missing is an error of the statement that looks for it, not of this one.
    """
    function = getattr(following, attribute[0], None) if attribute else following
    return activation_of(function) is not None or evaluates(function) or type(function) is nn.Identity


def evaluates(function: Any) -> bool:
    """Whether ``function`` is a batch norm in evaluation mode, which may be folded into the convolution before it."""
    return isinstance(function, nn.modules.batchnorm._BatchNorm) and not function.training


def user_class(found: Any) -> Any:
    """The class that the user wrote, for a class that `fastops.swap` made of it."""
    return vars(found).get("_fastops_user_class", found) if isinstance(found, type) else found


def plain_class(found: type) -> type:
    """The class that the user wrote, or torch's, for a class that `fastops.swap` gave to a module."""
    original: type = ORIGINALS.get(found) or user_class(found)
    return original
