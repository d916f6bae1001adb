"""Puts fastops layers into existing models, and takes them out again.

`swap` works in two steps, both in place:

1. Every layer with a counterpart in `fastops.nn` changes its class. It stays the same object, so parameters, optimizer
   state, hooks, parametrizations, tied weights and keys are untouched.
2. The ``forward`` of each module that the user wrote is traced on its own, its children as leaves. Where the output of
   a layer goes into a ReLU and nowhere else, the two become one call (`fastops.fuse`), and so do a sum and its ReLU
   and, on request, a convolution and its batch norm.

Nothing is stored on the modules or beside them: what was swapped is written in their classes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import nn

from . import nn as fnn
from .fuse import (
    ORIGINALS,
    WITH_RELU,
    Site,
    compile_trace,
    fused_class,
    plain_class,
    sites_of,
    trace_to_fuse,
    traced,
    untouched,
)
from .fusions import COUNTERPARTS
from .ops.conv import is_channels_last
from .trace import LeftAlone
from .tuning import Example, calls_of

_Model = TypeVar("_Model", bound=nn.Module)


def swap(
    model: _Model,
    *,
    fuse: bool = True,
    fold_batchnorm: bool = False,
    memory_format: torch.memory_format | None = None,
) -> _Model:
    """Swap fastops layers into ``model``, in place, and fuse them with the ReLUs behind them.

    Parameters, their names, hooks and results stay as they are. Whatever cannot be swapped or fused safely is left
    alone; `report` says why. After new layers were put into the model, swap again.

    Args:
        model: any module, a loss too.
        fuse: whether layers may run in one call with a ReLU behind them. If not, only classes of layers change.
        fold_batchnorm: whether batch norms in evaluation mode run as part of the convolution before them wherever no
            gradient of the parameters is wanted. That changes results by rounding, and parameters not at all: the
            folded weights are derived, kept beside the model, and follow every change of a parameter that autograd
            would notice (one through ``.data`` is not).
        memory_format: `torch.channels_last`, say: what ``model.to(memory_format=...)`` does to the weights, and so to
            the outputs of their layers. It helps with large feature maps and costs with small ones. `unswap` leaves it.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if batch norms are to be folded and layers not to be fused.
    """
    _check("swap", model)
    if fold_batchnorm and not fuse:
        raise ValueError("fold_batchnorm=True needs fuse=True: a batch norm is folded where layers are fused")
    if memory_format is not None:
        model.to(memory_format=memory_format)
    for module in model.modules():
        if type(module) not in ORIGINALS:
            _set_class(module, plain_class(type(module)))
        with suppress(LeftAlone):
            _set_class(module, _swapped_class(module))
    if fuse:
        tracers = {module: trace_to_fuse(module, fold_batchnorm) for module in model.modules()}
        for module, found in reversed(tracers.items()):  # children first: a trace notes their classes
            if found:
                traces = tuple(compile_trace(tracer, type(module), fold_batchnorm) for tracer in found)
                _set_class(module, fused_class(type(module), traces))
    return model


def unswap(model: _Model) -> _Model:
    """Give every module of ``model`` its plain torch class, or the user's own, back: in place, the reverse of `swap`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    _check("unswap", model)
    for module in model.modules():
        _set_class(module, _original_class(type(module)))
    return model


def _check(verb: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} expects a torch.nn.Module, not {type(model).__name__}")


def _set_class(module: nn.Module, new: type) -> None:
    if new is not type(module):
        object.__setattr__(module, "__class__", new)


# Layers ---------------------------------------------------------------------------------------------------------------


def _swapped_class(module: nn.Module) -> type:
    """The class that takes the place of the class of ``module``: its own if it has no counterpart.

    Raises:
        LeftAlone: if it has a counterpart that cannot take its place.
    """
    found = type(module)
    known = next((original for original in COUNTERPARTS if issubclass(found, original)), None)
    if known is None or found.__module__.startswith(fnn.__name__):
        return found
    if "forward" in module.__dict__:
        raise LeftAlone("its forward was replaced on the object")
    if found is known:
        return COUNTERPARTS[known]
    if issubclass(found, nn.modules.lazy.LazyModuleMixin):
        raise LeftAlone("it has no weights yet: run it once, then swap again")
    base = found.__bases__[0]
    if found.__module__ == nn.utils.parametrize.__name__ and (base is known or base in ORIGINALS):
        return found if base in ORIGINALS else _with_bases(found, (COUNTERPARTS[known],))
    raise LeftAlone(f"its class {found.__name__} is a subclass of {known.__name__}, which may compute something else")


def _original_class(found: type) -> type:
    plain = plain_class(found)
    if plain is found and found.__module__.startswith("torch."):
        # Parametrizing or sharding a module derives a class from the one that it had: derive it from the original.
        bases = tuple(map(plain_class, found.__bases__))
        return found if bases == found.__bases__ else _with_bases(found, bases)
    return plain


def _with_bases(found: type, bases: tuple[type, ...]) -> type:
    namespace = {name: value for name, value in vars(found).items() if name not in ("__dict__", "__weakref__")}
    return type.__new__(type(found), found.__name__, bases, namespace)


# Report ---------------------------------------------------------------------------------------------------------------

_GROUPS: Final = {
    "linear layers": nn.Linear,
    "convolutions": nn.modules.conv._ConvNd,
    "losses": nn.modules.loss._Loss,
}
_RELUS, _NORMS = "ReLUs", "batch norms"
_VERBS: Final = {_RELUS: "fused", _NORMS: "folded"}


@dataclass(frozen=True)
class Row:
    """One line of a `Report`: where it is, what it is, what became of it, whether that is fastops, and its group."""

    name: str
    layer: str
    outcome: str
    done: bool
    group: str


@dataclass(frozen=True)
class Report:
    """What fastops does in a model. ``str(report)`` is a table of ``rows`` with the totals and ``notes`` below it."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> int:
        """The number of layers and losses that are fastops layers."""
        return sum(row.done for row in self.rows if row.group in _GROUPS)

    @property
    def fused(self) -> int:
        """The number of ReLU calls that run in one call with the layer or the sum before them."""
        return sum(row.done for row in self.rows if row.group == _RELUS)

    @property
    def folded(self) -> int:
        """The number of batch norms that run as part of the convolution before them."""
        return sum(row.done for row in self.rows if row.group == _NORMS)

    def __str__(self) -> str:
        cells = [(row.name, row.layer, row.outcome) for row in self.rows]
        first, second = (max((len(cell[column]) for cell in cells), default=0) for column in (0, 1))
        lines = [f"{name:{first}}  {layer:{second}}  {outcome}" for name, layer, outcome in cells]
        totals = []
        for group in (*_GROUPS, _RELUS, _NORMS):
            done = [row.done for row in self.rows if row.group == group]
            if done:
                totals.append(f"{sum(done)} of {len(done)} {group} {_VERBS.get(group, 'swapped')}")
        return "\n".join([*lines, ", ".join(totals) or "nothing here that fastops knows", *self.notes])


def report(model: nn.Module, example_input: Any = None, *, example_kwargs: Mapping[str, Any] | None = None) -> Report:
    """What is swapped and fused in ``model`` now, and why the rest is not. Swapped or not, ``model`` is only looked at.

    Args:
        model: any module.
        example_input: what the model is called with, one argument or a tuple of several: then it is called once, its
            buffers and the random state are put back, and the notes say which way each fastops call went and why.
        example_kwargs: keyword arguments of that call.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    _check("report", model)
    modules = dict(model.named_modules())
    containers, relus = dict[str, Row](), dict[str, list[Row]]()
    fused_layers = set[nn.Module]()
    for path, module in modules.items():
        try:
            calls = _relu_calls(module)
        except LeftAlone as reason:
            if any(isinstance(child, (nn.ReLU, *COUNTERPARTS)) for child in module.modules()):
                containers[path] = Row(path or "(model)", type(module).__name__, f"not traced: {reason}", False, "")
            continue
        for site, outcome, done in calls:
            # A module has its own place in the table; a ReLU function stands behind the layer it is applied to.
            place = site.module if site.module is not None else site.layer
            place = path if place is None else _join(path, place)
            name = place if site.module is not None else _join(path, f"relu({site.input})")
            if site.is_norm:
                norm = type(module.get_submodule(str(site.module))).__name__
                relus.setdefault(place, []).append(Row(name, norm, outcome, done, _NORMS))
                continue
            relus.setdefault(place, []).append(Row(name, "ReLU", outcome, done, _RELUS))
            if done and site.layer is not None and site.norm is None:
                fused_layers.add(module.get_submodule(site.layer))
    rows: list[Row] = []
    for path, module in modules.items():
        if path in containers:
            rows.append(containers[path])
        layer = _layer_row(path, module, module in fused_layers)
        if layer is not None:
            rows.append(layer)
        if isinstance(module, nn.ReLU) and path not in relus:
            rows.append(Row(path or "(model)", "ReLU", "not fused: no traced forward calls it", False, _RELUS))
        rows += relus.get(path, [])
    notes = [_CHANNELS_LAST] if any(map(_is_channels_last, modules.values())) else []
    if example_input is not None or example_kwargs is not None:
        met = calls_of(model, Example(() if example_input is None else example_input, example_kwargs))
        with torch.enable_grad():
            ways = Counter(f"{call.name} {call.shapes}: {call.way()}" for call in met)
        notes += [f"{way} ({times} times)" if times > 1 else way for way, times in ways.items()]
    return Report(tuple(rows), tuple(notes))


_CHANNELS_LAST: Final = (
    "channels_last weights: large feature maps gain from that memory format, small ones lose; measure yours"
)


def _is_channels_last(module: nn.Module) -> bool:
    weight = module.weight if isinstance(module, nn.modules.conv._ConvNd) else None
    return weight is not None and not weight.is_contiguous() and is_channels_last(weight, weight)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _layer_row(path: str, module: nn.Module, fused: bool) -> Row | None:
    group = next((name for name, kind in _GROUPS.items() if isinstance(module, kind)), None)
    if group is None or not isinstance(module, tuple(COUNTERPARTS)):
        return None
    found = type(module)
    done = found.forward.__module__.startswith(fnn.__name__)
    outcome = f"fastops.nn.{found.forward.__qualname__.partition('.')[0]}" + (" fused with its ReLU" if fused else "")
    if not done:
        try:
            _swapped_class(module)
            outcome = "not swapped"
        except LeftAlone as reason:
            outcome = f"not swapped: {reason}"
    return Row(path or "(model)", plain_class(found).__name__, outcome, done, group)


def _relu_calls(module: nn.Module) -> list[tuple[Site, str, bool]]:
    """Every call of a ReLU in the forward of ``module``, what became of it and whether it is fused.

    Raises:
        LeftAlone: if ``module`` cannot be traced.
    """
    traces = getattr(type(module), "_fastops_traces", None)
    if traces is None:
        modes = [(_mode(tracer.reads), Counter(sites_of(tracer))) for tracer in traced(module)]
        obstacle = "fastops.swap would fuse it"
    else:
        modes = [(_mode(trace.assumptions.reads), Counter(trace.sites)) for trace in traces]
        current = any(trace.assumptions.hold(module) for trace in traces)
        obstacle = "" if current else "the model was changed since it was swapped: swap again"
    calls = []
    for site in dict.fromkeys(site for _, sites in modes for site in sites):
        where = [mode for mode, sites in modes if site in sites]
        only = "" if len(where) == len(modes) else f" in {where[0]} mode only"
        reason = site.reason or obstacle or _hooked(module, site)
        verb = "folded" if site.is_norm else "fused"
        partner = f"{'into' if site.is_norm else 'with'} {site.layer or 'the sum'}"
        outcome = f"not {verb}: {reason}" if reason else f"{verb} {partner}"
        if not reason and (site.is_norm or site.norm is not None):
            outcome += " in evaluation without gradients"
        calls += [(site, outcome + only, not reason)] * max(sites[site] for _, sites in modes)
    return calls


def _mode(reads: Sequence[tuple[object, str, object]]) -> str:
    return "training" if ("training", (bool, True)) in [(name, token) for _, name, token in reads] else "evaluation"


def _hooked(module: nn.Module, site: Site) -> str:
    for name in (site.layer, site.norm, site.module):
        if name is not None and not untouched(module.get_submodule(name)):
            return f"{name} has hooks or a replaced forward"
    if site.layer is not None and type(module.get_submodule(site.layer)).forward not in WITH_RELU:
        return f"{site.layer} is not swapped: swap again"
    return ""
