"""`fastops.verify`: does a model compute with fastops what it computes without?"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from . import dispatch, functional
from .accuracy import error_share
from .ops.op import failures_raised
from .recognition import LEFT_ALONE
from .swap import check, original_class, swap, unswap
from .tuning import random_state_kept

DRAWS: Final = 5  # of numbers near to the given ones, where a tensor seems to be wrong
ONEDNNS = 4  # times the error that others may have
_EXACT: Final = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64) | {
    torch.complex64: torch.complex128
}
_OWN: Final = {torch.float64: torch.float32, torch.complex128: torch.complex64}
Results = dict[str, Tensor | None]
Dtypes = Mapping[torch.dtype, torch.dtype]


@dataclass(frozen=True)
class Difference:
    """A tensor that is wrong with fastops: in which mode, its name, and what is wrong with it."""

    mode: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.mode}: {self.name}: {self.reason}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found. ``str(verification)`` lists it, and its truth value is `ok`.

    ``compared`` counts tensors, and ``ways`` the calls of fastops by the backend that took them.
    """

    differences: tuple[Difference, ...]
    compared: int
    ways: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """Whether something of fastops ran and nothing differs."""
        return not self.differences and bool(self.ways.keys() - {"torch"})

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        where = ", ".join(f"{count} on {way}" for way, count in self.ways.items()) or "none"
        ran = "calls of fastops" if self.ways.keys() - {"torch"} else "nothing of fastops ran, its calls"
        counts = f"{self.compared} tensors compared, {len(self.differences)} differ"
        return "\n".join([*map(str, self.differences), counts, f"{ran}: {where}"])


def verify(
    model: nn.Module, example_input: Any = (), *, example_kwargs: Mapping[str, Any] | None = None
) -> Verification:
    """Compare a model with its plain self: outputs, gradients, and the buffers afterwards, in train and eval mode.

    The two have the same weights, buffers, inputs and random state; a model that is not swapped is compared with a
    swapped copy. fastops goes the way that `backend` selects; if all of it takes the torch expression, that is not ok.
    The error of each tensor against a run in float64 may be at most twice torch's own in the same dtype, plus one
    rounding; four times as much where oneDNN multiplies, which adds up in another order (3.5 times torch's own error
    was seen in sums of 2048 products). Where it is larger, it is measured again with numbers near to the given ones:
    torch's own error in few numbers may be nothing by luck.

    Copies of the model run: it stays as it is, with its gradients and mode, and so does the random state. Hooks run,
    and what was compiled runs uncompiled.

    Args:
        model: any module, a loss too, that can be copied (`copy.deepcopy`) and runs in float64 as well.
        example_input: what the model is called with: one argument, or a tuple of several. Gradients of those that
            require one are compared.
        example_kwargs: keyword arguments of that call.

    Raises:
        TypeError: if ``model`` is not a module or returns no tensor.
        FallbackWarning: if a kernel cannot be compiled or launched.
        RuntimeError: where a call of the model raises one, or cannot be copied or run in float64.
    """
    check("verify", model)
    example = example_input if isinstance(example_input, tuple) else (example_input,), dict(example_kwargs or {})
    given = [*model.parameters(), *model.buffers(), *tree_leaves(example)]
    own = next((t.dtype for t in given if isinstance(t, Tensor) and t.is_floating_point()), torch.float32)
    devices = {tensor.device for tensor in given if isinstance(tensor, Tensor)}
    swapped = any(
        original_class(type(module)) is not type(module) or LEFT_ALONE in module.__dict__ for module in model.modules()
    )
    subject = _Subject(model, *example, own, devices, swapped)
    differences, compared, ways = list[Difference](), 0, Counter[str]()
    with torch.inference_mode(False), failures_raised(), torch.compiler.set_stance("force_eager"):
        for mode, training, gradients in (("train", True, True), ("eval", False, True), ("no_grad", False, False)):
            with torch.set_grad_enabled(gradients):
                run = partial(subject.run, ways, training)
                count, found = _compare(run, ways, doubled=own is torch.float64)
            compared += count
            differences += [Difference(mode, name, reason) for name, reason in found.items()]
    return Verification(tuple(differences), compared, ways)


# Runs -----------------------------------------------------------------------------------------------------------------


class _Subject(NamedTuple):
    """A model and what it is called with."""

    model: nn.Module
    words: tuple[Any, ...]
    keywords: dict[str, Any]
    own: torch.dtype
    devices: set[torch.device]
    swapped: bool

    def run(self, ways: Counter[str], training: bool, kind: str, draw: int) -> Results:
        """One step of a copy: with fastops ("ours"), plain ("torch"), or plain in float64 ("exact")."""
        dtypes: Dtypes = {"ours": {}, "torch": _OWN, "exact": _EXACT}[kind]
        there = dtypes.get(self.own, self.own)
        with random_state_kept(self.devices):
            model = copy.deepcopy(self.model)
            if kind != "ours":
                unswap(model)
            elif not self.swapped:
                swap(model)
            if model.training != training:
                model.train(training)
            near = _near(draw)
            if draw > 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.copy_(near(parameter))
            if dtypes:
                _convert(model, dtypes)
            words, keywords = _mapped(lambda tensor: _input(tensor, near, dtypes), (self.words, self.keywords))
            modes: list[AbstractContextManager[Any]] = [_Ways(Counter() if draw else ways), nullcontext()]
            if kind != "ours":
                modes = [dispatch.backend("torch"), nullcontext() if there is self.own else _SameDraws(self.own, there)]
            try:
                with modes[0], modes[1]:
                    return _step(model, words, keywords)
            except RuntimeError as error:
                if kind != "exact":
                    raise
                raise RuntimeError(f"verify needs a model that runs in float64 as well: {error}") from error


def _mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with its tensors mapped, those in dataclasses too."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        mapped = copy.copy(leaf)
        for field in fields(leaf):
            object.__setattr__(mapped, field.name, _mapped(function, getattr(leaf, field.name)))  # frozen or not
        return mapped

    return tree_map(of_leaf, tree)


def _near(draw: int) -> Callable[[Tensor], Tensor]:
    """Gives the first draw as it is, and later ones with each number off by up to a thousandth."""
    generator = torch.Generator().manual_seed(draw)

    def near(tensor: Tensor) -> Tensor:
        if draw == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return tensor * (1 + torch.rand(tensor.shape, generator=generator) / 1000).to(tensor)

    return near


def _input(tensor: Tensor, near: Callable[[Tensor], Tensor], dtypes: Dtypes) -> Tensor:
    drawn = near(tensor.detach().clone())
    return drawn.to(dtypes.get(drawn.dtype, drawn.dtype)).requires_grad_(tensor.requires_grad)


def _convert(model: nn.Module, dtypes: Dtypes) -> None:
    """Give the model's parameters, buffers and other tensors other dtypes."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtypes.get(tensor.dtype, tensor.dtype))

    model._apply(convert)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, convert(value))


def _step(model: nn.Module, words: tuple[Any, ...], keywords: dict[str, Any]) -> Results:
    """Outputs, and gradients of all that requires one; buffers afterwards."""
    # Named as no parameter can be.
    inputs = _leaves("the input", words if len(words) != 1 else words[0]) | _leaves("the keyword", keywords)
    outputs = _leaves("output", model(*words, **keywords))
    if not outputs:
        raise TypeError("verify expects a model that returns tensors")
    results: Results = dict(outputs)
    roots = [output for output in outputs.values() if output.requires_grad]
    variables = {n: tensor for n, tensor in (*model.named_parameters(), *inputs.items()) if tensor.requires_grad}
    if roots and variables:
        gradients = torch.autograd.grad(roots, [*variables.values()], [*map(_ramp, roots)], allow_unused=True)
        results |= {f"gradient of {name}": found for name, found in zip(variables, gradients, strict=True)}
    results |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return {name: None if tensor is None else _dense(tensor.detach()) for name, tensor in results.items()}


def _leaves(name: str, tree: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            found[name + keystr(path)] = leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                found |= _leaves(f"{name}{keystr(path)}.{field.name}", getattr(leaf, field.name))
    return found


def _ramp(output: Tensor) -> Tensor:
    """The gradient of an output: eighths between -1 and 1, which are exact in every dtype."""
    ramp = torch.arange(output.numel(), device=output.device).reshape(output.shape) * 5 % 17 / 8 - 1
    return ramp.to(output.dtype)


def _dense(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense.clone()


class _Ways(TorchFunctionMode):
    """Counts the calls of fastops by the backend that takes them."""

    def __init__(self, ways: Counter[str]) -> None:
        super().__init__()
        self.ways = ways

    def __torch_function__(self, function: Any, types: Any, words: Any = (), options: Any = None) -> Any:
        options = options or {}
        if getattr(function, "__module__", "") == functional.__name__:
            self.ways[dispatch.explain(function.__name__, *words, **options).backend] += 1
        return function(*words, **options)


class _SameDraws(TorchDispatchMode):
    """Draws in dtype ``own`` what is to be drawn in dtype ``there``: from one random state each gives other numbers."""

    def __init__(self, own: torch.dtype, there: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own, self.there = own, there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def exchange(old: torch.dtype, new: torch.dtype, tree: Any) -> Any:
            def other(value: Any) -> Any:
                if isinstance(value, Tensor) and value.dtype is old:
                    return value.to(new)
                return new if value is old else value

            return tree_map(other, tree)

        met = [getattr(value, "dtype", value) for value in tree_leaves((args, kwargs))]
        draws = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.__name__
        if not draws or self.there not in met:
            return func(*args, **kwargs)
        own_args, own_kwargs = exchange(self.there, self.own, (args, kwargs))
        drawn = func(*own_args, **own_kwargs)
        if func is torch.ops.aten.native_dropout.default:
            (input, p, *_), (_, mask) = args, drawn
            return input * mask * (1 / (1 - p) if p < 1 else 0), mask
        if func._schema.is_mutable:
            return args[0].copy_(own_args[0])
        return exchange(self.own, self.there, drawn)


# The comparison -------------------------------------------------------------------------------------------------------


def _compare(run: Callable[[str, int], Results], ways: Counter[str], doubled: bool) -> tuple[int, dict[str, str]]:
    """How many tensors were compared, and what is wrong with which. ``doubled``: torch runs in float32 for float64."""
    compared, wrong, suspects = 0, dict[str, str](), dict[str, list[list[Tensor]]]()
    for draw in range(DRAWS):
        ours, torchs, exact = (run(kind, draw) for kind in ("ours", "torch", "exact"))
        if draw == 0:
            if not ours.keys() == torchs.keys() == exact.keys():
                return 1, {"output": "it is another collection of tensors"}
            compared = len(ours)
            for name, result in ours.items():
                reason = _mismatch(name, result, torchs[name], exact[name], _OWN if doubled else {})
                if reason:
                    wrong[name] = reason
                elif result is not None:
                    suspects[name] = []
        for name, triples in suspects.items():
            triple = [found[name] for found in (ours, torchs, exact)]
            tensors = [tensor for tensor in triple if tensor is not None]
            if len(tensors) == 3 and len({tensor.shape for tensor in tensors}) == 1:
                triples.append([*tensors[:2], tensors[2].double()])
        most = ONEDNNS if ways["onednn"] else 1
        suspects = {name: triples for name, triples in suspects.items() if _share(triples) > most}
        if not suspects:
            break
    for name, triples in suspects.items():
        shares = sorted(_share([triple]) for triple in triples)
        if shares[len(shares) // 2] > most:  # in most draws: near zero a ReLU may fall on the other side in one of them
            *found, truth = _together(triples)
            error, own = (float((result - truth).abs().max()) for result in found)
            wrong[name] = (
                f"{max(map(_differing, triples))} elements differ"
                if not found[0].is_floating_point()
                else f"error {error:.2g}, {_share(triples):.3g} times what is allowed: "
                f"twice torch's own of {own:.2g} against float64, plus one rounding"
            )
    return compared, wrong


def _together(triples: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat([tensor.flatten() for tensor in each]) for each in zip(*triples, strict=True)]


def _share(triples: list[list[Tensor]]) -> float:
    """The share of the allowed error; integers must be equal."""
    if not triples[0][0].is_floating_point():
        return float("inf") if any(map(_differing, triples)) else 0.0
    return error_share(*_together(triples))


def _differing(triple: list[Tensor]) -> int:
    return int((triple[0] != triple[1]).sum())


def _mismatch(name: str, result: Tensor | None, expected: Tensor | None, exact: Tensor | None, dtypes: Dtypes) -> str:
    """What is wrong before any error is measured, or nothing."""
    if result is None or expected is None or exact is None:
        return "" if result is expected is exact else "there is one with fastops or without, not with both"
    if dtypes.get(result.dtype, result.dtype) is not expected.dtype or result.shape != expected.shape:
        return f"it is {result.dtype} {tuple(result.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not result.is_floating_point():
        return ""
    lost = exact.shape != expected.shape
    if name.startswith("output") and not lost and exact.numel():
        lost = bool(((expected - exact).abs() > torch.finfo(expected.dtype).eps ** 0.5 * exact.abs().max()).any())
    return "torch's own run in float64 shares less than half of the digits: nothing can be said" if lost else ""
