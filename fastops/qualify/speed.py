"""The third part: how fast the ways of a call are, beside eager torch, torch.compile and Liger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastops
import fastops.functional as FF
from fastops import dispatch
from fastops.bench.cases import BOTH, FORWARD, model_call, op_call
from fastops.bench.contestants import LIGER, compiled, functions_of, made_when_called, through, tried
from fastops.bench.measure import peaks
from fastops.cli.examples import draw, torch_function
from fastops.models import FashionMLP, LeNet
from fastops.ops import OPS, Op, add_relu, batch_norm, conv, cross_entropy, linear, linear_cross_entropy, max_pool, pair
from fastops.ops.examples import SMALL, Example
from fastops.timing import Call, clock_of, host_seconds, ratio, timed

from .cases import Case, Figures, NotRun, on_a_gpu
from .models import Autocast, half, resnet
from .ways import ways_of

TURNS: Final = 15
HOST_SECONDS: Final = 0.01  # of calls in a row, to see how long the host takes
MOST_IN_A_ROW: Final = 20  # a GPU's queue takes so many at once
PEAK_DTYPES: Final = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


class Network(NamedTuple):
    """A model, the shape of a batch, and the number of classes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10


def _mlp(width: int) -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 1000))


def _networks(device: torch.device) -> dict[str, Network]:
    if not on_a_gpu(device):
        return {
            "FashionMLP-2": Network(FashionMLP, (2, 784)),
            "LeNet-2": Network(LeNet, (2, 1, 32, 32)),
            "MLP-16-2": Network(partial(_mlp, 16), (2, 16), 1000),
        }
    return {
        "ResNet-50-128": Network(partial(resnet, "resnet50"), (128, 3, 224, 224), 1000),
        "MLP-4096-4096": Network(partial(_mlp, 4096), (4096, 4096), 1000),
        "FashionMLP-64": Network(FashionMLP, (64, 784)),
        "LeNet-64": Network(LeNet, (64, 1, 32, 32)),
        "ResNet-18-32": Network(partial(resnet, "resnet18"), (32, 3, 224, 224), 1000),
        "MLP-4096-256": Network(partial(_mlp, 4096), (256, 4096), 1000),
        "FashionMLP-512": Network(FashionMLP, (512, 784)),
    }


def _examples(device: torch.device) -> list[tuple[Op, Example]]:
    if not on_a_gpu(device):
        return [(op, op.examples[0]) for op in OPS.values()]
    large: dict[str, list[Example]] = {  # which fill a GPU
        "linear_cross_entropy": [linear_cross_entropy.timed(4096, 1024, 128000)],
        "cross_entropy": [cross_entropy.timed(4096, 32000), cross_entropy.timed(1024, 128000)],
        "batch_norm_relu": [batch_norm.timed(False, 64, 256, 56, last) for last in (False, True)],
        "batch_norm_add_relu": [batch_norm.timed(True, 64, 256, 56, last) for last in (False, True)],
        "add_relu": [add_relu.timed(128, 256, 56, 56)],
        "linear_relu": [linear.timed(32768, 1024, 4096)],
        "linear_act": [linear.timed(32768, 1024, 4096)._replace(options={"activation": "gelu"})],
        "conv_relu2d": [conv.timed(64, 112, 64, 64, 3, last, padding=1) for last in (False, True)],
        "relu_max_pool2d": [
            max_pool.timed(64, 64, 112, last, kernel_size=3, stride=2, padding=1) for last in (False, True)
        ],
        "binary_cross_entropy_with_logits": pair.timed_pairs(torch.rand, (16384, 4096)),
        "mse_loss": pair.timed_pairs(torch.randn, (16384, 4096)),
    }
    small = [(op, example) for op in OPS.values() for example in op.timed]
    return [(OPS[name], example) for name, examples in large.items() for example in examples] + small


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Measurement ----------------------------------------------------------------------------------------------------------


def _median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def _peaks(device: torch.device) -> Figures:
    if not on_a_gpu(device):
        peaks(device, 2**10, 8, PEAK_DTYPES)
        return {"rates": {}}
    return {"rates": peaks(device, dtypes=PEAK_DTYPES)}


def contest(contestants: Mapping[str, Call], device: torch.device, work: Figures) -> Figures:
    """Times of each in turns, its ratio to "eager", and how long it keeps the host busy.

    One that fails at once is left out, with the reason. Without a GPU all run and no time is told.
    """
    able, left_out = tried(contestants, device, ("eager", "fastops", "triton"))
    times = timed(able, TURNS if on_a_gpu(device) else 1, clock_of(device))
    found = {}
    for name, own in times.items():
        seconds = _median(own)
        in_a_row = max(1, min(MOST_IN_A_ROW, round(HOST_SECONDS / max(seconds, 1e-9))))
        host = host_seconds(able[name], device, in_a_row)
        found[name] = {"seconds": seconds, "ratio": ratio(own, times["eager"]), "host": host}
    return {**work, "times": found if on_a_gpu(device) else {}, "ran": list(able), "left out": left_out}


def _flops(call: Call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())


def liger(op: Op) -> Callable[..., Tensor]:
    """Liger's function for an op; `NotRun` where there is none."""
    makers = functions_of(op)
    if LIGER not in makers:
        raise NotRun("it has no such function")
    return makers[LIGER]()


def _op(
    op: Op, example: Example, dtype: torch.dtype, backward: bool, by_compilers: bool, device: torch.device
) -> Figures:
    """A call alone, beside torch.compile or beside all others. ``bytes``: every tensor of it read or written once."""
    variables, constants = draw(example, SMALL, torch.default_generator, dtype, device)
    reference = torch_function(op)
    with torch.no_grad():
        grad_output = torch.ones_like(reference(**variables, **constants, **example.options))

    def of(function: Callable[..., Tensor]) -> Call:
        """On values of its own: there are functions that overwrite their arguments."""
        own = {name: tensor.clone().requires_grad_(backward) for name, tensor in variables.items()}
        leaves = [*own.values()]
        return op_call(
            function, {**own, **constants, **example.options}, leaves, grad_output, BOTH if backward else FORWARD
        )

    def by_compiler() -> Call:
        torch._dynamo.reset()
        return of(compiled(reference))

    ours = of(getattr(FF, op.name))
    way = fastops.explain(op.name, **variables, **constants, **example.options)
    contestants = {"eager": of(reference), "fastops": through("auto", ours)}
    if by_compilers:
        contestants["torch.compile"] = made_when_called(by_compiler)
    else:
        if way.way != "triton":
            contestants["triton"] = through("triton", ours)
        contestants["Liger"] = made_when_called(lambda: of(liger(op)))
    sizes = {name: t.numel() * t.element_size() for name, t in {**variables, **constants, "": grad_output}.items()}
    moved = sum(sizes.values())
    if backward:  # the gradient of the result, the arguments once more, and their gradients
        moved += sum(sizes.values()) + sum(sizes[name] for name in variables)
    work = {
        "way": way.way,
        "dtype": _name(dtype),
        "bytes": moved,
        "flops": _flops(contestants["eager"]),
    }
    return contest(contestants, device, work)


def _network(network: Network, dtype: torch.dtype, by_compilers: bool, device: torch.device) -> Figures:
    """A step of training: forward, backward and SGD, in float32 or under autocast."""
    eager = network.build().to(device)
    inputs = torch.randn(network.shape, device=device)
    targets = torch.randint(network.classes, network.shape[:1], device=device)

    def step(model: nn.Module, criterion: nn.Module) -> Call:
        whole = model if dtype is torch.float32 else Autocast(model, device, dtype)
        return model_call(whole, lambda output: criterion(output, targets), (inputs,), training=True)

    def by_compiler() -> Call:
        torch._dynamo.reset()
        return step(compiled(copy.deepcopy(eager)), nn.CrossEntropyLoss())

    swapped, criterion = fastops.swap(copy.deepcopy(eager)), fastops.swap(nn.CrossEntropyLoss())
    ours = step(swapped, criterion)
    contestants = {"eager": step(eager, nn.CrossEntropyLoss()), "fastops": through("auto", ours)}
    if by_compilers:
        contestants["torch.compile"] = made_when_called(by_compiler)
    else:
        contestants["triton"] = through("triton", ours)
    work = {"dtype": _name(dtype), "flops": _flops(contestants["eager"])}
    return contest(contestants, device, work)


def _ways(network: Network, dtype: torch.dtype, timing: bool, device: torch.device) -> Figures:
    model = fastops.swap(network.build().to(device))
    whole = model if dtype is torch.float32 else Autocast(model, device, dtype)
    return {"classes": ways_of(whole, torch.randn(network.shape, device=device), timing)}


def _op_ways(op: Op, example: Example, dtype: torch.dtype, timing: bool, device: torch.device) -> Figures:
    variables, constants = draw(example, SMALL, torch.default_generator, dtype, device)
    for tensor in variables.values():
        tensor.requires_grad_()

    class Alone(nn.Module):
        def forward(self) -> Tensor:
            result: Tensor = getattr(FF, op.name)(**variables, **constants, **example.options)
            return result

    return {"classes": ways_of(Alone(), (), timing)}


def _tune(network: Network, device: torch.device) -> Figures:
    """`fastops.tune` itself, with its tiles, into a cache folder that is not the user's."""
    if dispatch._INTERPRETER:
        raise NotRun("in the interpreter there is nothing to tune")
    found = fastops.tune(fastops.swap(network.build().to(device)), torch.randn(network.shape, device=device))
    return {"tuned": str(found).splitlines()[:-1]}


def _named(kind: str, dtype: torch.dtype, device: torch.device, run: Callable[..., Figures], *words: Any) -> list[Case]:
    """A case for each network, or for each op where ``run`` takes one."""
    if run in (_network, _ways):
        return [
            Case(f"{name} / {_name(dtype)} / {kind}", partial(run, network, dtype, *words))
            for name, network in _networks(device).items()
        ]
    return [
        Case(f"{op.name} / {example.name} / {_name(dtype)} / {kind}", partial(run, op, example, dtype, *words))
        for op, example in _examples(device)
    ]


def compilations(device: torch.device) -> list[Case]:
    """On a GPU each way of all calls once: so the kernels are compiled, several at a time, before any is timed."""
    if not on_a_gpu(device):
        return []
    dtypes = (half(device), torch.float32)
    return [
        case for dtype in dtypes for run in (_op_ways, _ways) for case in _named("kernels", dtype, device, run, False)
    ]


def cases(device: torch.device) -> list[Case]:
    """Peaks; networks; in each dtype single ops and which way wins for each call; torch.compile; and tune."""
    dtypes = (half(device), torch.float32)
    found = [Case("peaks", _peaks)]
    for dtype in dtypes:
        found += _named("step", dtype, device, _network, False)
    for dtype in dtypes:
        found += _named("forward+backward", dtype, device, _op, True, False)
        found += _named("ways", dtype, device, _op_ways, True)
        found += _named("ways", dtype, device, _ways, True)
    for dtype in dtypes:
        found += _named("forward", dtype, device, _op, False, False)
    for dtype in dtypes:
        found += _named("step, torch.compile", dtype, device, _network, True)
        found += _named("forward+backward, torch.compile", dtype, device, _op, True, True)
    for dtype in dtypes:
        found += _named("forward, torch.compile", dtype, device, _op, False, True)
    return found + [Case(f"{name} / tune", partial(_tune, network)) for name, network in _networks(device).items()]
