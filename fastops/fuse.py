"""Traces with their ReLUs fused, and the classes that run them.

Where the output of a layer goes into a ReLU and nowhere else, a trace calls both at once. The class of the module that
was traced gives way to a subclass that runs the trace as long as that does what ``forward`` would do, and ``forward``
itself otherwise.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import linecache
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional as FF
from . import nn as fnn
from .trace import Assumptions, LeftAlone, Tracer, in_place, trace

# What takes the place of what: one line for each layer.
COUNTERPARTS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Linear: fnn.Linear,
    nn.MSELoss: fnn.MSELoss,
    nn.CrossEntropyLoss: fnn.CrossEntropyLoss,
}
# Which layers run in one call with the ReLU behind them, known by their forward: parametrized layers share it.
WITH_RELU: Final[dict[Callable[..., Any], Callable[[Any, Tensor], Tensor]]] = {
    fnn.Linear.forward: lambda layer, input: FF.linear_relu(input, layer.weight, layer.bias),
}
ORIGINALS: Final = {swapped: original for original, swapped in COUNTERPARTS.items()}

_RELU_FUNCTIONS: Final = (F.relu, torch.relu, torch.relu_, F.relu_, torch.ops.aten.relu.default)


def plain_class(found: type) -> type:
    """The class that the user wrote, or torch's, for a class that `swap` gave to a module."""
    original: type = vars(found).get("_fastops_user_class") or ORIGINALS.get(found, found)
    return original


@dataclass(frozen=True)
class Site:
    """One call of a ReLU in a traced ``forward``.

    ``relu`` is the path of the ReLU module, None for a function; ``input`` names what it is applied to; ``layer`` is
    the path of the layer that it is fused with, None if it is not, and then ``reason`` says why.
    """

    relu: str | None
    input: str
    layer: str | None
    reason: str = ""


@dataclass(frozen=True)
class Trace:
    """A ``forward`` with its ReLUs fused, and what must hold for it to be right."""

    source: str
    namespace: dict[str, Any]
    sites: tuple[Site, ...]
    assumptions: Assumptions
    run: Callable[..., Any] = field(compare=False)


class _Fused(nn.Module):
    """What the class of a fused module has before the methods of the user's class."""

    _fastops_user_class: ClassVar[type]
    _fastops_traces: ClassVar[tuple[Trace, ...]]

    def __init_subclass__(cls) -> None:
        """Keep the user's ``__init_subclass__`` from seeing a class that the user did not write."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the user's class: the file does not depend on the trace."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *state = reduced
        user = self._fastops_user_class
        arguments = tuple(user if argument is type(self) else argument for argument in arguments)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = _new
        return (user if function is type(self) else function, arguments, *state)

    def __copy__(self) -> Any:
        return _copied(self, copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copied(self, lambda module: copy.deepcopy(module, memo))


def _new(user_class: Any, *arguments: object) -> Any:
    return user_class.__new__(user_class, *arguments)


def _copied(module: Any, copier: Callable[[Any], Any]) -> Any:
    """Copy ``module`` as its own class would, then fuse the copy as the original is."""
    fused = type(module)
    user = fused._fastops_user_class
    object.__setattr__(module, "__class__", user)
    try:
        twin = copier(module)
    finally:
        object.__setattr__(module, "__class__", fused)
    if type(twin) is user:
        object.__setattr__(twin, "__class__", fused)
    return twin


def fused_class(user_class: type, traces: tuple[Trace, ...]) -> type:
    """A subclass of ``user_class`` under its name that runs ``traces``: the same one for equal traces."""
    subclasses: list[type] = type.__subclasses__(user_class)
    for known in subclasses:
        if vars(known).get("_fastops_traces") == traces:
            return known
    original: Callable[..., Any] = user_class.forward  # type: ignore[attr-defined]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if user_class.forward is original:  # type: ignore[attr-defined]
            for trace in traces:
                if trace.assumptions.accept(args, kwargs) and trace.assumptions.hold(self):
                    return trace.run(self, *args, **kwargs)
        return user_class.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    # torch.compile keeps its results by code object, a limited number for each: every class needs its own.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
    namespace = {
        "__slots__": (),
        "__module__": user_class.__module__,
        "__qualname__": user_class.__qualname__,
        "__doc__": user_class.__doc__,
        "forward": forward,
        "_fastops_user_class": user_class,
        "_fastops_traces": traces,
    }
    # Not the metaclass of the user, only its type: making this class is not the user's business.
    return type.__new__(type(user_class), user_class.__name__, (_Fused, user_class), namespace)


def trace_to_fuse(module: nn.Module) -> list[Tracer]:
    """The traces of ``module`` if they fuse anything."""
    if not any(type(child).forward in WITH_RELU for child in module.modules()):
        return []
    try:
        tracers = traced(module)
    except LeftAlone:
        return []
    return tracers if any(site.layer for tracer in tracers for site in sites_of(tracer)) else []


def traced(module: nn.Module) -> list[Tracer]:
    """The traces of ``module``: none if it has no ``forward`` that calls children.

    Raises:
        LeftAlone: if a trace could not stand in for its ``forward``.
    """
    found = type(module)
    if next(module.children(), None) is None or found.forward is nn.Module.forward:
        return []
    if "forward" in module.__dict__:
        raise LeftAlone("its forward was replaced on the object")
    if found.__module__.startswith("torch.") and found is not nn.Sequential:
        raise LeftAlone(f"its class {found.__name__} comes from torch, which may not call forward as written")
    return trace(module)


def _relu_of(node: fx.Node, root: nn.Module) -> tuple[str | None, bool, fx.Node] | None:
    """If ``node`` applies a ReLU: the path of the ReLU module or None, whether it works in place, and its input."""
    path, replaces = None, False
    if node.op == "call_module":
        relu = root.get_submodule(str(node.target))
        if type(relu) is not nn.ReLU:
            return None
        path = str(node.target)
    elif node.op == "call_method" and node.target in ("relu", "relu_"):
        replaces = node.target == "relu_"
    elif node.op == "call_function" and node.target in _RELU_FUNCTIONS:
        flag = node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace")
        replaces = node.target in (torch.relu_, F.relu_) or flag is True
    else:
        return None
    input = node.args[0] if node.args else node.kwargs.get("input")
    return (path, replaces, input) if isinstance(input, fx.Node) else None


def sites_of(tracer: Tracer) -> list[Site]:
    return [site for site, _, _ in _relus(tracer)]


def _relus(tracer: Tracer) -> Iterator[tuple[Site, fx.Node, bool]]:
    """Every ReLU of a trace, the node that applies it and whether it replaces its input in place."""
    root = tracer.root
    assert isinstance(root, nn.Module)
    for node in tracer.graph.nodes:
        relu = _relu_of(node, root)
        if relu is None:
            continue
        path, replaces, input = relu
        name = getattr(input.target, "__name__", str(input.target))
        if input.target is in_place:
            name = str(input.args[0])
        reason = _reason_not_fused(input, name, root)
        yield Site(path, name, None if reason else name, reason), node, replaces


def _reason_not_fused(input: fx.Node, name: str, root: nn.Module) -> str:
    if input.op != "call_module":
        return f"its input is {name}, not a layer"
    layer = root.get_submodule(name)
    if type(layer).forward not in WITH_RELU and COUNTERPARTS.get(type(layer), type(layer)).forward not in WITH_RELU:
        return f"its input is {name}, a {type(layer).__name__}, which has no fused form"
    if len(input.users) > 1:
        return f"the output of {name} is used elsewhere too"
    if len(input.args) + len(input.kwargs) != 1 or (input.kwargs and "input" not in input.kwargs):
        return f"{name} is not called with one input"
    return ""


def compile_trace(tracer: Tracer, user_class: type) -> Trace:
    """The trace with its ReLUs fused, as Python code."""
    graph, sites = tracer.graph, []
    for site, node, replaces in list(_relus(tracer)):
        sites.append(site)
        if site.layer is None:
            continue
        layer_call = node.all_input_nodes[0]
        (input,) = (*layer_call.args, *layer_call.kwargs.values())
        # At the place of the layer: its input may be changed in place between the layer and the ReLU.
        with graph.inserting_before(layer_call):
            layer = _child(graph, site.layer)
            relu = None if site.relu is None else _child(graph, site.relu)
            fused = graph.call_function(_layer_relu, (layer, input, relu, replaces))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(layer_call)
    for node in graph.find_nodes(op="call_module"):
        with graph.inserting_before(node):
            called = graph.call_method("__call__", (_child(graph, str(node.target)), *node.args), node.kwargs)
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    code = graph.python_code("self")
    filename = f"<fastops trace of {user_class.__qualname__} {hash(code.src):x}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    return Trace(code.src, code.globals, tuple(sites), tracer.assumptions(plain_class), namespace["forward"])


def _child(graph: fx.Graph, path: str) -> fx.Node:
    """The child at ``path``, from the dictionary of children: looking it up as an attribute takes longer."""
    owner, _, name = path.rpartition(".")
    children = graph.create_node("get_attr", f"{owner}._modules" if owner else "_modules")
    return graph.call_function(operator.getitem, (children, name))


def _layer_relu(layer: Any, input: Tensor, relu: nn.Module | None, replaces: bool) -> Any:
    """``relu(layer(input))`` in one call, or in two where something else could see the step between."""
    fused = WITH_RELU.get(type(layer).forward)
    if fused is not None and untouched(layer) and (relu is None or (type(relu) is nn.ReLU and untouched(relu))):
        return fused(layer, input)
    output = layer(input)
    if relu is not None:
        return relu(output)
    return torch.relu_(output) if replaces else torch.relu(output)


def untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but run the forward of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or type(module).__call__ is not nn.Module.__call__
        or _has_any_global_hook()
    )
