"""``fastops bench``: time fastops against eager PyTorch, call by call in turns, and print the ratios."""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastops
import fastops.functional as FF
from fastops.cli import CommandError
from fastops.cli.doctor import facts, interpreting
from fastops.cli.environment import backend_lines, check_backend, check_file, pick_device, positive_integer, writing
from fastops.cli.examples import draw_timed, torch_function
from fastops.cli.table import Table
from fastops.cli.tasks import squared_error
from fastops.models import CIFARNet, FashionMLP, LeNet, TwoLayerNet
from fastops.ops import OPS, Op
from fastops.ops.examples import Example, Named
from fastops.progress import tracked
from fastops.timing import Call, clock_of, ratio, timed

# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """The same work by each contestant, on equal values, and the backend that fastops takes."""

    calls: dict[str, Call]  # "eager" and "fastops"
    backend: str


@dataclass(frozen=True)
class Case:
    """What is timed. ``prepare`` allocates and draws the inputs on a device."""

    name: str
    prepare: Callable[[torch.device], Contest]


def op_call(
    function: Callable[..., Tensor], arguments: Named, leaves: Sequence[Tensor], grad_output: Tensor, backward: bool
) -> Call:
    """The call of an op without gradients, or with its backward pass to ``leaves``."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(**arguments)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(**arguments), leaves, grad_output)

    return forward_backward if backward else forward


def _op_case(op: Op, example: Example, backward: bool) -> Case:
    """The op without gradients, or forward and backward, beside torch's own function."""

    def prepare(device: torch.device) -> Contest:
        variables, constants = draw_timed(example, device)
        leaves = [tensor.requires_grad_(backward) for tensor in variables.values()]
        arguments = {**variables, **constants, **example.options}
        reference = torch_function(op)
        with torch.no_grad():
            grad_output = torch.ones_like(reference(**arguments))
        calls = {
            name: op_call(function, arguments, leaves, grad_output, backward)
            for name, function in (("eager", reference), ("fastops", getattr(FF, op.name)))
        }
        return Contest(calls, fastops.explain(op.name, **arguments).backend)

    return Case(f"{op.name}/{example.name}/forward{'+backward' if backward else ''}", prepare)


def model_call(
    model: nn.Module,
    criterion: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    training: bool,
    lr: float = 1e-3,
    momentum: float = 0.0,
) -> Call:
    """A whole training step with SGD, or inference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss

    def predict() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(inputs)
            return output

    return step if training else predict


def _model_cases(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    classes: int,
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss,
    lr: float = 1e-3,
    momentum: float = 0.0,
    **options: Any,
) -> list[Case]:
    """A whole training step with SGD, and inference, of a model and of its copy, which is swapped with ``options``.

    Inputs have this ``shape``; targets are class indices for cross-entropy, and numbers for other losses.
    """

    def prepare(device: torch.device, training: bool) -> Contest:
        indices = loss is nn.CrossEntropyLoss
        inputs = torch.randn(shape).to(device)
        targets = (torch.randint(classes, shape[:1]) if indices else torch.randn(shape[0], classes)).to(device)
        eager = build().to(device).train(training)
        swapped = fastops.swap(copy.deepcopy(eager), **options)
        contestants = {"eager": (eager, loss()), "fastops": (swapped, fastops.swap(loss()))}
        calls = {
            name: model_call(model, criterion, inputs, targets, training, lr, momentum)
            for name, (model, criterion) in contestants.items()
        }
        lines = backend_lines(swapped, len(inputs), device)
        backends = {line.partition(" runs on ")[2].partition(":")[0] for line in lines}
        return Contest(calls, "+".join(sorted(backends)))

    return [
        Case(f"{name}/step", lambda device: prepare(device, training=True)),
        Case(f"{name}/inference", lambda device: prepare(device, training=False)),
    ]


def _wide_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 1000))


def _resnet18(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18().to(memory_format=memory_format)
    return model


def _resnet_cases(*shape: int) -> list[Case]:
    """ResNet-18 swapped plainly, with channels_last, and for inference with both models in that format."""

    def cases(suffix: str, build: Callable[[], nn.Module] = _resnet18, **options: Any) -> list[Case]:
        name = f"ResNet18-{'x'.join(map(str, shape))}{suffix}"
        return _model_cases(name, build, shape, 1000, lr=1e-4, momentum=0.9, **options)

    last = torch.channels_last
    both_last = cases("-both_channels_last", lambda: _resnet18(last))
    return [*cases(""), *cases("-channels_last", memory_format=last), both_last[1]]


OP_CASES = [
    _op_case(op, example, backward) for op in OPS.values() for example in op.timed for backward in (False, True)
]
MODEL_CASES = [
    *_model_cases("TwoLayerNet-64", TwoLayerNet, (64, 1000), 10, squared_error, 1e-6),
    *_model_cases("FashionMLP-64", FashionMLP, (64, 784), 10),
    *_model_cases("FashionMLP-512", FashionMLP, (512, 784), 10),
    *_model_cases("WideMLP-256", _wide_mlp, (256, 1024), 1000),
    *_model_cases("LeNet-64", LeNet, (64, 1, 32, 32), 10, nn.MSELoss, 0.1),
    *_model_cases("CIFARNet-64", CIFARNet, (64, 3, 32, 32), 10, momentum=0.9),
    *_model_cases(
        "CIFARNet-64-channels_last", CIFARNet, (64, 3, 32, 32), 10, momentum=0.9, memory_format=torch.channels_last
    ),
]
if find_spec("torchvision") is not None:  # whose model it is
    MODEL_CASES += [*_resnet_cases(4, 3, 64, 64), *_resnet_cases(8, 3, 224, 224)]
CASES = [*OP_CASES, *MODEL_CASES]

# Measurement ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Medians in milliseconds per call, and the quartiles of fastops' time over eager's within each pair."""

    name: str
    backend: str
    eager_ms: float
    fastops_ms: float
    ratio: float
    ratio_lower_quartile: float
    ratio_upper_quartile: float


def measure(case: Case, device: torch.device, pairs: int) -> Measurement:
    """Prepare a case, warm it up, and time it."""
    torch.manual_seed(0)
    contest = case.prepare(device)
    times = timed(contest.calls, pairs, clock_of(device))
    eager_ms, ours_ms = (1e3 * float(np.median(times[name])) for name in ("eager", "fastops"))
    return Measurement(case.name, contest.backend, eager_ms, ours_ms, *ratio(times["fastops"], times["eager"]))


def environment(device: torch.device) -> dict[str, str | int]:
    """What the times depend on, besides the code."""
    return {"device": _device_name(device)} | facts()


def _device_name(device: torch.device) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # Apple's has none
    return f"{device} {name(device)}" if name else str(device)


# The command ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastops bench``."""
    parser.add_argument("--case", metavar="TEXT", default="", help="only the cases whose name contains this text")
    parser.add_argument("--pairs", type=positive_integer, default=50, metavar="N", help="pairs per case; default 50")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and measurements to a file")
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda:1 and so on; default: the accelerator, if any")


def run(args: argparse.Namespace) -> int:
    """Time the cases and print one row for each."""
    refuse_interpreter()
    cases = [case for case in CASES if args.case in case.name]
    if not cases:
        families = dict.fromkeys(case.name.split("/")[0] for case in CASES)
        raise CommandError(f"no case contains {args.case!r}: they begin with {', '.join(families)}")
    device = pick_device(args.device)
    check_backend(device)
    check_file(args.json)
    facts = environment(device)
    for fact, value in facts.items():
        print(f"{fact}: {value}")
    print(f"\nmedians of {args.pairs} interleaved pairs; ratio: fastops' time over eager's, faster below 1")
    widths = {"case": max(len(case.name) for case in cases), "backend": 12, "eager ms": -9, "fastops ms": -10}
    table = Table(widths | {"ratio": -5, "quartiles": -11})
    measurements = []
    for case in tracked(cases, len(cases), lambda case: case.name):
        result = measure(case, device, args.pairs)
        times = [f"{result.eager_ms:.4f}", f"{result.fastops_ms:.4f}", f"{result.ratio:.2f}"]
        quartiles = f"{result.ratio_lower_quartile:.2f} - {result.ratio_upper_quartile:.2f}"
        table.row([result.name, result.backend, *times, quartiles])
        measurements.append(asdict(result))
    if args.json:
        content = {"environment": facts, "pairs": args.pairs, "measurements": measurements}
        with writing(args.json) as file:
            file.write(f"{json.dumps(content, indent=2)}\n".encode())
    return 0


def refuse_interpreter() -> None:
    """Raise ``CommandError`` if kernels would run in Triton's interpreter."""
    if interpreting():
        raise CommandError("Triton's interpreter is on, and its times mean nothing: unset TRITON_INTERPRET")
