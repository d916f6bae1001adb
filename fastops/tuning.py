"""`fastops.tune`: measure the ways of every call that a model makes, here and now, and remember which won."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from . import dispatch, functional, tuning_cache
from .kernels import configs, private
from .ops.op import Explanation, FallbackWarning, failures_raised
from .progress import tracked
from .timing import alone, in_turns

Timer = Callable[[Callable[[], object]], float]

TURNS: Final = 5
LOOKUP: Final = 5e-6  # seconds that it takes at each call to find that another way than the rule's has won
LEAST_GAIN: Final = 0.02  # of the rule's time: less is noise, and no reason to leave the rule


@dataclass(frozen=True)
class Choice:
    """One call of the model and the seconds that it takes each way, with its backward pass where ``gradients`` is true.

    ``way`` is the fastest, or the one that the rule takes where no other is clearly faster or the turns disagree about
    that (``agreed`` is false), as on a busy machine.
    """

    op: str
    shapes: str
    gradients: bool
    seconds: dict[str, float]
    way: str
    agreed: bool = True


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. ``str(tuning)`` is a table.

    ``memory_format`` is the faster one of the whole model, given to ``fastops.swap(model, memory_format=..)``; None
    where there is no convolution in two dimensions or the model runs in its own alone. ``path`` is the file that keeps
    the choices; None if none could be written.
    """

    choices: tuple[Choice, ...]
    memory_format: torch.memory_format | None
    format_seconds: dict[torch.memory_format, float]
    path: Path | None

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            times = "  ".join(f"{way} {1e6 * seconds:.0f} us" for way, seconds in choice.seconds.items())
            direction = "forward+backward" if choice.gradients else "forward"
            doubt = "" if choice.agreed else "; the turns disagree, so the rule stays"
            lines.append(f"{choice.op} {choice.shapes}, {direction}: {choice.way}  ({times}{doubt})")
        if not self.choices:
            lines.append("no call of fastops was seen: swap the model first, and tune it before torch.compile wraps it")
        for memory_format, seconds in self.format_seconds.items():
            lines.append(f"whole model, {str(memory_format).removeprefix('torch.')}: {1e3 * seconds:.2f} ms")
        lines.append("kept nowhere" if self.path is None else f"kept in {self.path}")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    example_input: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    timer: Timer | None = None,
) -> Tuning:
    """Measure each call of a swapped model every way that it can go, and let the fastest be taken from now on.

    Which calls and shapes there are shows one run of ``model(example_input)``. Each is timed with and without its
    backward pass, in turns: Triton's kernels against the vendor's library (through ATen) on a GPU, oneDNN against ATen
    on a CPU. The winners are kept in the user's cache folder (``FASTOPS_CACHE_DIR`` names another) for this device and
    these versions of torch, Triton and fastops; later processes read them there. Another batch size is another shape,
    and goes by the rule until it is tuned too. Inside ``torch.compile`` the rule is taken.

    The model is left as it is: parameters, gradients, buffers, mode and random state; its hooks run. A model with
    convolutions in two dimensions is also timed as a whole in both memory formats, on a copy.

    Args:
        model: on the device to tune for; swapped, or nothing is measured.
        example_input: what the model is called with: one argument, or a tuple of several.
        example_kwargs: keyword arguments of that call.
        timer: gives the seconds that a callable takes; the default looks at the clock and waits for the GPU.

    Raises:
        TypeError: if ``model`` is not a module.
        RuntimeError: if another backend than ``"auto"`` is selected, in one of several processes of a process group, or
            where the call of the model raises one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune expects a torch.nn.Module, not {type(model).__name__}")
    if dispatch.selected_backend() != "auto":
        raise RuntimeError(f"backend {dispatch.selected_backend()!r} is selected: tune measures what 'auto' chooses")
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise RuntimeError("tune measures one process: call it in one before training; all ranks read what it found")
    example = Example(example_input, example_kwargs)
    with one_at_a_time, torch.inference_mode(False):
        before = configs.measured.copy()
        try:
            return _tune(model, example, timer)
        except BaseException:  # an interrupt too must leave no tile in use that did not win; it is raised again
            configs.set_tiles({**dict.fromkeys(configs.measured), **before})
            raise


one_at_a_time = threading.Lock()


def _tune(model: nn.Module, example: Example, timer: Timer | None) -> Tuning:
    formats = _formats(model)
    calls = calls_of(model, example)
    try:
        calls += [call for one in list(formats.values())[1:] for call in calls_of(one, example)]
    except RuntimeError as error:  # of a `view` in the model, for example
        warnings.warn(f"memory formats are not compared: {error}", stacklevel=3)
        formats = {}
    choices, won, tiles = [], dict[torch.device, dict[tuning_cache.Key, str | None]](), tuning_cache.Tiles()
    groups = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            groups += [
                (gradients, device, key, rule.backend, alike) for (device, key, rule), alike in grouped(calls).items()
            ]
    # Tiles are shared: the ways are timed with those that are there in the end.
    turns = [(tiling, *group) for tiling in (True, False) for group in groups]
    for tiling, gradients, device, key, usual, alike in tracked(turns, len(turns), lambda turn: turn[-1][0].name):
        clock = timer or partial(alone, {device})
        with torch.set_grad_enabled(gradients):
            if tiling:
                tiles |= _choose_tiles(alike, clock)
            else:
                choices.append(_choose(alike, usual, clock))
                way = choices[-1].way
                won.setdefault(device, {})[key] = None if way == usual else way
    files = [
        tuning_cache.add(device, ways, {product: tile for product, tile in tiles.items() if product[0] == device})
        for device, ways in won.items()
    ]
    dispatch.tuned = dispatch.tuned or bool(won)
    seconds = _time_formats(formats, example, timer or partial(alone, _devices(model)))
    fastest = next(iter(seconds), None)  # the model's own, unless another is clearly faster
    for memory_format, time_ in seconds.items():
        if time_ < (1 - LEAST_GAIN) * seconds[fastest or memory_format]:
            fastest = memory_format
    return Tuning(tuple(choices), fastest, seconds, files[0] if files else None)


class Example:
    """What a model is called with, made anew for each call: a model may change its input."""

    def __init__(self, input: Any, keywords: Mapping[str, Any] | None) -> None:
        self._words = input if isinstance(input, tuple) else (input,)
        self._keywords = dict(keywords or {})

    def call(self, model: nn.Module) -> tuple[Any, list[Tensor]]:
        """The output, and the tensors of the input that require gradients."""
        words, keywords = tree_map(_copied, (self._words, self._keywords))
        leaves = [leaf for leaf in tree_leaves((words, keywords)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return model(*words, **keywords), leaves


def _copied(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class Call:
    """A call of `fastops.functional` that a model made, to be made again on the same memory."""

    def __init__(self, function: Callable[..., Tensor], words: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.name = function.__name__
        self._function = function
        detached = _apart if self.name.startswith("batch_norm") else _detached  # which would move the statistics
        self._words = tuple(map(detached, words))
        self._options = {name: detached(value) for name, value in options.items()}
        self._tensors = [value for value in (*self._words, *self._options.values()) if isinstance(value, Tensor)]
        self._recorded = torch.is_grad_enabled()
        kind = self.device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @contextmanager
    def _as_met(self) -> Iterator[None]:
        """Autocast as it was, and gradients recorded where they are now and were then."""
        recorded = torch.set_grad_enabled(torch.is_grad_enabled() and self._recorded)
        with recorded, torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            yield

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._tensors[0].device

    @property
    def shapes(self) -> str:
        """The shapes of its tensors."""
        return " ".join("x".join(map(str, tensor.shape)) or "()" for tensor in self._tensors)

    def way(self) -> Explanation:
        """The way that it goes now, where gradients are recorded or not as they are now."""
        with self._as_met():
            return dispatch.explain(self.name, *self._words, **self._options)

    def can_go(self, way: str) -> bool:
        """Whether the backend ``way`` would take it."""
        try:
            with dispatch.backend(way):
                return self.way().backend == way
        except RuntimeError:  # Triton cannot run here
            return False

    def run(self) -> None:
        """Make the call, and its backward pass where gradients are recorded."""
        with self._as_met():
            output = self._function(*self._words, **self._options)
        if output.requires_grad:
            leaves = [tensor for tensor in self._tensors if tensor.requires_grad]
            torch.autograd.grad(output, leaves, torch.ones_like(output))


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():  # class indices: what comes into their memory later may be none
        return value.clone()
    return value.detach().requires_grad_(value.requires_grad)


def _apart(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, words: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options = options or {}
        own = getattr(function, "__module__", "") == functional.__name__
        if own and not private.transforms_active():
            self.calls.append(Call(function, words, options))
        return function(*words, **options)


def _devices(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


@contextmanager
def random_state_kept(devices: set[torch.device]) -> Iterator[None]:
    """Put the random state of these devices, of Python and of NumPy back afterwards."""
    import numpy as np  # not above: nothing else here needs it

    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device.index for device in accelerators], device_type=kind):
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put buffers and random state back afterwards."""
    homes = [(module._buffers, module._buffers.copy()) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with random_state_kept(_devices(model)):
            yield
    finally:
        for home, before in homes:
            home.clear()
            home.update(before)
        with torch.no_grad():
            for buffer, content in buffers:
                if not torch.equal(buffer, content):  # a copy for nothing would look like a change to autograd
                    buffer.copy_(content)


def calls_of(model: nn.Module, example: Example) -> list[Call]:
    """The calls of `fastops.functional` in one run of ``model``, which leaves the model as it is."""
    with _kept(model), torch.enable_grad(), _Recorder() as recorder:
        example.call(model)
    return recorder.calls


def grouped(calls: list[Call]) -> dict[tuple[torch.device, tuning_cache.Key, Explanation], list[Call]]:
    """The calls that no decision can tell apart, by what it can tell and the way that the rule takes."""
    groups: dict[tuple[torch.device, tuning_cache.Key, Explanation], list[Call]] = {}
    for call in calls:
        with dispatch.by_the_rule() as keys:
            rule = call.way()
        if keys and keys[0][1] == torch.is_grad_enabled():  # else it has no backward pass
            groups.setdefault((call.device, keys[0], rule), []).append(call)
    return groups


def _choose_tiles(calls: list[Call], timer: Timer) -> tuning_cache.Tiles:
    """For each matrix product in the kernels of calls that are alike, a tile clearly faster than the table's, or None.

    They are in use from now on.
    """
    if not calls[0].can_go("triton"):
        return {}

    def run() -> None:
        for call in calls:
            call.run()

    found: tuning_cache.Tiles = {}
    with dispatch.backend("triton"), failures_raised():
        for product in _products(run):
            device, dtype, precision, *_ = product
            usual = configs.measured.get(product)
            tiles = tuning_cache.candidates(device, dtype, precision)
            times: dict[configs.Tile | None, list[float]] = {tile: [] for tile in (usual, None, *tiles)}
            for tile in in_turns(times, TURNS):  # None is the table's own choice
                configs.set_tiles({product: tile})
                try:
                    times[tile].append(timer(run))
                except (FallbackWarning, torch.OutOfMemoryError):  # this tile does not compile or fit here
                    del times[tile]
            best = min(times, key=lambda tile: min(times[tile]), default=None)
            if best is not None and None in times and not _faster(times[best], times[None])[0]:
                best = None
            found[product] = best
            configs.set_tiles({product: best})
    return found


def _products(run: Callable[[], None]) -> list[configs.Product]:
    """The matrix products that ask for a tile while something runs."""
    met = configs.met = set[configs.Product]()
    try:
        with suppress(FallbackWarning):
            run()
        return sorted(met, key=str)
    finally:
        configs.met = None


def _choose(calls: list[Call], usual: str, timer: Timer) -> Choice:
    """Time calls that no decision can tell apart, each way in turns."""

    def run() -> None:
        for call in calls:
            call.run()

    times = {way: list[float]() for way in tuning_cache.WAYS if calls[0].can_go(way)}
    with failures_raised():
        for way in in_turns(times, TURNS):
            try:
                with dispatch.backend(way):
                    times[way].append(timer(run))
            except (FallbackWarning, torch.OutOfMemoryError):  # no way for this call here
                del times[way]
    seconds = {way: min(own) for way, own in times.items()}  # other programs only add to it
    best, agreed = min(seconds, key=lambda way: seconds[way], default=usual), True
    if usual in seconds and best != usual:
        faster, agreed = _faster(times[best], times[usual], LOOKUP * len(calls))
        best = best if faster else usual
    return Choice(calls[0].name, calls[0].shapes, torch.is_grad_enabled(), seconds, best, agreed)


def _faster(own: list[float], usual: list[float], cost: float = 0.0) -> tuple[bool, bool]:
    """Whether one is clearly faster in every turn, ``cost`` included, and whether the turns agree if it seems to be."""
    if min(own) + cost > (1 - LEAST_GAIN) * min(usual):
        return False, True
    agreed = all(mine + cost < theirs for mine, theirs in zip(own, usual, strict=True))
    return agreed, agreed


def _formats(model: nn.Module) -> dict[torch.memory_format, nn.Module]:
    """The model as it is, and a copy in the other memory format; nothing where that does not matter."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        return {}
    own, other = torch.contiguous_format, torch.channels_last
    try:
        if not all(convolution.weight.is_contiguous() for convolution in convolutions):
            own, other = other, own
        return {own: model, other: copy.deepcopy(model).to(memory_format=other)}
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # what cannot be copied says so in many ways
        warnings.warn(f"memory formats are not compared: no copy of the model can be made: {error}", stacklevel=4)
        return {}


def _time_formats(
    formats: dict[torch.memory_format, nn.Module], example: Example, timer: Timer
) -> dict[torch.memory_format, float]:
    """Seconds of a step of each: forward, and backward where the model trains."""

    def step(model: nn.Module) -> None:
        with torch.set_grad_enabled(model.training):
            output, leaves = example.call(model)
            leaves += [parameter for parameter in model.parameters() if parameter.requires_grad]
            outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if outputs and leaves:
                torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)), allow_unused=True)

    times = {memory_format: list[float]() for memory_format in formats}
    for memory_format in in_turns(formats, TURNS):
        with _kept(formats[memory_format]):
            times[memory_format].append(timer(partial(step, formats[memory_format])))
    return {memory_format: min(own) for memory_format, own in times.items()}
