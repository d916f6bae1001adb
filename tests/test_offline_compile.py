"""Every kernel, compiled for GPUs that need not be here: no spills, matrix units, 128-bit accesses, shared memory.

What is compiled is what the launchers would launch: they run on meta tensors, and the launch is recorded instead.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastops.kernels import add_relu, bce, configs, conv, cross_entropy, elementwise, linear, linear_cross_entropy, mse
from fastops.kernels.head import Target

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
SHARED_MEMORY = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
TRITON_NAME = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "debug", "sanitize_overflow")


class Launch(NamedTuple):
    """One compilation and what its machine code must show."""

    name: str
    request: dict[str, Any]
    matrix_units: bool
    wide_accesses: bool


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(
    architecture: str, tile: configs.MatmulConfig | None, precision: str, launcher: Callable[..., Any], *arguments: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """``launcher(*arguments)``, and the compilations that it would ask for, specialized as Triton does at a launch."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: Any, *values: Any, **constants: Any) -> None:
        launches.append((kernel.fn, values, constants))

    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, linear_cross_entropy, conv, add_relu, mse, cross_entropy, bce, elementwise):
            patch.setattr(module, "launch", record)
        patch.setattr(configs, "architecture", lambda _: architecture)
        patch.setattr(configs, "multiprocessors", lambda _: 100)
        if tile is not None:
            patch.setattr(linear, "matmul_config", lambda *_: tile)
            patch.setattr(linear_cross_entropy, "matmul_config", lambda *_: tile)
            patch.setattr(configs, "matmul_config", lambda *_: tile)
        for module in (linear, linear_cross_entropy, conv):
            patch.setattr(module, "input_precision", lambda *_: precision)
        result = launcher(*arguments)
    requests = []
    for function, values, constants in launches:
        types, unaligned, fixed = {}, [], dict(constants)
        for name, value in zip(inspect.signature(function).parameters, values, strict=False):
            if isinstance(value, Tensor):
                types[name] = "*" + TRITON_NAME[value.dtype]
            elif isinstance(value, tuple):
                types[name] = ["i32:1" if number == 1 else "i32" for number in value]
            elif value == 1:
                fixed[name] = 1
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                unaligned += [name] if value % 16 else []
        options = {name: fixed.pop(name) for name in OPTIONS if name in fixed}
        kernel = f"{function.__module__}:{function.__name__}"
        request = {"kernel": kernel, "architecture": architecture, "types": types, "constants": fixed}
        requests.append({**request, "unaligned": unaligned, **options})
    return result, requests


def linear_launches(architecture: str) -> Iterator[Launch]:
    """Every tile of the table forward; the smallest of bfloat16 also backward. What is taken for odd sizes."""
    aligned, odd = (512, 784, 512), (509, 783, 511)
    table: list[tuple[torch.dtype, str, configs.MatmulConfig | None, tuple[int, int, int], Callable[..., Any]]]
    half = configs.matmul_candidates(architecture, torch.bfloat16, "ieee")
    table = [(torch.bfloat16, "ieee", tile, aligned, linear.linear) for tile in half]
    table += [(torch.bfloat16, "ieee", half[-1], aligned, linear.linear_backward)]
    table += [(torch.bfloat16, "ieee", None, odd, linear.linear)]
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")):
        if precision == "ieee" or architecture.startswith("sm"):
            tiles = configs.matmul_candidates(architecture, dtype, precision)
            table += [(dtype, precision, tile, aligned, linear.linear) for tile in tiles]
    for dtype, precision, tile, (M, K, N), launcher in table:
        x, w, b, y = (empty(*shape, dtype=dtype) for shape in ((M, K), (N, K), (N,), (M, N)))
        arguments = (x, w, b, True) if launcher is linear.linear else (y, x, w, y, True)
        for request in recorded(architecture, tile, precision, launcher, *arguments)[1]:
            product = request["kernel"].endswith("matmul_kernel")
            yield Launch(
                f"{request['kernel']} {dtype} {precision} {tile} {M}x{K}x{N} {launcher.__name__}",
                request,
                matrix_units=product and (dtype.itemsize == 2 or precision == "tf32"),
                wide_accesses=M == 512,
            )


def conv_launches(architecture: str) -> Iterator[Launch]:
    """Every tile of the table, forward and backward; what is taken for few channels, odd ones, groups and volumes."""
    half = configs.matmul_candidates(architecture, torch.bfloat16, "ieee")
    body, stride_2 = (8, 64, (28, 28), 128, (3, 3), 1, 1), (8, 128, (28, 28), 64, (3, 3), 2, 1)
    table: list[tuple[torch.dtype, str, configs.MatmulConfig | None, tuple[Any, ...]]]
    table = [(torch.bfloat16, "ieee", tile, shape) for tile in half for shape in (body, stride_2)]
    table += [
        (torch.bfloat16, "ieee", None, shape)
        for shape in (
            (8, 3, (64, 64), 64, (7, 7), 2, 1),  # a stem
            (8, 24, (28, 28), 40, (3, 3), 1, 1),  # channels that are multiples of 8 alone
            (8, 6, (28, 28), 13, (5, 5), 1, 1),  # odd ones
            (8, 64, (28, 28), 64, (3, 3), 2, 64),  # depthwise
            (8, 64, (28, 28), 128, (3, 3), 1, 2),
            (8, 512, (7, 7), 512, (3, 3), 1, 1),
            (8, 64, (100,), 64, (5,), 2, 1),
            (2, 32, (8, 14, 14), 64, (3, 3, 3), 2, 1),
        )
    ]
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")):
        if precision == "ieee" or architecture.startswith("sm"):
            tiles = configs.matmul_candidates(architecture, dtype, precision)
            table += [(dtype, precision, tile, body) for tile in tiles]
    for dtype, precision, tile, (N, C, size, out, kernel, stride, groups) in table:
        n = len(size)
        x, w, b = (
            empty(N, C, *size, dtype=dtype),
            empty(out, C // groups, *kernel, dtype=dtype),
            empty(out, dtype=dtype),
        )
        options = (stride,) * n, tuple(k // 2 for k in kernel), (1,) * n, groups
        contiguous = torch.contiguous_format
        y, forward = recorded(architecture, tile, precision, conv.conv, x, w, b, *options, True, contiguous)
        arguments = (y, x, w, y, x.shape, w.shape, *options, True, contiguous)
        backward = recorded(architecture, tile, precision, conv.conv_backward, *arguments)[1]
        for request in (*forward, *backward):
            product = "conv.py:conv_kernel conv_grad_input_kernel conv_grad_weight_kernel"
            name = request["kernel"].split(":")[1]
            is_product = name in product
            yield Launch(
                f"{name} {dtype} {precision} {tile} {x.shape} {w.shape} stride {stride} groups {groups}",
                request,
                matrix_units=is_product and (dtype.itemsize == 2 or precision == "tf32"),
                wide_accesses=is_product and dtype.itemsize == 2 and C // groups % 8 == 0 and out // groups % 8 == 0,
            )


def loss_launches(architecture: str) -> Iterator[Launch]:
    """All losses of elements and logits, forward and backward: few classes, many, probabilities, and images."""

    def launches(name: str, launcher: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Launch]]:
        result, requests = recorded(architecture, None, "ieee", launcher, *arguments)
        return result, [Launch(f"{r['kernel']} {name}", r, False, fills_128_bits(r)) for r in requests]

    for dtype, reduction in ((torch.bfloat16, "mean"), (torch.bfloat16, "none"), (torch.float32, "mean")):
        a = empty(512, 2048, dtype=dtype)
        loss, forward = launches(f"{dtype} {reduction}", mse.mse_loss, a, a, reduction)
        yield from forward
        yield from launches(f"{dtype} {reduction}", mse.mse_loss_backward, loss, a, a, reduction, True, True)[1]
    for dtype in (torch.bfloat16, torch.float32):
        a = empty(512, 2048, dtype=dtype)
        sum_, forward = launches(f"{dtype}", add_relu.add_relu, a, a)
        yield from forward
        yield from launches(f"{dtype}", add_relu.add_relu_backward, a, sum_)[1]
        arguments: tuple[Any, ...] = (a, a, a, a[0], reduction)  # one weight for each element, one for each column
        loss, forward = launches(f"{dtype} {reduction}", bce.bce, *arguments)
        yield from forward
        yield from launches(f"{dtype} {reduction}", bce.bce_backward, loss, *arguments, True, True)[1]
    for dtype, shape, probabilities in (
        (torch.bfloat16, (4096, 16, 1), False),
        (torch.bfloat16, (4096, 1024, 1), True),
        (torch.bfloat16, (4096, 32000, 1), False),
        (torch.bfloat16, (8, 16, 4096), False),
        (torch.float32, (4096, 1024, 1), False),
        (torch.float64, (4096, 1024, 1), True),
    ):
        N, classes, positions = shape
        logits = empty(*shape, dtype=dtype)
        target = logits if probabilities else empty(N, positions, dtype=torch.int64)
        weight = empty(classes, dtype=dtype) if probabilities else None
        common, options = (logits, target, weight), ("mean", -100, 0.1 if probabilities else 0.0)
        name = f"{dtype} {shape} {target.dtype}"
        (loss, *saved), forward = launches(name, cross_entropy.cross_entropy, *common, *options)
        yield from forward
        arguments = (loss, *common, *saved, *options, True, probabilities)
        yield from launches(name, cross_entropy.cross_entropy_backward, *arguments)[1]


def head_launches(architecture: str) -> Iterator[Launch]:
    """Linear + cross-entropy: every tile of the table, class indices and all options of probabilities; odd sizes."""
    half = configs.matmul_candidates(architecture, torch.bfloat16, "ieee")
    table: list[tuple[torch.dtype, str, configs.MatmulConfig | None, tuple[int, int, int], bool]]
    table = [(torch.bfloat16, "ieee", tile, (512, 768, 1024), dense) for tile in half for dense in (False, True)]
    table += [(torch.bfloat16, "ieee", None, (509, 783, 1021), False)]
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")):
        if precision == "ieee" or architecture.startswith("sm"):
            tiles = configs.matmul_candidates(architecture, dtype, precision)
            table += [(dtype, precision, tile, (512, 768, 1024), True) for tile in tiles]
    for dtype, precision, tile, (M, K, N), dense in table:
        x, w, b = empty(M, K, dtype=dtype), empty(N, K, dtype=dtype), empty(N, dtype=dtype)
        goal = empty(M, N, dtype=dtype) if dense else empty(M, dtype=torch.int64)
        target = Target(goal, b if dense else None, -100, 0.1 if dense else 0.0, N)
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        vector = empty(M, dtype=exact)
        needs = (True, True, True, dense)
        forward, backward = (
            linear_cross_entropy.linear_cross_entropy,
            linear_cross_entropy.linear_cross_entropy_backward,
        )
        arguments = (vector, x, w, b, target, vector, vector, vector, needs, 1 << 30)
        requests = recorded(architecture, tile, precision, forward, x, w, b, target, 1 << 30)[1]
        requests += recorded(architecture, tile, precision, backward, *arguments)[1]
        for request in requests:
            if not request["kernel"].startswith(linear_cross_entropy.__name__):  # the products behind are linear's
                continue
            yield Launch(
                f"{request['kernel']} {dtype} {precision} {tile} {M}x{K}x{N} {'dense' if dense else 'indices'}",
                request,
                matrix_units=dtype.itemsize == 2 or precision == "tf32",
                wide_accesses=M == 512,
            )


def fills_128_bits(request: dict[str, Any]) -> bool:
    """Whether a tile holds 16 bytes of the input or more for every thread (a sum of partial sums reads too little)."""
    constants, element = request["constants"], request["types"].get("input_ptr")
    if element is None:
        return False
    elements = constants.get("BLOCK", 1) * constants.get("BLOCK_ROWS", 1) * constants.get("BLOCK_CLASSES", 1)
    threads = request["num_warps"] * (64 if request["architecture"].startswith("gfx") else 32)
    return bool(elements * (int(element[-2:]) // 8) >= 16 * threads)


def machine_code(requests: list[str]) -> list[dict[str, Any]]:
    """What `offline.py`, in a process without the interpreter, finds."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "offline.py")]
    result = subprocess.run(
        script,
        input=f"[{','.join(requests)}]",
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("launches", [linear_launches, conv_launches, loss_launches, head_launches])
def test_machine_code(architecture: str, launches: Callable[[str], Iterator[Launch]]) -> None:
    wanted = {json.dumps(launch.request): launch for launch in launches(architecture)}
    problems = []
    for launch, machine in zip(wanted.values(), machine_code(list(wanted)), strict=True):
        if machine["spilled_registers"]:
            problems.append(f"{launch.name} spills {machine['spilled_registers']} registers")
        if machine["shared_memory"] > SHARED_MEMORY[architecture]:
            problems.append(f"{launch.name} takes {machine['shared_memory']} bytes of shared memory")
        if launch.matrix_units and not machine["matrix_instructions"]:
            problems.append(f"{launch.name} uses no matrix unit")
        if launch.wide_accesses and not machine["wide_accesses"]:
            problems.append(f"{launch.name} has no 128-bit access among {machine['accesses']}")
    assert not problems, "\n".join(problems)


def test_defects_would_show() -> None:
    """The check reads something: a tile with too many accumulators spills, and float32 takes no matrix unit."""
    x = empty(512, 512, dtype=torch.float32)
    tile = configs.MatmulConfig(128, 64, 16, 1, 2)
    _, (request,) = recorded("sm80", tile, "ieee", linear.linear, x, x, None, False)
    (machine,) = machine_code([json.dumps(request)])
    assert machine["spilled_registers"] > 0
    assert machine["matrix_instructions"] == {}
