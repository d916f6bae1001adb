"""The backend ``"fastops"`` of `torch.compile`: ``torch.compile(model, backend="fastops")``.

Dynamo hands over the graph of what a model computes, whatever its control flow. Where a kernel takes the arguments,
calls of layers and losses give way to those of `fastops.functional`, and what `fastops.fusions` lists to one call. What
no kernel takes stays as Dynamo wrote it. The graph then goes on to another compiler, Inductor if nobody says otherwise.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import dispatch, functional
from .fusions import CALLS, SUMS_IN_PLACE, activation_of_function, fused_op, options_of
from .kernels import chunked_logits, private
from .kernels.activation import RELU, Activation
from .lm_head import float32_loss
from .ops import OPS, Explanation
from .ops.activations import METHODS
from .reporting import Report, Row

_GROUPS: Final = {nn.Linear: "linear layers", nn.modules.conv._ConvNd: "convolutions", nn.modules.loss._Loss: "losses"}


class _Call(NamedTuple):
    """A call of a function of `fastops.functional`; the arguments are nodes and constants."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chain: tuple[fx.Node, ...] = ()  # of a head: what its logits pass through before their loss


def _head(first: fx.Node, chain: tuple[fx.Node, ...], last: fx.Node) -> _Call | str:
    """A linear layer and the cross-entropy of its logits, if these would be larger than the memory budget; or why not.

    The call takes the place of the loss: nothing may happen between that could change an argument.
    """
    for node, user in pairwise((first, *chain, last)):
        if user is not last and (user.target not in _ROWS or _first_argument(user) is not node):
            return f"{user.name} changes its output"
        if reason := _obstacle(node, user):
            return reason
    logits = first.meta["example_value"]
    if logits.numel() * logits.element_size() <= chunked_logits.BUDGET:
        return "all logits fit into the memory budget at once"
    node = last.prev
    while node is not first:
        if node.op.startswith("call") and node.target not in _INERT:
            return f"{node.name} runs between {_name(first)} and it"
        node = node.prev
    layer = inspect.signature(functional.linear).bind(*first.args, **first.kwargs).arguments
    loss = inspect.signature(functional.cross_entropy).bind(*last.args, **last.kwargs).arguments
    if loss.pop("size_average", None) is not None or loss.pop("reduce", None) is not None:
        return "of its legacy options"
    del loss["input"]
    if loss.get("ignore_index") == -100:
        del loss["ignore_index"]
    keep = all(_keeps_rows(node, logits.shape[-1]) for node in chain)
    if chain and not (keep and logits.dim() > 1 and _value(chain[-1]).dim() == 2):
        return "its input is not a row of logits for each target"
    target = loss.pop("target")
    return _Call(
        "linear_cross_entropy",
        (layer["input"], layer["weight"], target),
        {"linear_bias": layer.get("bias"), **loss},
        chain,
    )


_VIEWS: Final = ("view", "reshape", "flatten", "squeeze")
_ROWS: Final = (*_VIEWS[:3], "contiguous", "float", operator.getitem)  # what logits may pass through
_INERT: Final = (*_VIEWS, "contiguous", "float", "to", operator.getitem, F.pad, private.PAD)


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]


def _losses(linear: fx.Node) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node]]:
    """The cross-entropies behind ``linear``, and the calls that it passes through before each."""
    seen, waiting = set[fx.Node](), list[tuple[fx.Node, tuple[fx.Node, ...]]]([(linear, ())])
    while waiting:
        node, chain = waiting.pop()
        for user in node.users:
            if _op(user) == "cross_entropy" and _first_argument(user) is node:
                yield chain, user
            elif user not in seen and user.op.startswith("call") and _op(user) in ("", "add", "activation"):
                seen.add(user)
                waiting.append((user, (*chain, user)))


def _keeps_rows(node: fx.Node, classes: Any) -> bool:
    """Whether it leaves the logits of each position as they are: a view, or a part of the positions."""
    if node.target is not operator.getitem:
        return bool(_value(node).shape[-1] == classes)
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    plain = all(part is ... or (isinstance(part, slice) and not _has_nodes(part)) for part in index)
    names_last = len(index) == _value(node).dim() or ... in index
    return plain and index[-1] in (..., slice(None)) if names_last else plain


def _has_nodes(part: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (part.start, part.stop, part.step))


def _rows_of(input: Any, chain: tuple[fx.Node, ...]) -> Any:
    """The part of the layer's ``input``, a tensor or a proxy, that gives the rows of logits behind ``chain``."""
    for node in chain:
        if node.target is operator.getitem:
            input = input[node.args[1]]
    return input.flatten(0, -2)


_METHODS: Final = {**{name: name for name in METHODS}, **{getattr(Tensor, name): name for name in METHODS}}


def _activation(node: fx.Node) -> Activation | None:
    """The activation that ``node`` applies to its first argument."""
    if node.target in _METHODS:
        return (METHODS[_METHODS[node.target]],) if len(node.args) == 1 and not node.kwargs else None
    keywords = {name: value for name, value in node.kwargs.items() if name != "input"}
    return activation_of_function(node.target, node.args[1:], keywords)


def _fused(first: fx.Node, second: fx.Node) -> _Call | None:
    """The one call that both are, if there is one."""
    if _first_argument(second) is not first or _obstacle(first, second):
        return None
    activation = _activation(second)
    op = None if activation is None else fused_op(activation, _op(first))
    if activation is None or op is None or (_op(first) == "add" and not _adds_two_values(first)):
        return None
    return _Call(op, first.args, {**first.kwargs, **options_of(activation)})


def _normalized_sum(norm: fx.Node, sum: fx.Node) -> tuple[fx.Node, _Call] | None:
    """The activation behind the sum of a batch norm and another value, and the one call that all three are.

    The other value is there before the batch norm, behind which the sum is the next call: so nothing changes places.
    """
    if _op(sum) != "add" or not _adds_two_values(sum) or sum.args[0] is sum.args[1]:
        return None
    if not norm.args or _obstacle(norm, sum):
        return None
    node = sum.prev
    while node is not norm:
        if node.op in ("call_function", "call_method", "call_module"):
            return None
        node = node.prev
    (last,) = sum.users if len(sum.users) == 1 else (None,)
    activation = None if last is None or _op(last) != "activation" else _activation(last)
    op = None if activation is None else fused_op(activation, "batch_norm", "add")
    if last is None or activation is None or op is None or _first_argument(last) is not sum or _obstacle(sum, last):
        return None
    (other,) = (summand for summand in sum.args if summand is not norm)
    return last, _Call(op, (norm.args[0], other, *norm.args[1:]), {**norm.kwargs, **options_of(activation)})


def _pooled(relu: fx.Node) -> tuple[fx.Node, _Call] | None:
    """The maximum pooling behind a ReLU that runs with nothing before it, and the one call that both are.

    That saves its input for the backward pass: it has to be a new tensor of which nobody else knows.
    """
    input, (pool, *others) = _first_argument(relu), [*relu.users, None]
    if others != [None] or pool is None or _activation(relu) != RELU or pool.target not in _POOLS:
        return None
    is_new = isinstance(input, fx.Node) and (_op(input) in (*OPS, "batch_norm") or input.target in _GIVE_NEW)
    if not is_new or _first_argument(pool) is not relu or _obstacle(input, relu) or _obstacle(relu, pool):
        return None
    keywords = {name: value for name, value in pool.kwargs.items() if name not in ("input", "return_indices")}
    if pool.kwargs.get("return_indices") or len(pool.args) > len(_POOL_OPTIONS):
        return None
    return pool, _Call("relu_max_pool2d", (input, *pool.args[1:]), keywords)


_POOLS: Final = (F.max_pool2d, torch.max_pool2d)
_POOL_OPTIONS: Final = tuple(inspect.signature(functional.relu_max_pool2d).parameters)
_GIVE_NEW: Final = (F.group_norm, F.instance_norm, F.conv_transpose2d)


def _adds_two_values(node: fx.Node) -> bool:
    """Whether it adds two tensors; where in place, to a new one of which nobody else knows."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(summand, fx.Node) for summand in node.args):
        return False
    left, right = node.args
    assert isinstance(left, fx.Node)
    is_new = _op(left) in OPS or left.target is F.batch_norm
    return node.target not in SUMS_IN_PLACE or (is_new and len(left.users) == 1 and left is not right)


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
    return private.compiler(name, mode or "default", others)(graph, inputs)


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
    replaced, reasons, heads = set(), dict[fx.Node, str](), dict[fx.Node, str]()
    for node in list(graph.nodes):
        op = _op(node)
        if node in replaced or not op:
            continue
        if op == "activation":
            pooled = _pooled(node)
            if pooled is not None and _way(*pooled[1]).backend != "torch":
                _note(node, f"fused with {_name(pooled[0])}", done=True)
                _replace([node, pooled[0]], pooled[1], node)
                continue
            reason = reasons.get(node) or f"its input is {_first_argument(node)}, not a layer"
            _note(node, f"not fused: {reason}", done=False)
            continue
        for user in node.users:
            reasons[user] = _obstacle(node, user) or f"no kernel takes {_name(node)}"
        way = None
        for nodes, call in _candidates(node, heads):
            last = nodes[-1]
            way = _way(*call)
            if way.backend == "torch":
                continue
            if op in OPS:
                _note(node, f"fastops.functional.{call.op} ({way.backend}){heads.get(node, '')}", done=True)
            if last is not node:
                before = nodes[:1] if call.chain else nodes[:-1]
                names = ["the sum" if _op(each) == "add" else _name(each) for each in before]
                _note(last, f"fused with {' and '.join(names)}", done=True)
            # In the place of the first: its arguments may be changed in place before the last. A batch norm with a sum
            # takes the place of that, where the other summand is for certain, and the loss of a head that of the last,
            # where its target is.
            place = last if call.op == "linear_cross_entropy" else nodes[len(nodes) - 2]
            _replace(nodes, call, place)
            replaced.update(nodes)
            break
        else:
            if way is not None and op in OPS:
                dispatch.refuse_fallback(op, way.reason)
                _note(node, f"left to the compiler: {way.reason}{heads.get(node, '')}", done=False)
    graph.lint()
    module.recompile()


def _replace(nodes: list[fx.Node], call: _Call, place: fx.Node) -> None:
    """Put ``call`` before ``place``, for ``nodes``, of which others see only the last one's value."""
    graph, last = place.graph, nodes[-1]
    with graph.inserting_before(place):
        function, args = getattr(functional, call.op), call.args
        if call.op == "linear_cross_entropy" and call.chain:
            function = function if _value(last).dtype is _value(nodes[0]).dtype else float32_loss
            args = (_rows_of(fx.Proxy(args[0]), call.chain).node, *args[1:])
        new = graph.call_function(function, args, call.kwargs)
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for old in reversed(nodes):
        graph.erase_node(old)


def _op(node: object) -> str:
    if isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        return CALLS.get(node.target, "")
    return ""


def _first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _candidates(node: fx.Node, heads: dict[fx.Node, str]) -> Iterator[tuple[list[fx.Node], _Call]]:
    """What ``node`` may become, the best first: the nodes that give way, all in a row, and the call.

    Why the loss of a head cannot be fused with it goes into ``heads``.
    """
    for chain, loss in _losses(node) if _op(node) == "linear" else ():
        head = _head(node, chain, loss)
        if isinstance(head, str):
            heads[loss] = f"; not fused with {_name(node)}: {head}"
        else:
            yield [node, *chain, loss], head
    for user in node.users:
        if _op(node) == "batch_norm" and (found := _normalized_sum(node, user)) is not None:
            yield [node, user, found[0]], found[1]
        if (call := _fused(node, user)) is not None:
            yield [node, user], call
    if _op(node) in OPS:
        yield [node], _Call(_op(node), node.args, node.kwargs)


def _obstacle(first: fx.Node, second: fx.Node) -> str:
    """Why the two calls cannot be one, or nothing."""
    if len(first.users) > 1:
        return f"the output of {_name(first)} is used elsewhere too"
    node = second.prev
    while node is not first:
        # Nodes without a value: no_grad, autocast, transforms of torch.func and the like begin or end there.
        if node.op == "call_function" and node.meta.get("example_value") is None:
            what = "a tensor" if node.target is operator.setitem else "the mode of computation"
            return f"{what} changes between {_name(first)} and it"
        node = node.prev
    return ""


def _way(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], chain: tuple[fx.Node, ...] = ()) -> Explanation:
    """What `fastops.explain` says of a call."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # with sympy: a second

    try:
        args, kwargs = fx.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        if chain:
            args = (_rows_of(args[0], chain), *args[1:])
        with dispatch.backend(dispatch.selected_backend()):  # not strict: another call may be there to try
            return dispatch.explain(op, *args, **kwargs)
    except (KeyError, GuardOnDataDependentSymNode):
        return Explanation("torch", "its shapes depend on data")


def _note(node: fx.Node, outcome: str, done: bool) -> None:
    op = _op(node)
    module = OPS[op].module if op in OPS else None
    group = next((name for kind, name in _GROUPS.items() if module and issubclass(module, kind)), "ReLUs")
    if op == "activation":
        activation = _activation(node)
        op = str(node.target) if activation is None else activation[0]
        group = "ReLUs" if activation == RELU else "other activations"
    _rows[Row(_name(node), op, outcome, done, group)] = None


def _name(node: fx.Node) -> str:
    """The path of the module that makes the call, or the name of the node if that is the root."""
    modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = re.sub(r"^L\['\w+'\](\.__self__)?\.?", "", modules[-1]) if modules else ""
    return path or node.name
