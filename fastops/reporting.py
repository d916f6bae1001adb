"""`fastops.report`: what `fastops.swap` did to a model, or would do, from nothing but the model and its source."""

from __future__ import annotations

import html
import json
import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Final

import torch
from torch import nn

from . import __version__, dispatch
from . import nn as fnn
from .collapse import collapsed
from .ops.activations import MODULES
from .ops.conv import is_channels_last
from .reading import NORM_LAYERS, OTHERS, RELUS, findings, group_of, is_scripted
from .recognition import LEFT_ALONE, plain_class
from .source import LeftAlone
from .swap import check, layer_class, swapped_class
from .tuning import Example, calls_of

_GROUPS: Final = {
    "linear layers": nn.Linear,
    "convolutions": nn.modules.conv._ConvNd,
    "losses": nn.modules.loss._Loss,
}
_VERBS: Final = {RELUS: "fused", OTHERS: "fused", NORM_LAYERS: "folded"}
NOT_COVERED: Final = "not covered"


@dataclass(frozen=True)
class Row:
    """One place of a model: its path, what it is, what became of it, whether that is fastops, and its group.

    The group is ``"linear layers"``, ``"convolutions"``, ``"losses"``, ``"ReLUs"``, ``"other activations"``,
    ``"batch norms"``, ``"not covered"``, or empty where the row is about a method that was not looked into.
    """

    name: str
    layer: str
    outcome: str
    done: bool
    group: str


@dataclass(frozen=True)
class Report:
    """What fastops does in a model. ``str(report)`` is a table by sections, with the totals and ``notes`` below it.

    There rows that differ only in numbers of their paths are one line. Used in a ``with``, a report counts the calls of
    fastops that the thread makes inside, those of compiled code excepted: ``ran[op, way]`` is how often ``op`` of
    `fastops.functional` ran that way. A way is ``"triton"``, ``"onednn"``, ``"torch"`` (the torch expression), or
    ``"vendor"``: a kernel, with the products of its backward pass in the library of the GPU's vendor.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    ran: Counter[tuple[str, str]] = field(default_factory=Counter, compare=False)

    def __enter__(self) -> Report:
        dispatch.count(self.ran)
        return self

    def __exit__(self, *_: object) -> None:
        dispatch.leave()

    @property
    def swapped(self) -> int:
        """The number of layers and losses that are fastops layers."""
        return sum(row.done for row in self.rows if row.group in _GROUPS)

    @property
    def fused(self) -> int:
        """The number of calls of activations that run in one call with the layer or the sum before them."""
        return sum(row.done for row in self.rows if row.group in (RELUS, OTHERS))

    @property
    def folded(self) -> int:
        """The number of batch norms that may run as part of the convolution before them in evaluation.

        In a call they do where the weight is much smaller than the output, and backend "torch" is not selected.
        """
        return sum(row.done for row in self.rows if row.group == NORM_LAYERS)

    def _totals(self) -> dict[str, tuple[int, int]]:
        """By group: how many are done, of how many."""
        found = {}
        for group in (*_GROUPS, RELUS, OTHERS, NORM_LAYERS):
            done = [row.done for row in self.rows if row.group == group]
            if done:
                found[group] = sum(done), len(done)
        return found

    def summary(self) -> str:
        """The totals in one line, and in a second one what is not covered, if there is something."""
        totals = [f"{n} of {all} {group} {_VERBS.get(group, 'swapped')}" for group, (n, all) in self._totals().items()]
        lines = [", ".join(totals) or "nothing here that fastops knows"]
        others = Counter(row.layer for row in self.rows if row.group == NOT_COVERED)
        if others:
            lines.append(f"{NOT_COVERED}: " + ", ".join(f"{count} {layer}" for layer, count in others.items()))
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON: an object with these keys, to which later versions only add.

        ``rows``, each with ``name``, ``layer``, ``outcome``, ``done`` and ``group`` as in ``report.rows``; ``notes``;
        ``totals``: ``swapped``, ``fused`` and ``folded``, and by group ``{"done": .., "of": ..}`` in ``groups``;
        ``ran``: objects with ``op``, ``way`` and ``times``; ``versions`` of fastops, Python, torch and Triton (null if
        that is not installed).
        """
        versions: dict[str, str | None] = {"fastops": __version__, "python": platform.python_version()}
        versions |= {"torch": str(torch.__version__), "triton": None}
        with suppress(metadata.PackageNotFoundError):
            versions["triton"] = metadata.version("triton")
        groups = {group: {"done": done, "of": of} for group, (done, of) in self._totals().items()}
        totals = {"swapped": self.swapped, "fused": self.fused, "folded": self.folded, "groups": groups}
        ran = [{"op": op, "way": way, "times": times} for (op, way), times in sorted(self.ran.items())]
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"rows": rows, "notes": self.notes, "totals": totals, "ran": ran, "versions": versions})

    def __str__(self) -> str:
        sections = {
            "swapped layers": [row for row in self.rows if row.done and row.group in _GROUPS],
            "fused activations": [row for row in self.rows if row.done and row.group in (RELUS, OTHERS)],
            NORM_LAYERS: [row for row in self.rows if row.group == NORM_LAYERS],
            "left alone": [row for row in self.rows if not row.done and row.group not in (NORM_LAYERS, NOT_COVERED)],
            NOT_COVERED: [row for row in self.rows if row.group == NOT_COVERED],
        }
        tables = {
            title: collapsed((row.name, row.layer, row.outcome) for row in rows)
            for title, rows in sections.items()
            if rows
        }
        if self.ran:
            calls = sorted(self.ran.items())
            tables["ran inside the block"] = [
                (op, way, f"{times} time{'s' * (times > 1)}") for (op, way), times in calls
            ]
        cells = [cell for table in tables.values() for cell in table]
        first, second = (max((len(cell[column]) for cell in cells), default=0) for column in (0, 1))
        lines = []
        for title, table in tables.items():
            lines += [title, *(f"  {name:{first}}  {layer:{second}}  {why}".rstrip() for name, layer, why in table)]
        return "\n".join([*lines, self.summary().splitlines()[0], *self.notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def report(model: nn.Module, example_input: Any = None, *, example_kwargs: Mapping[str, Any] | None = None) -> Report:
    """What is swapped and fused in ``model`` now, and why the rest is not. Swapped or not, ``model`` is only looked at.

    An activation has a row for each place in the source that calls it, however often that runs.

    Args:
        model: any module.
        example_input: what the model is called with, one argument or a tuple of several: then it is called once, its
            buffers and the random state are put back, and the notes say which way each fastops call went and why.
        example_kwargs: keyword arguments of that call.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    check("report", model)
    modules = {path: m for path, m in model.named_modules() if not is_scripted(m)}
    containers, calls = dict[str, list[Row]](), dict[str, list[Row]]()
    fused = dict[nn.Module, dict[str, None]]()  # layers, with the activations that run in one call with them
    for path, module in modules.items():
        for finding in findings(module):
            if not finding.group:
                containers.setdefault(path, []).append(
                    Row(_join(path, finding.name) or "(model)", type(module).__name__, finding.outcome, False, "")
                )
                continue
            place = path if finding.place is None else _join(path, finding.place)
            row = Row(_join(path, finding.name), finding.kind, finding.outcome, finding.done, finding.group)
            calls.setdefault(place, []).append(row)
            for layer in finding.layers:
                fused.setdefault(layer, {})[finding.kind] = None
    rows: list[Row] = []
    for path, module in modules.items():
        rows += containers.get(path, [])
        if (row_of_layer := _layer_row(path, module, list(fused.get(module, ())))) is not None:
            rows.append(row_of_layer)
        if type(module) in MODULES and path not in calls:
            kind, group = type(module).__name__, group_of(MODULES[type(module)])
            reason = module.__dict__.get(LEFT_ALONE, "no call of it was found in the source")
            rows.append(Row(path or "(model)", kind, f"not fused: {reason}", False, group))
        elif path not in calls and _is_unknown(module):
            rows.append(Row(path or "(model)", plain_class(type(module)).__name__, "runs as it is", False, NOT_COVERED))
        rows += calls.get(path, [])
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


# What takes hardly any time, holds others, or is fused with a ReLU before it.
_NO_WORK: Final = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.MaxPool2d)
_HOLDERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _is_unknown(module: nn.Module) -> bool:
    """Whether it computes something that fastops has nothing for: a module of torch's, weights, or an activation."""
    kind = plain_class(type(module))
    if kind is nn.Module or layer_class(kind) is not None or isinstance(module, (*MODULES, *_NO_WORK, *_HOLDERS)):
        return False
    if next(module.children(), None) is not None:
        return isinstance(module, nn.MultiheadAttention)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):  # part of the one above
        return False
    home = kind.__module__
    return home.startswith("torch.nn.modules.") or "activation" in home.rpartition(".")[2] or bool(module._parameters)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _layer_row(path: str, module: nn.Module, fused: list[str]) -> Row | None:
    group = next((name for name, kind in _GROUPS.items() if isinstance(module, kind)), None)
    if group is None or layer_class(type(module)) is None:
        return None
    found = type(module)
    done = found.forward.__module__.startswith(fnn.__name__)
    left = module.__dict__.get(LEFT_ALONE)
    outcome = f"fastops.nn.{found.forward.__qualname__.partition('.')[0]}"
    outcome += f" fused with its {' and its '.join(fused)}" if fused else ""
    if not done:
        try:
            swapped_class(module)
            outcome = "not swapped" if left is None else f"not swapped: {left}"
        except LeftAlone as reason:
            outcome = f"not swapped: {reason}"
    return Row(path or "(model)", plain_class(found).__name__, outcome, done, group)
