"""The record of an op, the raw ops that torch's dispatcher knows of it, the one autograd Function, and how a call runs.

An `Op` holds all that the rest of the package needs to know of one function of `fastops.functional`: `fastops.dispatch`
asks it which way a call goes, `fastops.swap` and the compile backend what takes the place of what, and the commands
what to check, to time and to inspect. Each other file of this folder makes the records of one kernel file.

A call that goes to kernels or to oneDNN comes to `Op.run`. Its arguments are then those of the raw op
``torch.ops.fastops.<name>``, and these steps are left::

    a gradient is wanted   KernelFunction -> Op.compute -> the launcher in kernels/
    none is                                  Op.compute -> the launcher in kernels/
    torch is looking on    the raw op, which the dispatcher hands to whoever looks on (a compiler, a fake tensor,
                           a mode, the profiler) and in the end to KernelFunction and `Op.compute` as well

Kernels serve the forward pass and the first backward pass. Where a backward pass is itself recorded or transformed, the
gradients are the torch expression `Op.gradients`, which torch can differentiate and transform by itself.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels import private
from . import flops
from .accepts import PLAIN, Tensors
from .examples import Audit, Example

# Explanations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which way a call goes and why, forward and backward.

    ``backend`` is ``"triton"``, ``"onednn"`` or ``"torch"``. ``backward`` is one of them or ``"vendor"``: products by
    the library of the GPU's vendor (through torch), with a Triton kernel for what else there is to do.
    """

    backend: str
    reason: str
    backward: str = ""
    backward_reason: str = ""
    way: str = field(init=False, repr=False)  # what a raw op is told, and its backward pass runs by

    def __post_init__(self) -> None:
        if not self.backward:
            object.__setattr__(self, "backward", self.backend)
            object.__setattr__(self, "backward_reason", self.reason)
        object.__setattr__(self, "way", self.backward if self.backward == "vendor" else self.backend)

    def __str__(self) -> str:
        backward = "" if self.backward == self.backend else f"; backward {self.backward}: {self.backward_reason}"
        return f"{self.backend}: {self.reason}{backward}"


ATEN_IS_FASTER: Final = Explanation("torch", "on this processor ATen is at least as fast at this size")
LEAST_SAVED: Final = 2**28  # bytes: an H100 moves them in 90 us
HOST_TAKES_LONGER: Final = Explanation("torch", "at this size kernels save the GPU less time than they cost the host")
EXACT: Final = Explanation("torch", "the vendor's library multiplies float32 and float64 numbers several times as fast")
FUSES: Final = Explanation("triton", "one kernel does what takes torch several passes over memory")

# The record -----------------------------------------------------------------------------------------------------------


def passes(number: float) -> Callable[..., float]:
    """`Op.saved_bytes` of kernels that save so many passes over the first argument."""
    return lambda input, *_: number * input.numel() * input.element_size()


def save_all(
    needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], results: Any
) -> tuple[Tensors, tuple[Any, ...]]:
    """What a backward pass takes: every tensor of the call, every result but the first, and the options."""
    others = results[1:] if isinstance(results, tuple) else ()
    return (*arguments[: op.tensors], *others), arguments[op.tensors :]


@dataclass(eq=False, kw_only=True)
class Op:
    """All that the package knows of one function of `fastops.functional`.

    Its arguments come in two forms: those of a *call*, which `fastops.functional` hands on, and the *raw* ones that
    `raw_arguments(way, *call)` makes of them, of the op ``torch.ops.fastops.<name>``. They are the same where that is
    None. In a raw op tensors come first, and of these the differentiable ones, then options, and at last the way.

    A backward pass takes ``(grad_output, *saved, *options, *needs)``, with a bool for each differentiable argument, and
    returns a gradient for each, or a single one that is the same for all.
    """

    name: str
    # What torch has instead: functions, and the module if there is one. Its twin in fastops.nn has the same name.
    replaces: tuple[Callable[..., Any], ...] = ()
    module: type[torch.nn.Module] | None = None
    # The calls that it makes one, by name: ("linear", "relu"). Each is applied to the result of the one before.
    fuses: tuple[str, ...] | None = None

    # Which way a call goes. `accepts(*call)`: why no kernel takes these arguments, or None. `cpu` and `gpu` are what
    # "auto" does there, of the call: `cpu` is asked before `accepts`, `gpu` after. `onednn`: whether there is a product
    # that oneDNN could take. `autocast`: "lower" (the dtype that autocast has), "float32", or None (as it comes).
    # `cpu` comes first because it is asked most often and decides alone on a CPU: it must bear wrong arguments.
    # `saved_bytes(*call)`: how many bytes less than the torch expression kernels move on a GPU, forward and backward,
    # or what takes as long; it is asked before `accepts` too.
    # `saves_memory(*call)`: whether the torch expression would take more memory than the user allows.
    accepts: Callable[..., str | None]
    cpu: Callable[..., Explanation] = lambda *_: ATEN_IS_FASTER
    gpu: Callable[..., Explanation] = lambda *_: FUSES
    onednn: bool = False
    autocast: str | None = None
    saved_bytes: Callable[..., float] = lambda *_: 0
    saves_memory: Callable[..., bool] | None = None

    # `expression(*call)` is the differentiable torch expression, and `gradients(grad_output, ...)` that of its
    # gradients. `load()` imports Triton and returns the launchers of the forward and the backward pass; `plain` and
    # `plain_backward` give the same results without it, by oneDNN or ATen.
    expression: Callable[..., Tensor]
    gradients: Callable[..., Tensors]
    load: Callable[[], tuple[Callable[..., Any], Callable[..., Tensors]]]
    plain: Callable[..., Any]
    plain_backward: Callable[..., Tensors] | None = None

    # Raw ops: schemas without the way, and the results of both without values. `tensors` counts the tensors among the
    # raw arguments and `variables` those that are differentiable; `save` chooses what the backward pass gets, `finish`
    # makes the result of the call of that of the raw op. `overwrite` is a backward pass that may write into what was
    # saved, tried where the graph goes with it; None where it cannot.
    schema: str
    backward_schema: str
    fake: Callable[..., Any]
    fake_backward: Callable[..., Tensor | Sequence[Tensor]]
    tensors: int
    variables: int
    raw_arguments: Callable[..., tuple[Any, ...]] | None = None
    finish: Callable[..., Tensor] | None = None
    save: Callable[..., tuple[Tensors, tuple[Any, ...]]] = save_all
    overwrite: Callable[..., Tensors | None] | None = None
    flops: tuple[flops.Formula, ...] = ()  # of both raw ops, where torch counts any for the expression

    # What the commands call it with: to check it, and to time it at the sizes of real models. `audit` yields what
    # `fastops audit` compiles for a target; one record of each kernel file has it.
    examples: Sequence[Example] = ()
    timed: Sequence[Example] = ()
    audit: Callable[[Audit], Iterator[Any]] | None = None

    raw: Callable[..., Any] = field(init=False, repr=False)
    raw_backward: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        OPS[self.name] = self
        self.raw = _register(self.name, self.schema, self.compute_raw, self.fake, functools.partial(_autograd, self))
        name = f"{self.name}_backward"
        without = functools.partial(_without_derivatives, name)
        self.raw_backward = _register(
            name, self.backward_schema, self.compute_raw_backward, self.fake_backward, without
        )
        for op, formula in zip((self.name, name), self.flops, strict=False):
            flops.formulas[getattr(torch.ops.fastops, op)] = formula

    @functools.cached_property
    def launchers(self) -> tuple[Callable[..., Any], Callable[..., Tensors]]:
        """Of the forward and the backward pass."""
        return self.load()

    def run(self, way: str, call: tuple[Any, ...]) -> Tensor:
        """The result of a call that kernels or oneDNN take."""
        arguments = call if self.raw_arguments is None else self.raw_arguments(way, *call)
        direct = not _is_dynamo_compiling() and _include_set().raw_repr() in _IDLE and not _profiler_enabled()
        if direct:  # and now the rest of `_nobody_looks_on`, without the cost of a function call
            for argument in arguments:
                if isinstance(argument, Tensor) and (
                    type(argument) not in PLAIN or argument.is_neg() or _is_zero_tensor(argument)
                ):
                    direct = False
        if not direct:
            if not _is_dynamo_compiling():
                flops.tell_counters()
            results = self.raw(*arguments, way)
        elif _is_grad_enabled() and _any_requires_grad(*arguments):
            results = _apply(self, way, True, *arguments)
        else:
            results = self.compute(way, arguments)
        output: Tensor = results[0] if isinstance(results, tuple) else results
        return output if self.finish is None else self.finish(output, *call)

    def compute(self, way: str, arguments: tuple[Any, ...]) -> Any:
        """The results of the raw op."""
        if way.startswith("onednn") or (failed and not way.endswith(STRICT) and has_failed(self.name, arguments[0])):
            return self.plain(*arguments)
        try:
            return self.launchers[0](*arguments)
        except Exception as error:
            return self.recover(error, way, arguments)

    def recover(self, error: Exception, way: str, arguments: tuple[Any, ...]) -> Any:
        """The results without kernels if that was an error of theirs; else it is raised."""
        _warn_of(error, self.name, way, arguments)
        return self.plain(*arguments)

    def compute_raw(self, *arguments: Any) -> Any:
        """`compute` as the dispatcher calls it."""
        return self.compute(arguments[-1], arguments[:-1])

    def compute_backward(self, way: str, arguments: tuple[Any, ...]) -> Tensors:
        """The gradients, None where nobody needs one."""
        plain = self.plain_backward or self.gradients
        name = f"{self.name}_backward"
        if way.startswith("onednn") or (failed and not way.endswith(STRICT) and has_failed(name, arguments[0])):
            return plain(*arguments)
        try:
            launch = self.launchers[1]
            return launch(*arguments, vendor=True) if way == "vendor" else launch(*arguments)
        except Exception as error:
            _warn_of(error, name, way, arguments)
            return plain(*arguments)

    def compute_raw_backward(self, *arguments: Any) -> Any:
        """A schema has no optional results: an empty tensor stands for a gradient that nobody asked for."""
        found = self.compute_backward(arguments[-1], arguments[:-1])
        results = tuple(arguments[0].new_empty(0) if gradient is None else gradient for gradient in found)
        return results if len(results) > 1 else results[0]


OPS: Final[dict[str, Op]] = {}  # by name, in the order in which their files are imported

# torch's dispatcher ---------------------------------------------------------------------------------------------------

_library: Final = torch.library.Library("fastops", "DEF")
# By name: a lookup through modules at each call adds up.
_IDLE: Final = private.IDLE
_VMAP_MODE: Final = private.VMAP_MODE
_include_set: Final = private.included_keys
_profiler_enabled: Final = private.is_profiling
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_is_grad_enabled: Final = torch.is_grad_enabled
_any_requires_grad: Final = private.any_requires_grad
_transforms_active: Final = private.transforms_active
_is_zero_tensor: Final = private.is_zero_tensor
_levels: Final = private.forward_levels


def _register(
    name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``fastops::<name>``, whose last argument is the way."""
    arguments, results = schema.split(" -> ")
    _library.define(f"{name}({arguments}, str way) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastops::{name}", fake, lib=_library)
    _library.impl(name, autograd, "Autograd")
    raw: Callable[..., Any] = getattr(torch.ops.fastops, name).default
    return raw


def _autograd(op: Op, *arguments: Any) -> Any:
    """A raw op for the dispatcher's autograd."""
    flops.tell_counters()
    if _recorded(arguments):
        _refuse_transforms(op.name, arguments)
        return _apply(op, arguments[-1], False, *arguments[:-1])
    with private.below_autograd():
        return op.raw(*arguments)


def _without_derivatives(name: str, *arguments: Any) -> Any:
    """As `_autograd`, of gradients, which are not differentiated a second time here: `KernelFunction.backward`."""
    flops.tell_counters()
    if _recorded(arguments):
        raise RuntimeError(_NO_DERIVATIVES.format(name))
    with private.below_autograd():
        return getattr(torch.ops.fastops, name).default(*arguments)


_NO_DERIVATIVES: Final = (
    "fastops::{} is a raw op without such derivatives: differentiate the functions of fastops.functional instead"
)


def _recorded(arguments: tuple[Any, ...]) -> bool:
    """Whether a derivative of the result may be asked for: gradients, or tangents along with the arguments."""
    return (_is_grad_enabled() and _any_requires_grad(*arguments)) or _have_tangents(arguments)


def _have_tangents(arguments: tuple[Any, ...]) -> bool:
    if _levels._current_level < 0 or not private.is_forward_ad_enabled():
        return False
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _refuse_transforms(name: str, arguments: tuple[Any, ...]) -> None:
    if _transforms_active() or _have_tangents(arguments):
        raise RuntimeError(_NO_DERIVATIVES.format(name))


def _nobody_looks_on(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but call the implementation: then it can be left out."""
    if _include_set().raw_repr() not in _IDLE or _profiler_enabled():
        return False
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            type(argument) not in PLAIN or argument.is_neg() or _is_zero_tensor(argument)
        ):
            return False
    return True


# Autograd -------------------------------------------------------------------------------------------------------------


class KernelFunction(torch.autograd.Function):
    """Every op's: forward and first backward pass of a raw op."""

    @staticmethod
    def forward(ctx: Any, op: Op, way: str, nobody_looks_on: bool, *arguments: Any) -> Any:
        if nobody_looks_on and not way.startswith("onednn"):
            try:  # `Op.compute`, without the cost of a function call
                results = op.launchers[0](*arguments)
            except Exception as error:
                results = op.recover(error, way, arguments)
        elif nobody_looks_on:
            results = op.plain(*arguments)
        else:
            with private.below_autograd():
                results = op.raw(*arguments, way)
        ctx.op, ctx.way = op, way
        saved, ctx.options = op.save(ctx.needs_input_grad[3:], op, arguments, results)
        ctx.save_for_backward(*saved)
        if isinstance(results, tuple):
            ctx.mark_non_differentiable(*results[1:])
            ctx.set_materialize_grads(False)  # no zeros for the gradients of what has none
        return results

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> Any:
        op, way, all_needs = ctx.op, ctx.way, ctx.needs_input_grad
        if grad_output is None:
            return (None,) * len(all_needs)
        if private.is_any_autocast_enabled() and torch.is_autocast_enabled(grad_output.device.type):
            with torch.autocast(grad_output.device.type, enabled=False):  # the forward pass has cast what is to be cast
                return KernelFunction.backward(ctx, grad_output)
        needs = all_needs[3 : 3 + op.variables]
        arguments = (grad_output, *ctx.saved_tensors, *ctx.options, *needs)
        compiling = _is_dynamo_compiling()
        if _is_grad_enabled() or (
            not compiling and (_levels._current_level >= 0 or _transforms_active() or _include_set().has(_VMAP_MODE))
        ):
            if way.endswith(STRICT):
                raise fallback_error(f"{op.name}_backward", way, _DIFFERENTIATED)
            found = op.gradients(*arguments)
        elif compiling or not _nobody_looks_on(arguments):
            found = op.raw_backward(*arguments, way)
            found = found if isinstance(found, tuple) else (found,)
        elif op.overwrite is None or private.keeps_graph():
            found = op.compute_backward(way, arguments)
        else:  # the graph goes with this pass: what the forward pass made for it is nobody else's
            found = op.overwrite(*arguments) or op.compute_backward(way, arguments)
        each = found * len(needs) if len(found) == 1 else found  # one gradient alone is that of every argument
        gradients = [gradient if needed else None for gradient, needed in zip(each, needs, strict=True)]
        return (None, None, None, *gradients, *(None,) * (len(all_needs) - 3 - len(needs)))


# torch's own `apply` binds a signature at each call and looks for transforms, which never come here.
_apply: Final[Callable[..., Any]] = super(torch.autograd.Function, KernelFunction).apply

# Kernels that fail ----------------------------------------------------------------------------------------------------


class FallbackWarning(RuntimeWarning):
    """A kernel failed to compile or launch on a device that should run it; the torch expression runs instead."""


failed: Final[set[tuple[str, torch.device, torch.dtype]]] = set()  # raw ops whose kernels are not tried again


def has_failed(name: str, first: Tensor) -> bool:
    """Whether a kernel of the raw op ``name`` has failed for tensors like its ``first`` argument."""
    return (name, first.device, first.dtype) in failed and not _raises()


STRICT: Final = " strict"  # at the end of a way: from which no call may fall back
_DIFFERENTIATED: Final = "a backward pass that is differentiated or transformed itself takes the torch expression"


class FallbackError(RuntimeError):
    """A call would have fallen back to the torch expression inside ``fastops.backend(.., strict=True)``."""


def fallback_error(name: str, way: str, reason: str) -> FallbackError:
    """The error of an op that cannot go a strict way."""
    way = way.removesuffix(STRICT)
    return FallbackError(f"{name} would fall back from {way} to torch, which strict=True forbids: {reason}")


@contextlib.contextmanager
def failures_raised() -> Iterator[None]:
    """Inside, kernels that failed are tried again, and one that fails raises its `FallbackWarning`.

    It holds for the thread that enters it, and for autograd's own, in which backward passes on a GPU run.
    """
    own = threading.get_ident()
    _raising.append(own)
    try:
        yield
    finally:
        _raising.remove(own)


_raising: Final[list[int]] = []  # threads inside of `failures_raised`


def _raises() -> bool:
    if not _raising:
        return False
    return threading.get_ident() in _raising or isinstance(threading.current_thread(), threading._DummyThread)


def _warn_of(error: Exception, name: str, way: str, arguments: tuple[Any, ...]) -> None:
    """Warn that Triton could not compile or launch a kernel, which is not tried again; raise any other error.

    An exhausted memory or a stopped device is no failure of the kernel. On a strict way every error is raised.
    """
    if way.endswith(STRICT):
        raise error
    from triton.errors import TritonError

    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or not isinstance(
        error, (RuntimeError, TritonError)
    ):
        raise error
    if any(words in str(error) for words in ("out of memory", "device-side assert", "illegal memory access")):
        raise error
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    shapes, device = ", ".join(str(tuple(tensor.shape)) for tensor in tensors), tensors[0].device
    warning = f"the Triton kernel of {name} failed for shapes {shapes} on {device}; torch runs instead: {error}"
    if _raises():
        raise FallbackWarning(warning) from error
    if not has_failed(name, tensors[0]):
        failed.add((name, device, tensors[0].dtype))
        warnings.warn(warning, FallbackWarning, stacklevel=4)


# What gradients share -------------------------------------------------------------------------------------------------


def masked(grad_output: Tensor, output: Tensor | None) -> Tensor:
    """The gradient before a ReLU: ``grad_output`` where not ``output <= 0``. Without a ReLU ``output`` is None."""
    if output is None:
        return grad_output
    grad: Tensor = torch.ops.aten.threshold_backward(grad_output, output, 0)
    return grad


def wanted(*gradients: Tensor | None, needs: tuple[bool, ...]) -> Tensors:
    """The gradients that are needed."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
