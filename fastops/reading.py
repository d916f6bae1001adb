"""Reads the calls in the methods of a module, for `fastops.report`: which of them are fused, and why not the rest.

Which calls are fused is decided when they run, by what their callables are then. A call of ``self.conv1`` can be judged
beforehand: the layer is there, with its hooks. What a loop or a variable calls shows only when it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from . import nn as fnn
from .callsites import UNKNOWN, Call, Site, tail
from .choice import NOT_INCLUDED
from .fusions import COUNTERPARTS, LAYER_FUNCTIONS, LAYERS, NORMS, SIGNATURES, activation_of_module, fused_op
from .kernels.activation import Activation
from .ops.activations import METHODS, MODULES, activation_of
from .promises import is_fresh
from .recognition import LEFT_ALONE, plain_class, untouched
from .source import LeftAlone
from .swap import hides_an_activation, is_users, layer_class, rewritten_method, site_class, swapped_class

RELUS, OTHERS, NORM_LAYERS = "ReLUs", "other activations", "batch norms"
_AGAIN: Final = "the model was changed since it was swapped: swap again"


class Finding(NamedTuple):
    """What is to be said of one call, or with no ``group`` of a whole method.

    ``place`` is the path, inside of the module, that it is listed at; ``layers`` are those that it is fused with.
    """

    name: str
    outcome: str
    place: str | None = None
    kind: str = ""
    done: bool = False
    group: str = ""
    layers: frozenset[nn.Module] = frozenset()


class _Result(NamedTuple):
    """What a call in the source gives: of a module, of a function or a sum with an ``op``, or of something unknown."""

    name: str
    module: nn.Module | None = None
    known: bool = True
    obstacle: str = ""  # to fusing a sum
    op: str = ""


def findings(module: nn.Module) -> Iterator[Finding]:
    """Every call of an activation or of a swapped batch norm in the methods of ``module``; which were not read."""
    user: Any = plain_class(type(module))
    known = any(isinstance(child, (*MODULES, *COUNTERPARTS)) for child in module.modules() if not is_scripted(child))
    relevant = known or module._parameters  # functions may be applied to these
    if not relevant or (not is_users(user) and user is not nn.Sequential and next(module.children(), None) is None):
        return
    if "forward" in module.__dict__:
        if next(module.children(), None) is not None:
            yield Finding("", "not looked into: its forward was replaced on the object")
        return
    reader = _Reader(module)
    if not is_users(user) and user is not nn.Sequential and next(module.children(), None) is not None:
        if user.forward is not nn.Module.forward:
            yield Finding("", f"not looked into: its class {user.__name__} comes from torch")
        return
    try:
        site_class(user)
    except LeftAlone as reason:
        yield Finding("", f"not looked into: {reason}")
        return
    if user.forward is nn.Sequential.forward:
        yield from reader.sequential()
    seen: dict[str, set[str]] = {}
    for kind in user.__mro__:
        for name in vars(kind) if is_users(kind) else ():
            if name in seen and "super" not in seen[name]:
                continue  # a method that no other calls
            method = vars(kind)[name]
            seen[name] = set(method.__code__.co_names) if isinstance(method, FunctionType) else set()
            yield from reader.method(kind, name)


def fused_layers(model: nn.Module) -> dict[int, str]:
    """What is to be shown of the layers in ``model`` that are fused with what is behind them, by id."""
    found = dict[int, dict[str, None]]()
    for module in model.modules():
        for finding in () if is_scripted(module) else findings(module):
            for layer in finding.layers:
                found.setdefault(id(layer), {})[finding.kind] = None
    return {layer: f"fused with {' or '.join(kinds)}" for layer, kinds in found.items()}


class _Reader:
    """Judges the calls in the methods of one module by what its attributes are now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.paths = {id(m): path for path, m in reversed(list(module.named_modules())) if path}
        made_of = vars(type(module)).get("_fastops_made_of", (True,))
        self.functions_obstacle = "" if made_of[-1] else f"{type(module).__name__} is {NOT_INCLUDED}"

    def method(self, kind: type, name: str) -> Iterator[Finding]:
        try:
            found = rewritten_method(kind, name)
        except LeftAlone as reason:
            if name == "forward" or (not name.startswith("__") and _may_call(vars(kind)[name])):
                yield Finding("" if name == "forward" else name, f"{name} was not looked into: {reason}")
            return
        if found is None:
            return
        method = vars(kind)[name]
        obstacle = self.obstacle(kind, name) if found.code is not None else ""
        for site in found.sites:
            yield from self.site(site, method, obstacle)

    def obstacle(self, kind: type, name: str) -> str:
        """Why the rewritten method is not what runs, or nothing."""
        ours = [c for c in type(self.module).__mro__ if vars(c).get("_fastops_user_class") is kind]
        if not ours:
            return self.module.__dict__.get(LEFT_ALONE, "fastops.swap would fuse it")
        return "" if vars(ours[0])["_fastops_made_of"][1].get(name) is vars(kind)[name] else _AGAIN

    def sequential(self) -> Iterator[Finding]:
        """The calls of `torch.nn.Sequential.forward`: each module is applied to the result of the one before."""
        obstacle = self.obstacle(nn.Sequential, "forward")
        result = _Result("the input")
        for name, module in self.module._modules.items():
            if module is not None:
                yield from self.judge(name, module, [result], f"its input is {result.name}, not a layer", obstacle)
                result = self.applied(name, module, [result])

    def site(self, site: Site, method: FunctionType, obstacle: str) -> Iterator[Finding]:
        first = method.__code__.co_varnames[:1]
        look = _Look(self.module, first[0] if first else "", method)
        if site.unrolled:
            where = f"{method.__name__} over {ast.unparse(site.argument)}"
            yield Finding(where, f"the loop in line {site.line} is decided when it runs")
            return
        function: Any = _TENSOR_METHODS[site.name] if site.function is None else look.up(site.function)
        inputs = [self.result(call, look) for call in site.inputs]
        name = self.name_of(function, site.function)
        if function is UNKNOWN:
            if inputs and inputs[0].module is not None and _is_layer(inputs[0].module):
                yield Finding(
                    f"{name}({inputs[0].name})", f"what {name} is in line {site.line} is decided when it runs"
                )
        elif hides_an_activation(function):
            yield Finding(f"{name}(..)", f"{name} was not looked into: it is a function outside of a class")
        else:
            argument = look.up(site.argument.func) if isinstance(site.argument, ast.Call) else UNKNOWN
            made = self.name_of(argument, site.argument)
            reason = f"its input is {made}, not a layer" if site.reason.endswith("not a layer") else site.reason
            yield from self.judge(name, function, inputs, reason, obstacle, made)

    def name_of(self, value: object, node: ast.AST | None) -> str:
        return self.paths.get(id(value)) or tail(node)

    def result(self, call: Call, look: _Look) -> _Result:
        if call.function is None:
            made = [self.result(maker, look) for maker in call.inputs]
            old = [result for result in made if result.module is None or not _is_fresh(result.module)]
            left = old[0].module.__dict__.get(LEFT_ALONE) if old and old[0].module is not None else None
            why = f"the sum is written into what {old[0].name} gives, which may be seen elsewhere" if old else ""
            why = why if left is None else f"{old[0].name} is {left}"
            return _Result("the sum", obstacle=why, op="add")
        function = look.up(call.function)
        name = self.name_of(function, call.function)
        if any(function is each for each in LAYER_FUNCTIONS):
            return _Result(name, op=LAYER_FUNCTIONS[function])
        if function is UNKNOWN:
            return _Result(name, known=False)
        return self.applied(name, function, [self.result(made, look) for made in call.inputs])

    def applied(self, name: str, function: object, inputs: list[_Result]) -> _Result:
        if type(function) is nn.Identity and untouched(function) and inputs:
            return inputs[0]
        module = function if isinstance(function, nn.Module) else None
        if isinstance(module, nn.Sequential) and module._modules and _holds(module):
            last, child = next(reversed(module._modules.items()))
            return self.applied(self.paths.get(id(child), f"{name}.{last}"), child, [_Result(name)])
        return _Result(name, module, known=module is None or not _holds(module))

    def judge(
        self, name: str, function: object, inputs: list[_Result], reason: str, obstacle: str, made: str = ""
    ) -> Iterator[Finding]:
        """What becomes of ``function`` applied to a call that gives one of ``inputs``."""
        if isinstance(function, nn.Module) and _is_norm(function):
            reason = function.__dict__.get(LEFT_ALONE) or (_fold_reason(function, inputs[0]) if inputs else reason)
            reason = reason or obstacle
            outcome = f"not folded: {reason}"
            if not reason:
                outcome = f"folded into {inputs[0].name} in evaluation without gradients"
            yield Finding(name, outcome, name, plain_class(type(function)).__name__, not reason, NORM_LAYERS)
            return
        activation = _activation(function)
        if activation is None:
            return
        is_module, kind = isinstance(function, nn.Module), _kind(activation)
        reasons = [self.fuse_reason(name, function, activation, result) for result in inputs]
        good = [result for result, why in zip(inputs, reasons, strict=True) if not why]
        if good:
            reason = ""
        elif reasons:
            reason = reasons[0]
        reason = reason or obstacle
        into = " or ".join(dict.fromkeys(result.name for result in good))
        outcome = f"not fused: {reason}" if reason else f"fused with {into}"
        if not reason and len(good) < len(inputs):
            outcome += " where that comes before it"
        if is_module:
            place: str | None = name
        else:
            input = inputs[0] if inputs else None
            inner = input.name if input is not None else made
            path = None if input is None or input.module is None else self.paths.get(id(input.module))
            name, place = f"{activation[0]}({inner.removeprefix('the ')})", path
        layers = frozenset(r.module for r in good if r.module is not None)
        group = group_of(activation[0])
        yield Finding(name, outcome, place, kind, not reason, group, frozenset() if reason else layers)

    def fuse_reason(self, name: str, function: object, activation: Activation, input: _Result) -> str:
        if isinstance(function, nn.Module) and type(function) not in MODULES:
            return f"its class {type(function).__name__} may compute something else"
        if isinstance(function, nn.Module) and LEFT_ALONE in function.__dict__:
            return str(function.__dict__[LEFT_ALONE])
        if isinstance(function, nn.Module) and not untouched(function):
            return f"{name} has hooks or a replaced forward"
        if isinstance(function, nn.Module) and activation_of_module(function) is None:
            return f"{name} has options that no kernel takes"
        if not input.known:
            return f"what {input.name} is shows only when it runs"
        module, op = input.module, input.op
        if module is not None and _is_layer(module):
            known = layer_class(type(module))
            assert known is not None
            op = LAYERS[COUNTERPARTS[known].forward].op
        if op and fused_op(activation, op) is None:
            return f"its input is {input.name}, and {_kind(activation)} has no kernel with {op}"
        if input.op:
            return input.obstacle or self.functions_obstacle
        if module is None:
            return f"its input is {input.name}, not a layer"
        if not _is_layer(module):
            return f"its input is {input.name}, a {plain_class(type(module)).__name__}, which has no fused form"
        if LEFT_ALONE in module.__dict__:
            return f"{input.name} is {module.__dict__[LEFT_ALONE]}"
        if not untouched(module):
            return f"{input.name} has hooks or a replaced forward"
        if type(module).forward in LAYERS:
            return ""
        if getattr(fnn, type(module).__name__, None) is type(module):
            return f"{input.name} is a {type(module).__name__}, which has its activation already"
        try:
            swapped_class(module)
        except LeftAlone as reason:
            return f"{input.name} is not swapped: {reason}"
        swapped = "_fastops_user_class" in vars(type(self.module))
        return f"{input.name} is not swapped: swap again" if swapped else "fastops.swap would fuse it"


_TENSOR_METHODS: Final = {name: getattr(torch, name) for name in METHODS}


def _activation(function: object) -> Activation | None:
    """The activation that ``function``, or what it is derived from, is by its name."""
    if isinstance(function, nn.Module):
        name = next((name for kind, name in MODULES.items() if isinstance(function, kind)), None)
        return None if name is None else activation_of_module(function) or activation_of(name, {})
    name = next((name for known, (name, _) in SIGNATURES.items() if known is function), None)
    return None if name is None or function is nn.functional.hardtanh else activation_of(name, {})


def _kind(activation: Activation) -> str:
    name = activation[0].removesuffix("_tanh")
    return next(kind.__name__ for kind, known in MODULES.items() if known == name)


def _holds(module: nn.Module) -> bool:
    """Whether what it returns may be fused with what its caller applies to that."""
    return hasattr(getattr(type(module), "forward", None), "_fastops_holds") and untouched(module)


def _is_layer(module: nn.Module) -> bool:
    known = layer_class(type(module))
    return known is not None and COUNTERPARTS[known].forward in LAYERS and type(module).forward not in _WITH_RELU


_WITH_RELU: Final = tuple(cls.forward for name, cls in vars(fnn).items() if "ReLU" in name)


def _is_fresh(module: nn.Module) -> bool:
    """Whether its result is new memory, now or once it is swapped."""
    return is_fresh(module) or (_is_layer(module) and untouched(module))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, tuple(NORMS)) and (type(module).forward in LAYERS or LEFT_ALONE in module.__dict__)


def _fold_reason(norm: nn.Module, input: _Result) -> str:
    """Why the batch norm does not run as part of what its input comes from, or nothing."""
    module = input.module
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if module is None or not isinstance(module, nn.modules.conv._ConvNd):
        return f"its input is {input.name}, not a convolution"
    for each, name in ((module, input.name), (norm, "it")):
        if LEFT_ALONE in each.__dict__:
            return f"{name} is {each.__dict__[LEFT_ALONE]}"
        if not untouched(each):
            return f"{name} has hooks or a replaced forward"
    return "" if type(module).forward in LAYERS else f"{input.name} is not swapped: swap again"


class _Look(NamedTuple):
    """Finds what an expression of a method of ``module`` is, without running any code of a class."""

    module: nn.Module
    self_name: str
    method: Any  # a function; mypy would take the attribute for a bound one

    def up(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id == self.self_name:
                return self.module
            known = node.id in self.method.__code__.co_names
            return self.method.__globals__.get(node.id, UNKNOWN) if known else UNKNOWN
        if isinstance(node, ast.Attribute):
            owner = self.up(node.value)
            if isinstance(owner, nn.Module):
                return self.attribute(owner, node.attr)
            return getattr(owner, node.attr, UNKNOWN) if isinstance(owner, ModuleType) else UNKNOWN
        if isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Constant, ast.UnaryOp)):
            owner = self.up(node.value)
            with suppress(LookupError, TypeError, ValueError):
                if type(owner) in (list, tuple, dict, nn.ModuleList, nn.ModuleDict) or isinstance(owner, nn.Sequential):
                    return owner[ast.literal_eval(node.slice)]
        return UNKNOWN

    @staticmethod
    def attribute(owner: nn.Module, name: str) -> Any:
        for table in (owner.__dict__, owner._modules):
            if name in table:
                return table[name]
        for kind in type(owner).__mro__:
            if name in vars(kind):
                found = vars(kind)[name]
                found = found.__func__ if isinstance(found, staticmethod) else found
                is_method = isinstance(found, FunctionType) and vars(kind)[name] is found
                return "a method" if is_method else found if callable(found) else UNKNOWN
        return UNKNOWN


def _may_call(function: object) -> bool:
    """Whether there could be a ReLU in a function that was not read."""
    function = getattr(function, "__func__", getattr(function, "__wrapped__", function))
    code = getattr(function, "__code__", None)
    return code is not None and any("relu" in n.lower() or "act" in n.lower() for n in code.co_names)


def group_of(activation: str) -> str:
    return RELUS if activation == "relu" else OTHERS


def is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)
