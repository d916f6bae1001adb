"""Traces with their ReLUs fused, and the classes that run them.

Where the output of a layer, or a sum, goes into a ReLU and nowhere else, a trace calls both at once; on request also a
convolution and the batch norm behind it. The class of the module that was traced gives way to a subclass that runs the
trace as long as that does what ``forward`` would do, and ``forward`` itself otherwise.
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
from .dispatch import explain
from .fold import BATCH_NORMS, folded_weights
from .fusions import COUNTERPARTS, RELU_FUNCTIONS
from .nn.conv import convolved
from .trace import Assumptions, LeftAlone, Tracer, in_place, trace

# How layers run with given weights, without and with a ReLU behind them, known by their forward: parametrized layers
# share it.
_Run = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
WITH_RELU: Final[dict[Callable[..., Any], tuple[_Run, _Run]]] = {
    fnn.Linear.forward: (lambda _, x, w, b: FF.linear(x, w, b), lambda _, x, w, b: FF.linear_relu(x, w, b)),
    fnn.Conv1d.forward: (lambda *a: convolved(FF.conv1d, *a), lambda *a: convolved(FF.conv_relu1d, *a)),
    fnn.Conv2d.forward: (lambda *a: convolved(FF.conv2d, *a), lambda *a: convolved(FF.conv_relu2d, *a)),
    fnn.Conv3d.forward: (lambda *a: convolved(FF.conv3d, *a), lambda *a: convolved(FF.conv_relu3d, *a)),
}
ORIGINALS: Final = {swapped: original for original, swapped in COUNTERPARTS.items()}


def plain_class(found: type) -> type:
    """The class that the user wrote, or torch's, for a class that `swap` gave to a module."""
    original: type = vars(found).get("_fastops_user_class") or ORIGINALS.get(found, found)
    return original


@dataclass(frozen=True)
class Site:
    """One call of a ReLU or a batch norm in a traced ``forward``.

    ``module`` is its path, None for a function; ``input`` names what it is applied to; ``layer`` is the path of the
    layer that it runs with, None for a sum, and ``norm`` that of the batch norm between the two. If it runs on its own,
    ``reason`` says why.
    """

    module: str | None
    input: str
    layer: str | None = None
    norm: str | None = None
    reason: str = ""
    is_norm: bool = False


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


def trace_to_fuse(module: nn.Module, fold: bool) -> list[Tracer]:
    """The traces of ``module`` if they fuse anything. ``fold``: batch norms too."""
    if not any(type(child).forward in WITH_RELU for child in module.modules()):
        return []
    try:
        tracers = traced(module)
    except LeftAlone:
        return []
    return tracers if any(not site.reason for tracer in tracers for site in sites_of(tracer, fold)) else []


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
    elif node.op == "call_function" and node.target in RELU_FUNCTIONS:
        flag = node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace")
        replaces = node.target in (torch.relu_, F.relu_) or flag is True
    else:
        return None
    input = node.args[0] if node.args else node.kwargs.get("input")
    return (path, replaces, input) if isinstance(input, fx.Node) else None


def sites_of(tracer: Tracer, fold: bool = False) -> list[Site]:
    """Every ReLU of a trace and, with ``fold``, every batch norm."""
    return [site for site, _, _ in _calls(tracer, fold)]


def _calls(tracer: Tracer, fold: bool) -> Iterator[tuple[Site, fx.Node, bool]]:
    """The sites of a trace, the node of each call and whether it replaces its input in place."""
    root = tracer.root
    assert isinstance(root, nn.Module)
    norms: dict[fx.Node, str] = {}  # those that are folded, and into what
    for node in tracer.graph.nodes:
        if fold and _module_of(node, root, *BATCH_NORMS) is not None:
            input = node.all_input_nodes[0]
            name = _name_of(input)
            reason = _reason_not_fused(input, name, root, nn.modules.conv._ConvNd)
            if not reason:
                norms[node] = name
            yield Site(str(node.target), name, None if reason else name, reason=reason, is_norm=True), node, False
        relu = _relu_of(node, root)
        if relu is None:
            continue
        path, replaces, input = relu
        name = _name_of(input)
        if input in norms and len(input.users) == 1:
            yield Site(path, name, norms[input], norm=name), node, replaces
        elif len(input.users) == 1 and _summands(input, root) is not None:
            yield Site(path, name), node, replaces
        else:
            reason = _reason_not_fused(input, name, root)
            yield Site(path, name, None if reason else name, reason=reason), node, replaces


def _name_of(node: fx.Node) -> str:
    if node.target is in_place:
        return str(node.args[0])
    return getattr(node.target, "__name__", str(node.target))


def _module_of(node: fx.Node, root: nn.Module, *classes: type) -> nn.Module | None:
    """The module that ``node`` calls, if it is of just one of these classes."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if type(module) in classes else None


def _summands(node: fx.Node, root: nn.Module) -> tuple[fx.Node, fx.Node, str | None] | None:
    """If ``node`` adds two values: both, and where it adds to the first in place the path of the layer that made it.

    In place that counts only if nothing else can see the first value: a new result of a layer, used here alone.
    """
    arguments: tuple[Any, ...] = node.args
    replaces = (node.op, node.target) == ("call_method", "add_")
    if node.target is in_place and arguments[0] == "iadd":
        arguments, replaces = arguments[1:], True
    elif node.target not in ((operator.add, torch.add) if node.op == "call_function" else ("add", "add_")):
        return None
    if node.kwargs or len(arguments) != 2 or not all(isinstance(argument, fx.Node) for argument in arguments):
        return None
    left, right = arguments
    if not replaces:
        return left, right, None
    is_new = _module_of(left, root, *BATCH_NORMS, *COUNTERPARTS, *ORIGINALS) is not None
    return (left, right, str(left.target)) if is_new and len(left.users) == 1 and left is not right else None


def _reason_not_fused(input: fx.Node, name: str, root: nn.Module, kind: type[nn.Module] = nn.Module) -> str:
    """Why the layer that makes ``input`` cannot run together with what is applied to it; empty if it can."""
    if input.op != "call_module":
        return f"its input is {name}, not a layer"
    layer = root.get_submodule(name)
    forward = COUNTERPARTS.get(type(layer), type(layer)).forward
    if forward not in WITH_RELU or not isinstance(layer, kind):
        return f"its input is {name}, a {plain_class(type(layer)).__name__}, which has no fused form"
    if len(input.users) > 1:
        return f"the output of {name} is used elsewhere too"
    if len(input.args) + len(input.kwargs) != 1 or (input.kwargs and "input" not in input.kwargs):
        return f"{name} is not called with one input"
    return ""


def compile_trace(tracer: Tracer, user_class: type, fold: bool) -> Trace:
    """The trace with its ReLUs fused, and with ``fold`` its batch norms folded, as Python code."""
    graph, root = tracer.graph, tracer.root
    assert isinstance(root, nn.Module)
    calls = list(_calls(tracer, fold))
    merged: set[fx.Node] = set()
    for site, node, replaces in reversed(calls):  # a ReLU first, then what it was merged with
        if site.reason or node in merged:
            continue
        (input, *_) = node.all_input_nodes
        relu = None if site.module is None or site.is_norm else site.module
        if site.layer is None:
            operands = _summands(input, root)
            assert operands is not None
            *summands, producer = operands
            _replace(graph, [node, input], _add_relu, [producer, relu], [*summands, replaces])
        elif site.norm is not None or site.is_norm:
            nodes = [node] if site.is_norm else [node, input]
            layer_call = nodes[-1].all_input_nodes[0]
            norm = site.module if site.is_norm else site.norm
            tail = [not site.is_norm, replaces]
            merged.update(nodes)
            _replace(
                graph, [*nodes, layer_call], _layer_norm_relu, [site.layer, norm, relu], [_input_of(layer_call), *tail]
            )
        else:
            _replace(graph, [node, input], _layer_relu, [site.layer, relu], [_input_of(input), replaces])
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
    sites = tuple(site for site, _, _ in calls)
    return Trace(code.src, code.globals, sites, tracer.assumptions(plain_class), namespace["forward"])


def _input_of(call: fx.Node) -> Any:
    return (*call.args, *call.kwargs.values())[0]


def _replace(
    graph: fx.Graph, nodes: list[fx.Node], function: Callable[..., Any], modules: list[str | None], values: list[Any]
) -> None:
    """Put one call of ``function`` with children and values in place of ``nodes``, which go from last to first.

    At the place of the first: what that takes may be changed in place before the last.
    """
    with graph.inserting_before(nodes[-1]):
        children = [None if path is None else _child(graph, path) for path in modules]
        fused = graph.call_function(function, (*children, *values))
    nodes[0].replace_all_uses_with(fused)
    for node in nodes:
        graph.erase_node(node)


def _child(graph: fx.Graph, path: str) -> fx.Node:
    """The child at ``path``, from the dictionary of children: looking it up as an attribute takes longer."""
    owner, _, name = path.rpartition(".")
    children = graph.create_node("get_attr", f"{owner}._modules" if owner else "_modules")
    return graph.call_function(operator.getitem, (children, name))


def _relu(input: Any, relu: nn.Module | None, replaces: bool) -> Any:
    if relu is not None:
        return relu(input)
    return torch.relu_(input) if replaces else torch.relu(input)


def _is_plain(relu: nn.Module | None) -> bool:
    return relu is None or (type(relu) is nn.ReLU and untouched(relu))


def _layer_relu(layer: Any, relu: nn.Module | None, input: Tensor, replaces: bool) -> Any:
    """``relu(layer(input))`` in one call, or in two where something else could see the step between."""
    runs = WITH_RELU.get(type(layer).forward)
    if runs is not None and untouched(layer) and _is_plain(relu):
        return runs[1](layer, input, layer.weight, layer.bias)
    return _relu(layer(input), relu, replaces)


def _layer_norm_relu(
    layer: Any, norm: Any, relu: nn.Module | None, input: Tensor, has_relu: bool, replaces: bool
) -> Any:
    """``relu(norm(layer(input)))``, or without a ReLU, with the batch norm folded into the layer where that may be."""
    runs = WITH_RELU.get(type(layer).forward)
    if runs is not None and untouched(layer) and type(norm) in BATCH_NORMS and untouched(norm) and _is_plain(relu):
        weights = folded_weights(layer, norm)
        if weights is not None and input.dim() == layer.weight.dim():  # the batch norm takes no unbatched input
            return runs[has_relu](layer, input, *weights)
    output = norm(layer(input))
    return _relu(output, relu, replaces) if has_relu else output


def _add_relu(producer: Any, relu: nn.Module | None, left: Any, right: Any, replaces: bool) -> Any:
    """``relu(left + right)`` in one call; with a ``producer``, which made ``left``, the sum is written into that."""
    if _is_plain(relu) and isinstance(left, Tensor) and isinstance(right, Tensor):
        if producer is None:
            return FF.add_relu(left, right)
        if untouched(producer) and left.dtype is right.dtype and explain("add_relu", left, right).backend != "torch":
            return FF.add_relu(left, right)
    if producer is None:
        return _relu(left + right, relu, replaces)
    left += right
    return _relu(left, relu, replaces)


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
