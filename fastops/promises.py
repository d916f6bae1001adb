"""What the rewritten methods of `fastops.callsites` call: they look at what callables *are*, and run two in one call.

`hold` calls a layer, unless it is one of ours that nobody watches: then it returns a promise of the call. `apply` gets
the promise and what is applied to it: a ReLU runs together with the layer, and for anything else the two are called one
after the other, exactly as Python would have. Only these functions ever see a promise, and nothing else runs between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import BuiltinMethodType, FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn

from . import functional as FF
from .dispatch import explain
from .fold import folded_weights
from .fusions import FOLDED_NORMS, LAYERS, NORMS, RELU_FUNCTIONS, Layer
from .kernels import private
from .nn.overrides import MODULE_CALL, MODULE_CALL_IMPL, overrides, replaced

_NORMS: Final = tuple(NORMS)


class LayerPromise:
    """A call of ``layer`` with ``input`` that was put off; with ``weights``, of the batch norm behind it too."""

    __slots__ = ("input", "kind", "layer", "weights")

    def __init__(self, kind: Layer, layer: Any, input: Tensor, weights: tuple[Tensor, Tensor | None] | None) -> None:
        self.kind, self.layer, self.input, self.weights = kind, layer, input, weights

    def value(self) -> Any:
        input = self._take()
        return self.layer(input) if self.weights is None else self.kind.run(self.layer, False, input, *self.weights)

    def with_relu(self, relu: Callable[[Any], Any]) -> Any:
        layer, input = self.layer, self._take()
        if self.weights is None:
            return _with_relu(relu, self.kind, layer, input)
        return self.kind.run(layer, True, input, *self.weights)

    def with_norm(self, norm: Any) -> LayerPromise | None:
        """A promise of the batch norm behind the layer, if it may be folded into that."""
        if (
            type(norm) not in _TO_FOLD
            or self.weights is not None
            or not isinstance(self.layer, nn.modules.conv._ConvNd)
        ):
            return None
        if not untouched(norm) or replaced(_TO_FOLD[type(norm)]) or self.input.dim() != self.layer.weight.dim():
            return None
        weights = folded_weights(self.layer, norm, self.input)
        return None if weights is None else LayerPromise(self.kind, self.layer, self._take(), weights)

    def _take(self) -> Tensor:
        """The input, which nothing here keeps alive any longer."""
        input = self.input
        del self.input
        return input


class SumPromise:
    """A sum that was put off; ``in_place`` if it is to be written into ``left``."""

    __slots__ = ("in_place", "left", "right")

    def __init__(self, left: Tensor, right: Tensor, in_place: bool) -> None:
        self.left, self.right, self.in_place = left, right, in_place

    def value(self) -> Any:
        left, right = self._take()
        if not self.in_place:
            return left + right
        left += right
        return left

    def with_relu(self, relu: Callable[[Any], Any]) -> Any:
        return FF.add_relu(*self._take())

    def with_norm(self, norm: Any) -> None:
        return None

    def _take(self) -> tuple[Tensor, Tensor]:
        pair = self.left, self.right
        del self.left, self.right
        return pair


_PROMISES: Final = (LayerPromise, SumPromise)
_TO_FOLD: Final = {ours: torchs for torchs, ours in FOLDED_NORMS.items()}


# What a callable is ---------------------------------------------------------------------------------------------------


def untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but run the forward of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
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


def is_relu(function: Any, options: int = 0) -> bool:
    """Whether ``function(x)`` is a ReLU and nothing else; ``options`` is the number of its further arguments."""
    if type(function) is nn.ReLU:
        return not options and untouched(function) and not replaced(nn.ReLU)
    if function is RELU_FUNCTIONS[0]:  # `torch.nn.functional.relu`, which alone has an option
        return options <= 1 and not replaced(RELU_FUNCTIONS[0])
    return not options and any(function is relu for relu in RELU_FUNCTIONS) and not replaced(nn.ReLU)


def is_fresh(function: Any) -> bool:
    """Whether ``function`` is a module whose result is new memory that nothing else knows."""
    kind = type(function)
    if (
        isinstance(function, nn.Sequential)
        and getattr(kind.forward, "__wrapped__", None) is sequential_forward
        and function._modules
    ):
        return untouched(function) and is_fresh(next(reversed(function._modules.values())))
    if kind in _NORMS:
        return untouched(function) and not replaced(kind)
    return layer_of(function) is not None


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor or (isinstance(value, Tensor) and not overrides(value))


def _joins(following: Any, *attribute: str) -> bool:
    """Whether holding a call back pays if ``following``, or its ``attribute``, is what comes next.

    An attribute that is missing is an error of the statement that looks for it, not of this one.
    """
    function = getattr(following, attribute[0], None) if attribute else following
    return is_relu(function) or type(function) in _TO_FOLD or type(function) is nn.Identity


# What rewritten methods call ------------------------------------------------------------------------------------------


def hold(layer: Any, input: Any, *following: Any) -> Any:
    """``layer(input)``, or a promise of it. ``following``, if given, is what will be applied to it (see `_joins`)."""
    if _is_plain(input) and (not following or _joins(*following)) and (kind := layer_of(layer)) is not None:
        return LayerPromise(kind, layer, input, None)
    return layer(input)


def hold_keyword(layer: Any, *, input: Any) -> Any:
    """``layer(input=input)``, or a promise of it."""
    if _is_plain(input) and (kind := layer_of(layer)) is not None:
        return LayerPromise(kind, layer, input, None)
    return layer(input=input)


def hold_sum(left: Any, right: Any) -> Any:
    """``left + right``, or a promise of it."""
    return SumPromise(left, right, in_place=False) if _is_plain(left) and _is_plain(right) else left + right


def hold_sum_by(function: Any, left: Any, right: Any) -> Any:
    """``function(left, right)``, or a promise of it if that is `torch.add`."""
    if function is torch.add and _is_plain(left) and _is_plain(right):
        return SumPromise(left, right, in_place=False)
    return function(left, right)


def hold_sum_method(method: Any, right: Any) -> Any:
    """``method(right)``, or a promise of it if that is ``left.add`` of a tensor, or a layer of that name."""
    if torch.compiler.is_compiling():  # TorchDynamo knows no such method by itself
        return method(right)
    if type(method) is not BuiltinMethodType or method.__name__ != "add":
        return hold(method, right)
    left: Any = method.__self__
    return SumPromise(left, right, in_place=False) if _is_plain(left) and _is_plain(right) else method(right)


def hold_sum_in_place(left: Any, right: Any, is_fresh: bool) -> Any:
    """What ``left`` is after ``left += right``, or a promise of it.

    Fused, the sum is not written into ``left``. That goes unseen only where ``left`` is new memory that nothing else
    knows. The torch expression would gain nothing.
    """
    if is_fresh and _is_plain(left) and _is_plain(right) and left is not right:
        same = left.dtype is right.dtype and left.shape == right.shape
        if same and explain("add_relu", left, right).backend != "torch":
            return SumPromise(left, right, in_place=True)
    left += right
    return left


def link(function: Any, value: Any, *following: Any) -> Any:
    """``function(value)``, or a promise of it, where ``value`` may be a promise itself."""
    if type(value) in _PROMISES:
        if type(function) is nn.Identity and untouched(function):
            return value
        if is_relu(function):
            return value.with_relu(function)
        if (folded := value.with_norm(function)) is not None:
            return folded
        value = value.value()
    return hold(function, value, *following)


def link_layer(function: Any, layer: Any, input: Any, *following: Any) -> Any:
    """``link(function, link(layer, input), *following)``. Nothing joins behind a ReLU, which needs no promise."""
    if is_relu(function) and _is_plain(input) and (kind := layer_of(layer)) is not None:
        return _with_relu(function, kind, layer, input)
    return link(function, link(layer, input, function), *following)


def apply(function: Any, value: Any, *options: Any, **keywords: Any) -> Any:
    """``function(value, ...)``, where ``value`` may be a promise. The result never is one."""
    if type(value) in _PROMISES:
        if is_relu(function, len(options) + len(keywords)):
            return value.with_relu(function)
        folded = None if options or keywords else value.with_norm(function)
        if folded is not None:
            return folded.value()
        value = value.value()
    return function(value, *options, **keywords)


def join(function: Any, layer: Any, input: Any) -> Any:
    """``function(layer(input))``: `apply` and `hold` in one, which needs no promise for a ReLU."""
    relu = is_relu(function)
    if not (relu or type(function) in _TO_FOLD) or not _is_plain(input) or (kind := layer_of(layer)) is None:
        return function(layer(input))
    if relu:
        return _with_relu(function, kind, layer, input)
    return apply(function, LayerPromise(kind, layer, input, None))


def method(value: Any, name: str) -> Any:
    """``value.relu()`` or ``value.relu_()``, where ``value`` may be a promise."""
    if type(value) in _PROMISES:
        if not replaced(nn.ReLU):
            return value.with_relu(lambda result: getattr(result, name)())
        value = value.value()
    return getattr(value, name)()


def now(value: Any) -> Any:
    """``value`` itself, or what it promises."""
    return value.value() if type(value) in _PROMISES else value


def shown(value: Any, before: Any) -> Any:
    """What the user's variable is while ``value`` may be a promise: then what it was before."""
    return before if type(value) in _PROMISES else value


def mark(function: Any, value: Any) -> tuple[Any, bool]:
    """``function(value)``, and whether that is new memory that nothing else knows."""
    fresh = is_fresh(function)
    return apply(function, value), fresh


def chain(functions: Iterable[Any], value: Any) -> Any:
    """What ``for f in functions: value = f(value)`` makes of ``value``, or a promise of it."""
    kind = type(functions)
    if kind in (list, tuple) or getattr(kind, "__iter__", None) in (nn.ModuleList.__iter__, nn.Sequential.__iter__):
        for function in functions:
            value = link(function, value)
        return value
    for function in functions:  # whatever makes them may have effects, for which no call can wait
        value = function(now(value))
    return value


def user_class(found: Any) -> Any:
    """The class that the user wrote, for a class that `fastops.swap` made of it."""
    return vars(found).get("_fastops_user_class", found) if isinstance(found, type) else found


def sequential_forward(self: nn.Sequential, input: Any) -> Any:
    """`torch.nn.Sequential.forward`, which sees what comes next."""
    return now(chain(self, input))


HELPERS: Final[dict[str, Callable[..., Any]]] = {
    f"_fastops_{helper.__name__}": helper
    for helper in (
        *(hold, hold_keyword, hold_sum, hold_sum_by, hold_sum_method, hold_sum_in_place, link, link_layer),
        *(apply, join, method, now, shown, mark, chain, user_class),
    )
}


def _with_relu(relu: Callable[[Any], Any], kind: Layer, layer: Any, input: Tensor) -> Any:
    own = layer._parameters  # past `nn.Module.__getattr__`, unless they are computed
    weight = own["weight"] if "weight" in own else layer.weight  # noqa: SIM401  (looked up only then)
    bias = own["bias"] if "bias" in own else layer.bias  # noqa: SIM401
    if (type(weight) is not nn.Parameter and overrides(weight)) or (type(bias) is not nn.Parameter and overrides(bias)):
        if isinstance(layer, nn.Linear):
            return relu(torch.nn.functional.linear(input, weight, bias))
        if isinstance(layer, nn.modules.conv._ConvNd):
            return relu(layer._conv_forward(input, weight, bias))
        return relu(layer(input))
    return kind.run(layer, True, input, weight, bias)
