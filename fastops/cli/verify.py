"""``fastops verify``: check the gradients and the accuracy of every operation on this machine."""

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.accuracy import error_share, float32_products, times_torchs
from fastops.cli import CommandError
from fastops.cli.environment import check_backend, pick_device, run_interpreted
from fastops.cli.examples import draw, torch_function
from fastops.cli.table import Table
from fastops.ops import OPS, Op
from fastops.ops.examples import LARGE, SMALL, TINY, Example, Named, Sizes
from fastops.ops.op import STRICT, failures_raised
from fastops.progress import tracked

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DERIVATIVES = ("gradcheck", "forward AD", "gradgrad")
BY_DESIGN = DERIVATIVES[1:]  # the torch expression, whatever computes the forward and the first backward pass
# Inputs per case and dtype: the largest error of a single draw, torch's or ours, is a matter of luck. Where ours is too
# large, more are drawn. The interpreter, which takes its time, begins with one.
DRAWS, MOST_DRAWS = 4, 16
ELEMENTS = 20  # With more to differentiate by, or interpreted, derivatives are checked along random directions.
NOT_CHECKED = "-"
NOTHING_RAN = "nothing of fastops ran here: every check compared torch with itself"


class Case(NamedTuple):
    """One way to call an operation."""

    op: Op
    example: Example

    @property
    def name(self) -> str:
        return f"{self.op.name} / {self.example.name}"


CASES = [Case(op, example) for op in OPS.values() for example in op.examples]

# Checks ---------------------------------------------------------------------------------------------------------------


class CheckError(Exception):
    """What a check found wrong, in one line."""


@dataclass(frozen=True)
class Outcome:
    """What one check says in its cell, what computed the gradients, and what it found wrong, if anything."""

    cell: str
    backend: str
    failure: str | None = None


def _draw(
    case: Case, seed: int, dtype: torch.dtype, device: torch.device, sizes: Sizes | None = None
) -> tuple[Named, Named]:
    """The arguments of the case. A value has no more digits than float32."""
    sizes = sizes or (SMALL if device.type == "cpu" else LARGE)
    return draw(case.example, sizes, torch.Generator().manual_seed(seed), dtype, device)


@contextmanager
def _backward_passes(op: Op) -> Iterator[set[str]]:
    """The ways that backward passes inside take: none if torch differentiates the torch expression.

    A recorded backward pass, for second derivatives, counts as "torch" if it is the torch expression of the gradients.
    """
    ways: set[str] = set()
    compute, gradients = Op.compute_backward, op.gradients

    def recorded(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            ways.add("torch")
        return gradients(*arguments)

    def observed(op: Op, way: str, arguments: tuple[Any, ...]) -> Any:
        ways.add(way.removesuffix(STRICT))
        return compute(op, way, arguments)

    with patch.object(Op, "compute_backward", observed), patch.object(op, "gradients", recorded):
        yield ways


def _check_derivatives(case: Case, kind: str, variables: Named, constants: Named) -> None:
    def function(*values: Tensor) -> Tensor:
        arguments = dict(zip(variables, values, strict=True))
        result: Tensor = getattr(FF, case.op.name)(**arguments, **constants, **case.example.options)
        return result

    values = [tensor.requires_grad_() for tensor in variables.values()]
    torch.manual_seed(0)  # torch draws directions and outer gradients by itself
    fast = dispatch._INTERPRETER or sum(map(torch.numel, values)) > ELEMENTS
    if kind == "gradgrad":
        gradgradcheck(function, values, fast_mode=fast)
    else:
        forward = kind == "forward AD"
        gradcheck(function, values, check_forward_ad=forward, check_backward_ad=not forward, fast_mode=fast)


def value_and_gradients(
    function: Callable[..., Tensor],
    variables: Named,
    constants: Named,
    options: Named,
    dtype: torch.dtype,
    counted: Tensor | None = None,
) -> list[Tensor]:
    """The result in ``dtype`` and its gradients from two backward passes, the second with an expanded grad_output.

    Where ``counted`` is False the gradient of the result is 0.
    """
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in variables.values()]
    fixed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in constants.items()}
    result = function(**dict(zip(variables, cast, strict=True)), **fixed, **options)
    # Exact in every dtype: eighths between -1 and 1.
    ramp = torch.arange(result.numel(), device=result.device).reshape(result.shape) * 5 % 17 / 8 - 1
    full, expanded = ramp.to(dtype), torch.full((), 0.5, device=result.device, dtype=dtype).expand(result.shape)
    if counted is not None:
        full, expanded = full * counted, expanded * counted
    gradients = [torch.autograd.grad(result, cast, grad, retain_graph=True) for grad in (full, expanded)]
    return [result.detach(), *gradients[0], *gradients[1]]


def _plain(tensor: Tensor) -> Tensor:
    """As torch takes it: not every stride suits torch, and in which order it adds depends on the memory format."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if channels_last else tensor.contiguous()


@float32_products("ieee")  # with "tf32" cuDNN may choose to be exact, and the rule asks as much of the kernels
def check_accuracy(
    case: Case, dtype: torch.dtype, arguments: Callable[[int], tuple[Named, Named]], draws_at_first: int
) -> tuple[float, float]:
    """The largest share of its allowed error that value or a gradient uses, and the largest error in units of torch's.

    ``arguments`` gives those of a seed, as `_draw` does. Raises `CheckError` where something is wrong in
    all of `MOST_DRAWS` draws.
    """
    names = list(case.example.draw(TINY, torch.Generator())[0])
    labels = ["value", *(f"gradient of {n}" for n in names), *(f"second gradient of {n}" for n in names)]
    ours, reference, options = getattr(FF, case.op.name), torch_function(case.op), case.example.options
    draws = []
    for seed in range(MOST_DRAWS):
        variables, constants = arguments(seed)
        before = {name: tensor.clone() for name, tensor in (variables | constants).items()}
        own_dtype = torch.float32 if dtype is torch.float64 else dtype
        plain = {name: _plain(tensor) for name, tensor in variables.items()}
        calls = (ours, variables, dtype), (reference, plain, own_dtype), (reference, plain, torch.float64)
        three = []
        for of, given, own in calls:
            three.append(value_and_gradients(of, given, constants, options, own))
            for name, tensor in (variables | constants).items():
                if not torch.equal(tensor, before[name]):
                    raise CheckError(f"{name} was modified")
        for label, result, right in zip(labels, three[0], three[2], strict=True):
            if result.shape != right.shape or result.dtype is not dtype:
                raise CheckError(f"{label} is {result.dtype} {tuple(result.shape)}, not {dtype} {tuple(right.shape)}")
        positive = [found[0] > 0 for found in three]
        counted = (positive[0] == positive[2]) & (positive[1] == positive[2])
        if not counted.all():  # rounding takes a result to the other side of 0, where ReLU's slope is another
            three = [value_and_gradients(of, given, constants, options, own, counted) for of, given, own in calls]
        results, expected, exact = three
        draws.append((results, expected, exact))
        if len(draws) < draws_at_first:
            continue
        triples = {
            label: [torch.cat([parts[which][index].flatten() for parts in draws]) for which in range(3)]
            for index, label in enumerate(labels)
        }
        shares = {label: error_share(*triple) for label, triple in triples.items()}
        wrong = [label for label, share in shares.items() if share > 1]
        if not wrong:
            return max(shares.values()), max(times_torchs(*triple) for triple in triples.values())
    raise CheckError(f"the error of the {wrong[0]} is {shares[wrong[0]]:.3g} times what is allowed")


def check(case: Case, column: str, device: torch.device) -> Outcome:
    """One of `DERIVATIVES`, or the accuracy in a dtype, on the backend that is selected."""
    derivative = column in DERIVATIVES
    dtype = torch.float64 if derivative else getattr(torch, column)
    variables, constants = _draw(case, 0, dtype, device, TINY if derivative else None)
    explanation = fastops.explain(case.op.name, **variables, **constants, **case.example.options)
    if explanation.reason == dispatch.WRONG_IN_INTERPRETER:
        return Outcome(NOT_CHECKED, explanation.backend)
    selected = dispatch.selected_backend()
    strict = explanation.backend == selected != "torch" and column not in BY_DESIGN
    cell, failure = "", None
    with _backward_passes(case.op) as ways, fastops.backend(selected, strict=strict):
        try:
            with failures_raised():
                # torch's own, where forward AD loads its decompositions
                warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
                if derivative:
                    _check_derivatives(case, column, variables, constants)
                else:
                    draws = 1 if dispatch._INTERPRETER else DRAWS
                    cell = f"{check_accuracy(case, dtype, lambda seed: _draw(case, seed, dtype, device), draws)[0]:.2f}"
        except Exception as error:  # whatever a check raises is what it found
            kind = "" if isinstance(error, CheckError) else f"{type(error).__name__}: "
            cell, failure = "FAILED", f"{kind}{' '.join(str(error).split())[:300]}"
    seen = "torch" if "torch" in ways else "+".join(sorted(ways))
    seen = seen or (explanation.backend if failure else "torch")
    return Outcome(cell if failure or (cell and seen != "torch") else seen, seen, failure)


# The command ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastops verify``."""
    parser.add_argument("--op", nargs="+", metavar="OP", help=f"{', '.join(OPS)}; default: all of them")
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda:1 and so on; default: the accelerator, if any")
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="instead of derivatives and accuracy: transforms and wrappers of PyTorch around each operation",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="triton (the default; without a GPU in Triton's interpreter), onednn, torch or auto",
    )


def run(args: argparse.Namespace) -> int:
    """Check every case or, with ``--matrix``, every transform; print a row for each.

    Returns 1 if a check failed, or if nothing of fastops ran.
    """
    names = args.op or list(OPS)
    for name in names:
        if name not in OPS:
            raise CommandError(f"unknown op {name!r}: expected one of {', '.join(OPS)}")
    device = pick_device(args.device)
    backend = args.backend or dispatch.selected_backend()
    if backend == "auto" and not args.backend:
        backend = "triton" if dispatch.triton_installed else "onednn"
    try:
        selection = fastops.backend(backend)
    except ValueError as error:
        raise CommandError(str(error)) from error
    status = run_interpreted(args, backend, device)
    if status is not None:
        return status
    with selection:
        check_backend(device)
        if args.matrix:
            from fastops.cli import matrix

            return matrix.run(names, [backend] if args.backend else [*{backend: 0, "onednn": 0, "torch": 0}], device)
        return _verify([case for case in CASES if case.op.name in names], device)


def _verify(cases: list[Case], device: torch.device) -> int:
    columns = [*DERIVATIVES, *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]
    print(f"fastops {fastops.__version__}, torch {torch.__version__}, device {device}")
    print("gradcheck, forward AD, gradgrad: first, forward-mode and second derivatives in float64 against differences:")
    print("                    what computed them, if they are right (vendor: kernels, with the vendor's products)")
    print("float64 to float16: error of value and gradients as a share of what is allowed, at most 1.00")
    print("                    (allowed: twice torch's own error in that dtype, plus one rounding)")
    print("torch:              the torch expression, no kernel; forward AD and gradgrad take it by design\n")
    widths = {"op": max(len(case.op.name) for case in cases), "case": max(len(case.example.name) for case in cases)}
    table = Table(widths | {column: -len(column) for column in columns}, shared=1)
    failures, cells, backends, by_design = [], Counter[str](), Counter[str](), 0
    for case in tracked(cases, len(cases), lambda case: case.name):
        outcomes = {column: check(case, column, device) for column in columns}
        table.row([case.op.name, case.example.name, *(outcome.cell for outcome in outcomes.values())])
        for column, outcome in outcomes.items():
            cells["failed" if outcome.failure else "not checked" if outcome.cell == NOT_CHECKED else "passed"] += 1
            if outcome.cell != NOT_CHECKED:
                backends[outcome.backend] += 1
                by_design += outcome.backend == "torch" and column in BY_DESIGN
            if outcome.failure:
                failures.append(f"{case.name} / {column}: {outcome.failure}")
    print()
    if cells["not checked"]:
        print(f"{NOT_CHECKED}: not checked, {dispatch.WRONG_IN_INTERPRETER}; kernels need a GPU for that dtype")
    for failure in failures:
        print(f"FAILED {failure}")
    counts = ", ".join(f"{cells[kind]} {kind}" for kind in ("passed", "failed", "not checked"))
    design = {"torch": f" ({by_design} of them by design)"}
    where = ", ".join(f"{count} on {backend}{design.get(backend, '')}" for backend, count in backends.most_common())
    print(f"{len(cases)} cases, {cells.total()} checks: {counts}")
    print(f"of those that ran, {where}")
    if set(backends) == {"torch"}:
        print(NOTHING_RAN)
    return 1 if failures or set(backends) == {"torch"} else 0
