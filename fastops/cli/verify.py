"""``fastops verify``: check the gradients and the accuracy of every operation on this machine."""

import argparse
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.accuracy import error_share
from fastops.cli import CommandError
from fastops.cli.environment import pick_device
from fastops.cli.table import Table
from fastops.ops import registry

Named = dict[str, Any]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DERIVATIVES = ("gradcheck", "forward AD", "gradgrad")
DRAWS = 4  # Inputs per case and dtype: the largest error of a single draw, torch's or ours, is a matter of luck.
NOT_CHECKED = "not checked"

# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The numbers of rows, of features or classes, and of outputs."""

    rows: int
    features: int
    outputs: int


TINY = Sizes(2, 3, 2)  # for numerical derivatives, which cost two calls per element
SMALL = Sizes(13, 37, 11)  # for a CPU, which may have to interpret kernels
LARGE = Sizes(300, 517, 261)  # for a GPU: several tiles each way, the last ones not full


@dataclass(frozen=True)
class Case:
    """One way to call an operation.

    ``tensors`` draws its arguments, float32 and on the CPU: those to differentiate by, and constant ones. ``options``
    are the other keyword arguments.
    """

    op: str
    name: str
    tensors: Callable[[Sizes, torch.Generator], tuple[Named, Named]]
    options: Named = field(default_factory=dict)


def _transposed(tensor: Tensor) -> Tensor:
    """The same values, in the other order in memory."""
    return tensor.mT.contiguous().mT


def _linear_cases(op: str) -> Iterator[Case]:
    def case(name: str, rows: Callable[[Sizes], tuple[int, ...]], bias: bool = True, transposed: bool = False) -> Case:
        def tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            variables = {
                "input": torch.randn(*rows(sizes), sizes.features, generator=generator),
                "weight": torch.randn(sizes.outputs, sizes.features, generator=generator),
            }
            if transposed:
                variables = {name: _transposed(tensor) for name, tensor in variables.items()}
            if bias:
                variables["bias"] = torch.randn(sizes.outputs, generator=generator)
            return variables, {}

        return Case(op, name, tensors)

    yield case("matrix", lambda sizes: (sizes.rows,))
    yield case("matrix, no bias", lambda sizes: (sizes.rows,), bias=False)
    yield case("vector", lambda sizes: ())
    yield case("three dimensions", lambda sizes: (2, sizes.rows))
    yield case("transposed input and weight", lambda sizes: (sizes.rows,), transposed=True)


def _conv_cases(dimensions: int, relu: str) -> Iterator[Case]:
    def case(
        name: str, kernel: int, groups: int = 1, bias: bool = True, channels_last: bool = False, **options: Any
    ) -> Case:
        def tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            channels, outputs = groups * (1 + sizes.outputs // 4), groups * (1 + sizes.features // 8)
            size = 6 - dimensions if sizes is TINY else 11 - 2 * dimensions
            variables = {
                "input": torch.randn(2, channels, *(size,) * dimensions, generator=generator),
                "weight": torch.randn(outputs, channels // groups, *(kernel,) * dimensions, generator=generator),
            }
            if channels_last:
                variables = {n: t.to(memory_format=torch.channels_last) for n, t in variables.items()}
            if bias:
                variables["bias"] = torch.randn(outputs, generator=generator)
            return variables, {}

        return Case(f"conv{relu}{dimensions}d", name, tensors, {"groups": groups, **options})

    yield case("3, padding 1", 3, padding=1)
    if dimensions == 2:
        yield case("1", 1)
        yield case("3, stride 2, dilation 2, no bias", 3, stride=2, dilation=2, padding=2, bias=False)
        yield case("3, groups 2, channels_last", 3, groups=2, channels_last=True)


def _add_relu_tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
    shape = sizes.rows, sizes.features
    return {name: torch.randn(shape, generator=generator) for name in ("input", "other")}, {}


def _mse_cases() -> Iterator[Case]:
    def case(name: str, reduction: str, transposed: bool = False, weight: bool = False) -> Case:
        def tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            shape = sizes.rows, sizes.features
            input, target, factors = (torch.randn(shape, generator=generator) for _ in range(3))
            variables = {"input": input, "target": _transposed(target) if transposed else target}
            return variables, {"weight": factors.abs()} if weight else {}

        return Case("mse_loss", f"{reduction}{name}", tensors, {"reduction": reduction})

    for reduction in ("none", "mean", "sum"):
        yield case("", reduction)
        yield case(", transposed target", reduction, transposed=True)
    yield case(", element weights", "mean", weight=True)


def _bce_cases() -> Iterator[Case]:
    def case(name: str, reduction: str, weight: bool = False, pos_weight: bool = False) -> Case:
        def tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            shape = sizes.rows, sizes.features
            variables = {
                "input": torch.randn(shape, generator=generator),
                "target": torch.rand(shape, generator=generator),
            }
            weights = {"weight": weight, "pos_weight": pos_weight}
            drawn = {n: torch.rand(sizes.features, generator=generator) + 0.5 for n, used in weights.items() if used}
            return variables, drawn

        return Case("binary_cross_entropy_with_logits", f"{reduction}{name}", tensors, {"reduction": reduction})

    for reduction in ("none", "mean", "sum"):
        yield case("", reduction)
        yield case(", weight, pos_weight", reduction, weight=True, pos_weight=True)


def _cross_entropy_case(
    probabilities: bool,
    reduction: str,
    weight: bool = False,
    label_smoothing: float = 0.0,
    ignore: bool = False,
    layout: str = "",
) -> Case:
    def tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        classes = sizes.features
        batch, positions = {"vector": ((), ()), "images": ((2,), (1, sizes.rows))}.get(layout, ((sizes.rows,), ()))
        logits = torch.randn(*batch, classes, *positions, generator=generator)
        if layout == "transposed":
            logits = _transposed(logits)
        variables: Named = {"input": logits}
        constants: Named = {}
        if probabilities:
            noise = torch.randn(logits.shape, generator=generator)
            variables["target"] = noise.softmax(0 if layout == "vector" else 1)
        else:
            constants["target"] = torch.randint(classes, (*batch, *positions), generator=generator)
            if ignore:
                constants["target"][:2] = torch.tensor([0, 1])
        if weight:
            constants["weight"] = torch.rand(classes, generator=generator) + 0.5
        return variables, constants

    options: Named = {"reduction": reduction, "label_smoothing": label_smoothing}
    if ignore:
        options["ignore_index"] = 1
    shown = {"weight": weight, "smoothing": label_smoothing, "ignore_index": ignore, layout: layout}
    name = ", ".join([reduction, *(word for word, used in shown.items() if used)])
    return Case("cross_entropy", ("probabilities, " if probabilities else "indices, ") + name, tensors, options)


def _cross_entropy_cases() -> Iterator[Case]:
    reductions, weights, smoothings = ("none", "mean", "sum"), (False, True), (0.0, 0.1)
    for reduction, weight, smoothing in product(reductions, weights, smoothings):
        yield _cross_entropy_case(False, reduction, weight, smoothing)
        yield _cross_entropy_case(False, reduction, weight, smoothing, ignore=True)
        yield _cross_entropy_case(True, reduction, weight, smoothing)
    for probabilities, layout in product((False, True), ("vector", "images", "transposed")):
        yield _cross_entropy_case(probabilities, "mean", layout=layout)


def _head_cases() -> Iterator[Case]:
    def case(name: str, probabilities: bool = False, weight: bool = False, **options: Any) -> Case:
        def tensors(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            classes = sizes.outputs
            variables = {
                "input": torch.randn(sizes.rows, sizes.features, generator=generator),
                "linear_weight": torch.randn(classes, sizes.features, generator=generator) / sizes.features**0.5,
                "linear_bias": torch.randn(classes, generator=generator),
            }
            constants: Named = {"weight": torch.rand(classes, generator=generator) + 0.5} if weight else {}
            if probabilities:
                variables["target"] = torch.randn(sizes.rows, classes, generator=generator).softmax(1)
            else:
                constants["target"] = torch.randint(classes, (sizes.rows,), generator=generator)
                constants["target"][:2] = torch.tensor([0, 1])
            return variables, constants

        return Case("linear_cross_entropy", name, tensors, options)

    yield case("indices, mean")
    yield case("indices, none, weight", weight=True, reduction="none")
    yield case("indices, sum, smoothing, ignore_index", label_smoothing=0.1, ignore_index=1, reduction="sum")
    yield case("probabilities, mean, weight", probabilities=True, weight=True)


CASES = [
    *_linear_cases("linear"),
    *_linear_cases("linear_relu"),
    *(case for dimensions, relu in product((1, 2, 3), ("", "_relu")) for case in _conv_cases(dimensions, relu)),
    Case("add_relu", "two tensors", _add_relu_tensors),
    *_mse_cases(),
    *_bce_cases(),
    *_cross_entropy_cases(),
    *_head_cases(),
]
OPS = list(dict.fromkeys(case.op for case in CASES))


def torch_function(op: str) -> Callable[..., Tensor]:
    if op == "add_relu":
        return lambda input, other: F.relu(input + other)
    if "_relu" in op:
        plain: Callable[..., Tensor] = getattr(F, op.replace("_relu", ""))
        return lambda **arguments: F.relu(plain(**arguments))
    function: Callable[..., Tensor] = getattr(F, op)
    return function


# Checks ---------------------------------------------------------------------------------------------------------------


class CheckError(Exception):
    """What a check found wrong, in one line."""


@dataclass(frozen=True)
class Outcome:
    """What one check says in its cell, the backend that it ran on, and what it found wrong, if anything."""

    cell: str
    backend: str
    failure: str | None = None


def draw(case: Case, sizes: Sizes, seed: int, dtype: torch.dtype, device: torch.device) -> tuple[Named, Named]:
    """The arguments of the case; class indices stay integers. A value has no more digits than float32."""

    def convert(tensors: Named) -> Named:
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }

    variables, constants = case.tensors(sizes, torch.Generator().manual_seed(seed))
    return convert(variables), convert(constants)


def _sizes(device: torch.device) -> Sizes:
    return SMALL if device.type == "cpu" else LARGE


def _check_derivatives(case: Case, kind: str, backend: str, variables: Named, constants: Named) -> str:
    def function(*values: Tensor) -> Tensor:
        arguments = dict(zip(variables, values, strict=True))
        result: Tensor = getattr(FF, case.op)(**arguments, **constants, **case.options)
        return result

    values = [tensor.requires_grad_() for tensor in variables.values()]
    torch.manual_seed(0)  # torch draws directions and outer gradients by itself
    fast = case.op.startswith("conv")  # along random directions: an interpreted convolution takes its time
    if kind == "gradcheck":
        gradcheck(function, values, fast_mode=fast)
    elif kind == "forward AD":
        gradcheck(function, values, check_forward_ad=True, check_backward_ad=False, fast_mode=fast)
    else:
        gradgradcheck(function, values, fast_mode=fast)
        if backend != "torch":  # torch's own mse_loss cannot do this one where the gradient is a scalar
            gradgradcheck(
                function,
                values,
                check_fwd_over_rev=True,
                check_rev_over_rev=False,
                check_undefined_grad=False,
                fast_mode=True,
            )
    return "ok"


def _value_and_gradients(
    function: Callable[..., Tensor], variables: Named, constants: Named, options: Named, dtype: torch.dtype
) -> list[Tensor]:
    """The result in ``dtype`` and its gradients from two backward passes, the second with an expanded grad_output."""
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in variables.values()]
    fixed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in constants.items()}
    result = function(**dict(zip(variables, cast, strict=True)), **fixed, **options)
    # Exact in every dtype: eighths between -1 and 1.
    ramp = torch.arange(result.numel(), device=result.device).reshape(result.shape) * 5 % 17 / 8 - 1
    full, expanded = ramp.to(dtype), torch.full((), 0.5, device=result.device, dtype=dtype).expand(result.shape)
    gradients = [torch.autograd.grad(result, cast, grad, retain_graph=True) for grad in (full, expanded)]
    return [result.detach(), *gradients[0], *gradients[1]]


def _check_accuracy(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    names = list(case.tensors(TINY, torch.Generator())[0])
    labels = ["value", *(f"gradient of {n}" for n in names), *(f"second gradient of {n}" for n in names)]
    reference = torch_function(case.op)
    draws = []
    for seed in range(DRAWS):
        variables, constants = draw(case, _sizes(device), seed, dtype, device)
        before = {name: tensor.clone() for name, tensor in (variables | constants).items()}
        results = _value_and_gradients(getattr(FF, case.op), variables, constants, case.options, dtype)
        for name, tensor in (variables | constants).items():
            if not torch.equal(tensor, before[name]):
                raise CheckError(f"{name} was modified")
        own_dtype = torch.float32 if dtype is torch.float64 else dtype
        expected = _value_and_gradients(reference, variables, constants, case.options, own_dtype)
        exact = _value_and_gradients(reference, variables, constants, case.options, torch.float64)
        for label, result, right in zip(labels, results, exact, strict=True):
            if result.shape != right.shape or result.dtype is not dtype:
                raise CheckError(f"{label} is {result.dtype} {tuple(result.shape)}, not {dtype} {tuple(right.shape)}")
        draws.append((results, expected, exact))
    worst = 0.0
    for index, label in enumerate(labels):
        share = error_share(*(torch.cat([draw[which][index].flatten() for draw in draws]) for which in range(3)))
        if share > 1:
            raise CheckError(f"the error of the {label} is {share:.3g} times what is allowed")
        worst = max(worst, share)
    return f"{worst:.2f}"


def _check(case: Case, column: str, device: torch.device) -> Outcome:
    dtype = torch.float64 if column in DERIVATIVES else getattr(torch, column)
    variables, constants = draw(case, TINY if column in DERIVATIVES else _sizes(device), 0, dtype, device)
    backend, reason = fastops.explain(case.op, **variables, **constants, **case.options)
    if reason == dispatch.WRONG_IN_INTERPRETER:
        return Outcome(NOT_CHECKED, "triton")
    registry._warned.clear()  # so that a kernel that cannot run is noticed by every check, not by the first alone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", fastops.FallbackWarning)
            # torch's own, where forward AD loads its decompositions
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            if column in DERIVATIVES:
                return Outcome(_check_derivatives(case, column, backend, variables, constants), backend)
            return Outcome(_check_accuracy(case, dtype, device), backend)
    except Exception as error:  # whatever a check raises is what it found
        kind = "" if isinstance(error, CheckError) else f"{type(error).__name__}: "
        return Outcome("FAILED", backend, f"{kind}{' '.join(str(error).split())[:300]}")


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
        help="auto, triton (without a GPU: in Triton's interpreter), onednn or torch; default: auto",
    )


def run(args: argparse.Namespace) -> int:
    """Check every case or, with ``--matrix``, every transform; print a row for each, and return 1 if any failed."""
    ops = args.op or OPS
    for op in ops:
        if op not in OPS:
            raise CommandError(f"unknown op {op!r}: expected one of {', '.join(OPS)}")
    try:
        selection = fastops.backend(args.backend or dispatch.selected_backend())
    except ValueError as error:
        raise CommandError(str(error)) from error
    device = pick_device(args.device)
    ways = [args.backend] if args.backend else ["onednn", "torch"]
    if args.matrix and not args.backend and dispatch.triton_installed:
        ways = ["triton", *ways]
        selection = fastops.backend("triton")
    with selection:
        one = torch.zeros(1, 1, device=device)
        try:
            fastops.explain("linear", one, one)
        except RuntimeError as error:  # Triton is selected and cannot run
            if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
                raise CommandError(str(error)) from error
            return _run_in_interpreter(args)
        if args.matrix:
            from fastops.cli import matrix

            return matrix.run(ops, ways, device)
        return _verify([case for case in CASES if case.op in ops], device)


def _run_in_interpreter(args: argparse.Namespace) -> int:
    """The same command in a process whose Triton kernels are interpreted: that is decided when they are imported."""
    print("no GPU here: the same kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)", flush=True)
    words = [*(["--backend", args.backend] if args.backend else []), "--device", "cpu"]
    words += [*(["--op", *args.op] if args.op else []), *(["--matrix"] if args.matrix else [])]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-m", "fastops", "verify", *words], env=environment).returncode


def _verify(cases: list[Case], device: torch.device) -> int:
    columns = [*DERIVATIVES, *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]
    print(f"fastops {fastops.__version__}, torch {torch.__version__}, device {device}")
    print("gradcheck, forward AD, gradgrad: first, forward-mode and second derivatives in float64 against differences")
    print("float64 to float16: error of value and gradients as a share of what is allowed, at most 1.00")
    print("                    (allowed: twice torch's own error in that dtype, plus one rounding)\n")
    names = max(len(case.name) for case in cases)
    table = Table(
        {"op": max(len(case.op) for case in cases), "case": names} | {column: -11 for column in columns} | {"ran on": 6}
    )
    failures, cells, backends = [], Counter[str](), Counter[str]()
    for case in cases:
        outcomes = {column: _check(case, column, device) for column in columns}
        table.row([case.op, case.name, *(outcome.cell for outcome in outcomes.values()), _ran_on(outcomes)])
        for column, outcome in outcomes.items():
            cells["failed" if outcome.failure else NOT_CHECKED if outcome.cell == NOT_CHECKED else "passed"] += 1
            if outcome.cell != NOT_CHECKED:
                backends[outcome.backend] += 1
            if outcome.failure:
                failures.append(f"{case.op} / {case.name} / {column}: {outcome.failure}")
    print()
    if cells[NOT_CHECKED]:
        print(f"{NOT_CHECKED}: {dispatch.WRONG_IN_INTERPRETER}; kernels need a GPU for that dtype")
    for failure in failures:
        print(f"FAILED {failure}")
    counts = ", ".join(f"{cells[kind]} {kind}" for kind in ("passed", "failed", NOT_CHECKED))
    where = ", ".join(f"{count} on {backend}" for backend, count in backends.most_common())
    print(f"{len(cases)} cases, {cells.total()} checks: {counts}; of those that ran, {where}")
    return 1 if failures else 0


def _ran_on(outcomes: dict[str, Outcome]) -> str:
    """The backend of the row, and the columns that another one took."""
    columns: dict[str, list[str]] = {}
    for column, outcome in outcomes.items():
        columns.setdefault(outcome.backend, []).append(column)
    usual = max(columns, key=lambda backend: len(columns[backend]))
    others = [f"; {backend}: {', '.join(taken)}" for backend, taken in columns.items() if backend != usual]
    return usual + "".join(others)
