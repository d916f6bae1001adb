"""The backend ``"fastops"`` of `torch.compile`: ``model.compile(backend="fastops")``.

Dynamo hands over the graph of what a model computes, whatever its control flow. Where a kernel takes the arguments,
calls of layers and losses give way to those of `fastops.functional`, a layer and the ReLU behind it to one call. What
no kernel takes stays as Dynamo wrote it. The graph then goes on to another compiler, Inductor if nobody says otherwise.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from . import dispatch, functional
from .kernels import head
from .reporting import Report, Row

# What Dynamo calls them in its graphs, as functions and as methods.
_OPS: Final[dict[object, str]] = {
    F.linear: "linear",
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    F.mse_loss: "mse_loss",
    F.cross_entropy: "cross_entropy",
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_"), "relu"),
}
_GROUPS: Final = {
    "linear": "linear layers",
    "conv1d": "convolutions",
    "conv2d": "convolutions",
    "conv3d": "convolutions",
    "mse_loss": "losses",
    "cross_entropy": "losses",
    "relu": "ReLUs",
}


class _Call(NamedTuple):
    """A call of a function of `fastops.functional`; the arguments are nodes and constants."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _first_as(op: str) -> Callable[[fx.Node, fx.Node], _Call]:
    return lambda first, second: _Call(op, first.args, first.kwargs)


def _head(first: fx.Node, second: fx.Node) -> _Call | None:
    """A linear layer and the cross-entropy of its logits, if these would be larger than the memory budget.

    The call takes the place of the loss: views apart, nothing may happen between, such as a change of the target.
    """
    logits = first.meta["example_value"]
    if logits.numel() * logits.element_size() <= head.BUDGET:
        return None
    node = second.prev
    while node is not first:
        if node.op == "call_function" or (node.op == "call_method" and node.target not in _VIEWS):
            return None
        node = node.prev
    layer = inspect.signature(functional.linear).bind(*first.args, **first.kwargs).arguments
    loss = inspect.signature(functional.cross_entropy).bind(*second.args, **second.kwargs).arguments
    if loss.pop("size_average", None) is not None or loss.pop("reduce", None) is not None:
        return None
    del loss["input"]
    if loss.get("ignore_index") == -100:
        del loss["ignore_index"]
    return _Call(
        "linear_cross_entropy",
        (layer["input"], layer["weight"], loss.pop("target")),
        {"linear_bias": layer.get("bias"), **loss},
    )


_VIEWS: Final = ("view", "reshape", "flatten", "squeeze")
# Two calls that become one, by the op whose result is the first argument of the other op, and by that one.
FUSIONS: Final[dict[tuple[str, str], Callable[[fx.Node, fx.Node], _Call | None]]] = {
    ("linear", "relu"): _first_as("linear_relu"),
    ("conv1d", "relu"): _first_as("conv_relu1d"),
    ("conv2d", "relu"): _first_as("conv_relu2d"),
    ("conv3d", "relu"): _first_as("conv_relu3d"),
    ("linear", "cross_entropy"): _head,
}

_rows: dict[Row, None] = {}  # a dictionary, for its order: a graph that is compiled again adds nothing


def compile_graph(
    graph: fx.GraphModule, inputs: list[Tensor], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend itself: put fastops into ``graph`` and compile it.

    Args:
        graph: what Dynamo captured; it is changed.
        inputs: fake tensors like those that it will be called with.
        mode: of the compiler that follows, as ``torch.compile(mode=..)``.
        options: of ``torch.compile(options=..)``: ``"compiler"`` names the backend that follows, ``"inductor"`` (the
            default), ``"aot_eager"``, ``"eager"`` or any other; the rest is for that one.

    Returns:
        The compiled function.
    """
    for module in (graph, *_checkpointed(graph)):
        _rewrite(module)
    others = dict(options or {})
    name = others.pop("compiler", "inductor")
    mode = mode or "default"
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, others, None)(graph, inputs)
    return torch._TorchCompileWrapper(name, mode, others, None)(graph, inputs)


def report() -> Report:
    """What the backend fused and replaced, and why not the rest, in all graphs since ``torch._dynamo.reset()``.

    A row that several graphs have in common, as after a recompilation, is there once.
    """
    return Report(tuple(_rows))


compile_graph.reset = _rows.clear  # type: ignore[attr-defined]  # called by torch._dynamo.reset


def _checkpointed(graph: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs inside ``graph`` that run as part of it: those of activation checkpoints, at any depth."""
    found = []
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            body = getattr(graph, node.args[0].target)
            found += [body, *_checkpointed(body)]
    return found


def _rewrite(module: fx.GraphModule) -> None:
    graph = module.graph
    replaced, reasons = set(), dict[fx.Node, str]()
    for node in list(graph.nodes):
        op = _op(node)
        if node in replaced or not op:
            continue
        if op == "relu":
            reason = reasons.get(node) or f"its input is {_first_argument(node)}, not a layer"
            _note(node, f"not fused: {reason}", done=False)
            continue
        for user in node.users:
            reasons[user] = _obstacle(node, user) or f"no kernel takes {_name(node)}"
        for last, call in _candidates(node):
            way = _way(*call)
            if way.backend == "torch":
                continue
            _note(node, f"fastops.functional.{call.op} ({way.backend})", done=True)
            if last is not node:
                _note(last, f"fused with {_name(node)}", done=True)
            # In the place of the first: its arguments may be changed in place before the last. Not so for a head.
            with graph.inserting_before(last if call.op == "linear_cross_entropy" else node):
                new = graph.call_function(getattr(functional, call.op), call.args, call.kwargs)
            new.meta = dict(last.meta)
            last.replace_all_uses_with(new)
            for old in dict.fromkeys((last, node)):
                graph.erase_node(old)
                replaced.add(old)
            break
        else:
            _note(node, f"left to the compiler: {way.reason}", done=False)
    graph.lint()
    module.recompile()


def _op(node: object) -> str:
    if isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        return _OPS.get(node.target, "")
    return ""


def _first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _candidates(node: fx.Node) -> Iterator[tuple[fx.Node, _Call]]:
    """What ``node`` may become, the best first: the last node whose result it computes, and the call."""
    for user in node.users:
        fuse = FUSIONS.get((_op(node), _op(user)))
        if fuse and _first_argument(user) is node and not _obstacle(node, user) and (call := fuse(node, user)):
            yield user, call
    yield node, _Call(_op(node), node.args, node.kwargs)


def _obstacle(first: fx.Node, second: fx.Node) -> str:
    """Why the two calls cannot be one, or nothing."""
    if len(first.users) > 1:
        return f"the output of {_name(first)} is used elsewhere too"
    node = second.prev
    while node is not first:
        # Nodes without a value: no_grad, autocast, transforms of torch.func and the like begin or end there.
        if node.op == "call_function" and node.meta.get("example_value") is None:
            return f"the mode of computation changes between {_name(first)} and it"
        node = node.prev
    return ""


def _way(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dispatch.Explanation:
    """What `fastops.explain` says of a call."""
    try:
        args, kwargs = fx.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        return dispatch.explain(op, *args, **kwargs)
    except (KeyError, GuardOnDataDependentSymNode):
        return dispatch.Explanation("torch", "its shapes depend on data")


def _note(node: fx.Node, outcome: str, done: bool) -> None:
    op = _op(node)
    _rows[Row(_name(node), op, outcome, done, _GROUPS[op])] = None


def _name(node: fx.Node) -> str:
    """The path of the module that makes the call, or the name of the node if that is the root."""
    modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = re.sub(r"^L\['\w+'\](\.__self__)?\.?", "", modules[-1]) if modules else ""
    return path or node.name
