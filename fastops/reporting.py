"""`fastops.report`: what `fastops.swap` did to a model, or would do, from nothing but the model and its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from . import nn as fnn
from .ops.activations import MODULES
from .ops.conv import is_channels_last
from .promises import LEFT_ALONE, plain_class
from .reading import NORM_LAYERS, OTHERS, RELUS, findings, group_of, is_scripted
from .source import LeftAlone
from .swap import check, layer_class, swapped_class
from .tuning import Example, calls_of

_GROUPS: Final = {
    "linear layers": nn.Linear,
    "convolutions": nn.modules.conv._ConvNd,
    "losses": nn.modules.loss._Loss,
}
_VERBS: Final = {RELUS: "fused", OTHERS: "fused", NORM_LAYERS: "folded"}


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
        """The number of calls of activations that run in one call with the layer or the sum before them."""
        return sum(row.done for row in self.rows if row.group in (RELUS, OTHERS))

    @property
    def folded(self) -> int:
        """The number of batch norms that may run as part of the convolution before them in evaluation.

        In a call they do where the weight is much smaller than the output, and backend "torch" is not selected.
        """
        return sum(row.done for row in self.rows if row.group == NORM_LAYERS)

    def __str__(self) -> str:
        cells = [(row.name, row.layer, row.outcome) for row in self.rows]
        first, second = (max((len(cell[column]) for cell in cells), default=0) for column in (0, 1))
        lines = [f"{name:{first}}  {layer:{second}}  {outcome}" for name, layer, outcome in cells]
        totals = []
        for group in (*_GROUPS, RELUS, OTHERS, NORM_LAYERS):
            done = [row.done for row in self.rows if row.group == group]
            if done:
                totals.append(f"{sum(done)} of {len(done)} {group} {_VERBS.get(group, 'swapped')}")
        return "\n".join([*lines, ", ".join(totals) or "nothing here that fastops knows", *self.notes])


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
        rows += calls.get(path, [])
    notes = [_CHANNELS_LAST] if any(map(_is_channels_last, modules.values())) else []
    unknown = sorted({plain_class(type(module)).__name__ for module in modules.values() if _is_unknown(module)})
    notes += [f"not covered: {', '.join(unknown)}"] if unknown else []
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


def _is_unknown(module: nn.Module) -> bool:
    """Whether it is an activation, by the file that defines its class, that kernels do not have."""
    found = plain_class(type(module))
    is_activation = "activation" in found.__module__.rpartition(".")[2]
    others = (nn.MultiheadAttention, nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return is_activation and found not in MODULES and not isinstance(module, others)


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
