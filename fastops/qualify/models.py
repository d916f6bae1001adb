"""The second part: the gradients of each op, and whole trainings of reference models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

import fastops
from fastops.accuracy import float32_products
from fastops.cli import verify
from fastops.cli.verify import CheckError
from fastops.models import FashionMLP, LeNet
from fastops.ops import OPS, Op
from fastops.ops.op import failures_raised

from .cases import Case, Figures, NotRun, on_a_gpu

LIMIT: Final = 2  # times torch's own error, as everywhere


class Autocast(nn.Module):
    """A model under autocast, with a float32 result."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.kind, self.dtype = model, device.type, dtype

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(self.kind, self.dtype):
            output: Tensor = self.model(input)
        return output.float()


def half(device: torch.device) -> torch.dtype:
    """The dtype of autocast: bfloat16, which Triton's interpreter gets wrong."""
    return torch.bfloat16 if on_a_gpu(device) else torch.float16


def resnet(name: str) -> nn.Module:
    """torchvision's; `NotRun` where it is not installed."""
    if find_spec("torchvision") is None:
        raise NotRun("torchvision is not installed")
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)()
    return model


class Training(NamedTuple):
    """A model, the shape of one image, and how it is trained."""

    build: Callable[[], nn.Module]
    image: tuple[int, ...]
    classes: int = 10
    channels_last: bool = False
    autocast: bool = False


TRAININGS: Final = {
    "FashionMLP": Training(FashionMLP, (784,)),
    "LeNet": Training(LeNet, (1, 32, 32)),
    **{
        f"ResNet-18{', channels last' * last}{', autocast' * autocast}": Training(
            partial(resnet, "resnet18"), (3, 64, 64), 1000, last, autocast
        )
        for last in (False, True)
        for autocast in (False, True)
    },
}


def train(training: Training, model: nn.Module, criterion: nn.Module, device: torch.device) -> Tensor:
    """All parameters and running statistics behind 20 steps, two in the interpreter, on numbers of one random state."""
    batch, steps = (64, 20) if on_a_gpu(device) else (2, 2)
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    whole = Autocast(model, device, half(device)) if training.autocast and dtype is torch.float32 else model
    for _ in range(steps):
        images = torch.randn(batch, *training.image, generator=generator).to(device, dtype)
        targets = torch.randint(training.classes, (batch,), generator=generator).to(device)
        optimizer.zero_grad()
        criterion(whole(images), targets).backward()
        optimizer.step()
    state = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return torch.cat([tensor.double().flatten() for tensor in state])


@float32_products("ieee")  # as in `check_accuracy`
def _compare(training: Training, device: torch.device) -> Figures:
    """The distance from float64 of swapped models, as a multiple of the eager one's."""
    model = training.build().to(device)
    options: dict[str, Any] = {"memory_format": torch.channels_last} if training.channels_last else {}
    exact = train(training, copy.deepcopy(model).double(), nn.CrossEntropyLoss(), device)
    eager = train(training, copy.deepcopy(model).to(**options), nn.CrossEntropyLoss(), device)
    rounding = torch.finfo(torch.float32).eps / 2 * exact.norm()
    own = torch.maximum((eager - exact).norm(), rounding)
    distances = {}
    for backend in ("auto", "triton"):
        with fastops.backend(backend), failures_raised():
            swapped = fastops.swap(copy.deepcopy(model), **options)
            ours = train(training, swapped, fastops.swap(nn.CrossEntropyLoss()), device)
        distances[backend] = round(((ours - exact).norm() / own).item(), 3)
    for backend, distance in distances.items():
        if not distance <= LIMIT:
            raise CheckError(f"with backend {backend!r} {distance} times as far from float64 as eager, not {LIMIT}")
    return {"distance from float64 in units of eager's": distances}


def _gradcheck(case: verify.Case, device: torch.device) -> Figures:
    with fastops.backend("triton"):
        outcome = verify.check(case, "gradcheck", device)
    if outcome.failure is not None:
        raise CheckError(outcome.failure)
    if outcome.backend == "torch":
        raise NotRun("no kernel takes it")
    return {"gradients by": outcome.backend}


def _transforms(op: Op, device: torch.device) -> Figures:
    """What ``fastops verify --matrix`` checks of an op, on its kernels."""
    if not on_a_gpu(device):
        raise NotRun("without a GPU `fastops verify --matrix` checks transforms")
    from fastops.cli import matrix  # with torch's compilers

    ours, torchs, way = matrix.subjects_of(op, device)
    properties = {f"{family}, {name}": p for family, named in matrix.FAMILIES.items() for name, p in named.items()}
    with fastops.backend("triton"):
        if way() != "triton":
            raise NotRun("no kernel takes it")
        found = {name: matrix.failure_of(p, ours, matrix.expected_of(p, torchs)) for name, p in properties.items()}
    failures = [f"{name}: {failure}" for name, failure in found.items() if failure not in (None, matrix.NOT_IN_TORCH)]
    if failures:
        raise CheckError("; ".join(failures))
    return {"transforms that hold": len(found)}


def cases(device: torch.device) -> list[Case]:
    """gradcheck of each op, the reference models, gradcheck of the other examples, and transforms."""
    first = [case for case in verify.CASES if case.example is case.op.examples[0]]
    others = [case for case in verify.CASES if case not in first]
    return [
        *(Case(f"{case.name} / gradcheck", partial(_gradcheck, case)) for case in first),
        *(Case(f"{name} / training", partial(_compare, training)) for name, training in TRAININGS.items()),
        *(Case(f"{case.name} / gradcheck", partial(_gradcheck, case)) for case in others),
        *(Case(f"{op.name} / transforms", partial(_transforms, op)) for op in OPS.values()),
    ]
