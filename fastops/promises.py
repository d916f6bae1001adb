"""What the rewritten methods of `fastops.callsites` call: they look at what callables *are*, and run some in one call.

`hold` calls a layer, unless it is one of ours that nobody watches: then it returns a promise of the call. `apply` gets
the promise and what is applied to it: an activation runs together with the layer, and for anything else the two are
called one after the other, exactly as Python would have. Only these functions ever see a promise, and nothing else runs
between. Of two summands only the one that was called last may be a promise.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn

from . import functional as FF
from .dispatch import explain, is_left_to_torch, on_plain_cpu
from .fold import folded_weights
from .fusions import (
    LAYER_FUNCTIONS,
    NORMS,
    Layer,
    fused_op,
    options_of,
)
from .kernels.activation import RELU, Activation
from .kernels.geometry import memory_format_of
from .nn.norm import normalized
from .nn.overrides import overrides, replaced
from .ops import batch_norm, conv
from .ops.activations import METHODS
from .recognition import (
    MODULE_OF,
    activation_of,
    evaluates,
    forward_that_holds,
    is_plain,
    is_pool,
    joins,
    layer_of,
    untouched,
    user_class,
)

_NORMS: Final = tuple(NORMS)
_Apply = Callable[[Any], Any]  # what applies an activation as the user wrote it


class LayerPromise:
    """A call of ``layer`` with ``input`` that was put off; with ``weights``, of the batch norm behind it too."""

    __slots__ = ("input", "kind", "layer", "weights")

    def __init__(self, kind: Layer, layer: Any, input: Tensor, weights: tuple[Tensor, Tensor | None] | None) -> None:
        self.kind, self.layer, self.input, self.weights = kind, layer, input, weights

    def value(self) -> Any:
        input = self._take()
        return self.layer(input) if self.weights is None else self.kind.run(self.layer, None, input, *self.weights)

    def activated(self, activation: Activation, apply: _Apply) -> Any:
        if fused_op(activation, self.kind.op) is None:
            return apply(self.value())
        layer, input = self.layer, self._take()
        if self.weights is None:
            return _activated(activation, apply, self.kind, layer, input)
        return self.kind.run(layer, activation, input, *self.weights)

    def with_norm(self, norm: Any) -> LayerPromise | None:
        """A promise of the batch norm behind the layer, if it may be folded into that."""
        if self.weights is not None or not isinstance(self.layer, nn.modules.conv._ConvNd) or not evaluates(norm):
            return None
        known = layer_of(norm)
        weights = None if known is None or known.op != "batch_norm" else folded_weights(self.layer, norm, self.input)
        return None if weights is None else LayerPromise(self.kind, self.layer, self._take(), weights)

    def to_normalize(self) -> Tensor | None:
        """The input of a batch norm to which something may be added in the same call, None if there is none."""
        own = self.layer._parameters
        if self.kind.op != "batch_norm" or self.weights is not None or not own.keys() >= {"weight", "bias"}:
            return None
        return None if overrides(own["weight"], own["bias"]) else self.input

    def added(self, other: Tensor, name: str, options: dict[str, Any]) -> Any:
        return normalized(partial(getattr(FF, name), **options), self.layer, self._take(), other)

    def _take(self) -> Tensor:
        """The input, which nothing here keeps alive any longer."""
        input = self.input
        del self.input
        return input


class FunctionPromise:
    """A call of a function of torch's that was put off: ``op`` is that of ours which computes the same."""

    __slots__ = ("arguments", "function", "keywords", "op")

    def __init__(self, op: str, function: Callable[..., Any], arguments: Any, keywords: dict[str, Any]) -> None:
        self.op, self.function, self.arguments, self.keywords = op, function, arguments, keywords

    def value(self) -> Any:
        arguments, keywords = self._take()
        return self.function(*arguments, **keywords)

    def activated(self, activation: Activation, apply: _Apply) -> Any:
        name = fused_op(activation, self.op)
        if name is None:
            return apply(self.value())
        arguments, keywords = self._take()
        return getattr(FF, name)(*arguments, **keywords, **options_of(activation))

    def with_norm(self, norm: Any) -> None:
        return None

    def to_normalize(self) -> Tensor | None:
        input = self.arguments[0] if self.arguments else None
        return input if self.op == "batch_norm" and isinstance(input, Tensor) else None

    def added(self, other: Tensor, name: str, options: dict[str, Any]) -> Any:
        (input, *rest), keywords = self._take()
        return getattr(FF, name)(input, other, *rest, **keywords, **options)

    def _take(self) -> tuple[Sequence[Any], dict[str, Any]]:
        found = self.arguments, self.keywords
        del self.arguments, self.keywords
        return found


class SumPromise:
    """A sum that was put off, of tensors or a batch norm that was put off too; ``in_place`` if ``left`` is changed."""

    __slots__ = ("in_place", "left", "right")

    def __init__(self, left: Any, right: Any, in_place: bool) -> None:
        self.left, self.right, self.in_place = left, right, in_place

    def value(self) -> Any:
        left, right = map(now, self._take())
        if not self.in_place:
            return left + right
        left += right
        return left

    def activated(self, activation: Activation, apply: _Apply) -> Any:
        calls = ("add",) if self._has_tensors() else ("batch_norm", "add")
        name = fused_op(activation, *calls)
        if name is None:
            return apply(self.value())
        left, right = self._take()
        options = options_of(activation)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return getattr(FF, name)(left, right, **options)
        return right.added(left, name, options) if isinstance(left, Tensor) else left.added(right, name, options)

    def with_norm(self, norm: Any) -> None:
        return None

    def to_normalize(self) -> None:
        return None

    def _has_tensors(self) -> bool:
        return isinstance(self.left, Tensor) and isinstance(self.right, Tensor)

    def _take(self) -> tuple[Any, Any]:
        pair = self.left, self.right
        del self.left, self.right
        return pair


class ReLUPromise:
    """A ReLU behind ``promise`` that was put off as well, for a pooling that may come before it."""

    __slots__ = ("function", "promise")

    def __init__(self, function: Callable[[Any], Any], promise: LayerPromise) -> None:
        self.function, self.promise = function, promise

    def value(self) -> Any:
        return self.promise.activated(RELU, self.function)

    def activated(self, activation: Activation, apply: _Apply) -> Any:
        return apply(self.value())

    def with_norm(self, norm: Any) -> None:
        return None

    def to_normalize(self) -> None:
        return None

    def pooled(self, pool: nn.MaxPool2d) -> Any:
        input = self.promise.value()
        if not is_plain(input):
            return pool(self.function(input))
        return FF.relu_max_pool2d(input, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


_PROMISES: Final = (LayerPromise, FunctionPromise, SumPromise, ReLUPromise)


# What rewritten methods call ------------------------------------------------------------------------------------------


def hold(layer: Any, input: Any, *following: Any) -> Any:
    """``layer(input)``, or a promise of it. ``following``, if given, is what will be applied to it (see `_joins`)."""
    if is_plain(input) and (not following or joins(*following)):
        if (kind := layer_of(layer)) is not None:
            return LayerPromise(kind, layer, input, None)
        if (forward := forward_that_holds(layer)) is not None:
            return forward(layer, input)
    return layer(input)


def hold_keyword(layer: Any, *, input: Any) -> Any:
    """``layer(input=input)``, or a promise of it."""
    if is_plain(input) and (kind := layer_of(layer)) is not None:
        return LayerPromise(kind, layer, input, None)
    return layer(input=input)


def hold_function(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """``function(...)``, or a promise of it if that is a function of torch's that computes what a layer does."""
    if type(function) in (FunctionType, BuiltinFunctionType) and (op := LAYER_FUNCTIONS.get(function)) is not None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        if tensors and not overrides(*tensors):
            return FunctionPromise(op, function, arguments, keywords)
    return function(*arguments, **keywords)


def hold_sum(left: Any, right: Any) -> Any:
    """``left + right``, or a promise of it, where one of them may be a promise itself."""
    left, right = _summands(left, right)
    return SumPromise(left, right, in_place=False) if _may_wait(left) and _may_wait(right) else left + right


def hold_sum_by(function: Any, left: Any, right: Any) -> Any:
    """``function(left, right)``, or a promise of it if that is `torch.add`."""
    left, right = _summands(left, right) if function is torch.add else (now(left), now(right))
    if function is torch.add and _may_wait(left) and _may_wait(right):
        return SumPromise(left, right, in_place=False)
    return function(left, right)


def hold_sum_method(method: Any, right: Any) -> Any:
    """``method(right)``, or a promise of it if that is ``left.add`` of a tensor, or a layer of that name."""
    if torch.compiler.is_compiling():  # TorchDynamo knows no such method by itself
        return method(now(right))
    if type(method) is not BuiltinMethodType or method.__name__ != "add":
        return hold(method, now(right))
    left: Any = method.__self__
    left, right = _summands(left, right)
    return SumPromise(left, right, in_place=False) if _may_wait(left) and _may_wait(right) else method(right)


def hold_sum_in_place(left: Any, right: Any, is_fresh: bool) -> Any:
    """What ``left`` is after ``left += right``, or a promise of it, where one of them may be a promise itself.

    Fused, the sum is not written into ``left``. That goes unseen only where ``left`` is new memory that nothing else
    knows, as what a promise gives. A sum alone would gain nothing on the torch expression.
    """
    is_fresh = is_fresh or type(left) in _PROMISES
    left, right = _summands(left, right) if is_fresh else (now(left), now(right))
    if is_fresh and left is not right and _may_wait(left) and _may_wait(right):
        if type(left) in _PROMISES or type(right) in _PROMISES:
            return SumPromise(left, right, in_place=True)
        same = left.dtype is right.dtype and left.shape == right.shape
        if same and explain("add_relu", left, right).backend != "torch":
            return SumPromise(left, right, in_place=True)
    left, right = now(left), now(right)
    left += right
    return left


def _may_wait(value: Any) -> bool:
    return type(value) in _PROMISES or is_plain(value)


def _summands(left: Any, right: Any) -> tuple[Any, Any]:
    """Two summands, a promise only if it is of a batch norm whose result is laid out in memory as the other summand."""
    for promise, other in ((left, right), (right, left)):
        if type(promise) in _PROMISES:
            input = promise.to_normalize()
            if input is None or not is_plain(other) or other is input or not _is_alike(input, other):
                return now(left), now(right)
    return left, right


def _is_alike(input: Tensor, other: Tensor) -> bool:
    if input.shape != other.shape or input.dtype is not other.dtype or input.device != other.device:
        return False
    memory_format = memory_format_of(input)
    return input.is_contiguous(memory_format=memory_format) and other.is_contiguous(memory_format=memory_format)


def link(function: Any, value: Any, *following: Any) -> Any:
    """``function(value)``, or a promise of it, where ``value`` may be a promise itself."""
    if type(value) in _PROMISES:
        if type(function) is nn.Identity and untouched(function):
            return value
        activation = activation_of(function)
        if activation is not None:
            return value.activated(activation, function)
        if (folded := value.with_norm(function)) is not None:
            return folded
        value = value.value()
    return hold(function, value, *following)


def link_layer(function: Any, layer: Any, input: Any, *following: Any) -> Any:
    """``link(function, link(layer, input), *following)``. Nothing joins behind an activation: that needs no promise."""
    activation = activation_of(function) if is_plain(input) else None
    kind = None if activation is None else layer_of(layer)
    if activation is not None and kind is not None and fused_op(activation, kind.op) is not None:
        return _activated(activation, function, kind, layer, input)
    return link(function, link(layer, input, function), *following)


def apply(function: Any, value: Any, *options: Any, **keywords: Any) -> Any:
    """``function(value, ...)``, where ``value`` may be a promise. The result never is one."""
    if type(value) in _PROMISES:
        if (activation := activation_of(function, options, keywords)) is not None:
            if options or keywords:
                return value.activated(activation, lambda result: function(result, *options, **keywords))
            return value.activated(activation, function)
        folded = None if options or keywords else value.with_norm(function)
        if folded is not None:
            return folded.value()
        value = value.value()
    return function(value, *options, **keywords)


def join(function: Any, layer: Any, input: Any) -> Any:
    """``function(layer(input))``: `apply` and `hold` in one, which needs no promise for an activation."""
    if not is_plain(input) or not ((activation := activation_of(function)) is not None or evaluates(function)):
        return function(layer(input))
    kind = layer_of(layer)
    if kind is not None and activation is not None and fused_op(activation, kind.op) is not None:
        return _activated(activation, function, kind, layer, input)
    return apply(function, hold(layer, input))


def method(value: Any, name: str) -> Any:
    """``value.relu()``, ``value.sigmoid_()`` and so on, where ``value`` may be a promise."""
    if type(value) in _PROMISES:
        activation = (METHODS[name],)
        if not replaced(MODULE_OF[activation[0]]):
            return value.activated(activation, lambda result: getattr(result, name)())
        value = value.value()
    return getattr(value, name)()


def now(value: Any) -> Any:
    """``value`` itself, or what it promises."""
    return value.value() if type(value) in _PROMISES else value


def past(value: Any, function: Any) -> Any:
    """``value`` as it may go on before a call of ``function``: a promise only past what does nothing."""
    return value if type(function) is nn.Identity and untouched(function) else now(value)


def run_what_waited(error: Exception) -> None:
    """Run the calls that were put off over the statement that raised ``error``: Python would have run them before it.

    A batch norm updates its statistics then, and an error of such a call is the one that is raised.
    """
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for name, value in list(frame.f_locals.items()):
            promise = value.promise if type(value) is ReLUPromise else value
            waits = type(promise) in _PROMISES and any(hasattr(promise, own) for own in ("input", "arguments", "left"))
            if waits and name.startswith("_fastops_held_"):
                promise.value()


def is_there(value: Any) -> bool:
    """Whether ``value`` is no promise."""
    return type(value) not in _PROMISES


def shown(value: Any, before: Any) -> Any:
    """What the user's variable is while ``value`` may be a promise: then what it was before."""
    return before if type(value) in _PROMISES else value


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


def mark(function: Any, value: Any) -> tuple[Any, bool]:
    """``function(value)`` or a promise of it, and whether that is new memory that nothing else knows."""
    fresh = is_fresh(function)
    value = link(function, value)
    return value, fresh or type(value) in _PROMISES


def chain(functions: Iterable[Any], value: Any) -> Any:
    """What ``for f in functions: value = f(value)`` makes of ``value``, or a promise of it."""
    kind = type(functions)
    if kind in (list, tuple) or getattr(kind, "__iter__", None) in (nn.ModuleList.__iter__, nn.Sequential.__iter__):
        for function in functions:
            value = _link_in_row(function, value)
        return value
    for function in functions:  # whatever makes them may have effects, for which no call can wait
        value = function(now(value))
    return value


def _link_in_row(function: Any, value: Any) -> Any:
    """As `link`. A ReLU waits for a pooling where it would be a pass over memory of its own: that leaves it less."""
    if type(value) is ReLUPromise and is_pool(function):
        return value.pooled(function)
    waits = type(value) is LayerPromise and value.kind.op in _PLANES and on_plain_cpu(value.input)
    return ReLUPromise(function, value) if waits and activation_of(function) == RELU else link(function, value)


_PLANES: Final = ("conv2d", "batch_norm")  # what gives images


def sequential_forward(self: nn.Sequential, input: Any) -> Any:
    """`torch.nn.Sequential.forward`, which sees what comes next."""
    return now(chain(self, input))


HELPERS: Final[dict[str, Callable[..., Any]]] = {
    f"_fastops_{helper.__name__}": helper
    for helper in (
        *(hold, hold_keyword, hold_function, hold_sum, hold_sum_by, hold_sum_method, hold_sum_in_place),
        *(link, link_layer, apply, join, method, now, past, is_there, shown, mark, chain, user_class),
    )
}


def _run(function: Any, *arguments: Any, **keywords: Any) -> Any:
    return function(*map(now, arguments), **keywords)


# For methods of a module that `fastops.swap` was not to include: their own functions and sums wait for nothing.
HELPERS_FOR_LAYERS: Final[dict[str, Callable[..., Any]]] = HELPERS | {
    "_fastops_hold_function": _run,
    "_fastops_hold_sum": partial(_run, operator.add),
    "_fastops_hold_sum_by": _run,
    "_fastops_hold_sum_method": lambda method, right: hold(method, now(right)),
    "_fastops_hold_sum_in_place": lambda left, right, _: _run(operator.iadd, left, right),
}


def _passes_saved(layer: Any) -> float:
    """Over its input, at most, by a convolution or a batch norm and its activation in one kernel on a GPU."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return conv.PASSES * layer.out_channels / max(layer.in_channels, 1)
    return batch_norm.PASSES


def _activated(activation: Activation, apply: _Apply, kind: Layer, layer: Any, input: Tensor) -> Any:
    # A convolution or a batch norm: new memory.
    if kind.with_options is not None and is_left_to_torch(input, _passes_saved(layer) if input.is_cuda else 0):
        output = kind.original.forward(layer, input)
        return output.relu_() if activation == RELU else apply(output)
    own = layer._parameters  # past `nn.Module.__getattr__`, unless they are computed
    weight = own["weight"] if "weight" in own else layer.weight  # noqa: SIM401  (looked up only then)
    bias = own["bias"] if "bias" in own else layer.bias  # noqa: SIM401
    if (type(weight) is not nn.Parameter and overrides(weight)) or (type(bias) is not nn.Parameter and overrides(bias)):
        if isinstance(layer, nn.Linear):
            return apply(torch.nn.functional.linear(input, weight, bias))
        if isinstance(layer, nn.modules.conv._ConvNd):
            return apply(layer._conv_forward(input, weight, bias))
        return apply(layer(input))
    return kind.run(layer, activation, input, weight, bias)
