"""Every launch that the launchers make: each kernel, dtype and entry of the tables, on shapes of all kinds.

The launchers run on meta tensors and the launch is recorded instead, specialized as Triton does it: what is compiled is
what would run.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastops import kernels
from fastops.kernels import add_relu, bce, configs, conv, cross_entropy, linear, linear_cross_entropy, mse
from fastops.kernels.chunked_logits import Target
from fastops.kernels.launch import Plan

from .machine_code import Request
from .targets import TARGETS

TRITON_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "debug", "sanitize_overflow")


class Launch(NamedTuple):
    """One compilation, and what its machine code should show."""

    op: str
    request: Request
    shape: str
    wide: bool = False  # a product whose rows are aligned: 128-bit accesses are possible
    stream: int = 0  # bytes of the large tensors of a loss that each thread reads and writes for one tile
    width: int = 128  # bits of each access that does so, or more
    leading: bool = False  # a product of a shape that fills the GPU, with the first tile of its table

    @property
    def target(self) -> str:
        """The architecture that it is for."""
        return str(self.request["architecture"])

    @property
    def kernel(self) -> str:
        """The name of the kernel, without its module."""
        return str(self.request["kernel"].split(":")[1])

    @property
    def dtype(self) -> str:
        """Triton's name of what is computed with: "tf32" or "bf16x3" if float32 is rounded to it."""
        precision = str(self.request["constants"].get("INPUT_PRECISION", "ieee"))
        first = next(str(type_)[1:] for type_ in self.request["types"].values() if str(type_).startswith("*"))
        return first if precision == "ieee" else precision

    @property
    def product(self) -> bool:
        """Whether it multiplies matrices."""
        return "INPUT_PRECISION" in self.request["constants"]

    @property
    def config(self) -> str:
        """Block sizes, warps and stages."""
        constants = self.request["constants"]
        sizes = "x".join(str(value) for name, value in constants.items() if name.startswith("BLOCK"))
        stages = f" s{self.request['num_stages']}" if "num_stages" in self.request else ""
        return f"{sizes} w{self.request.get('num_warps', 4)}{stages}"


def recorded(
    target: str,
    tile: configs.Tile | None,
    precision: str,
    launcher: Callable[..., Any],
    *arguments: Any,
) -> tuple[Any, list[Request]]:
    """``launcher(*arguments)`` and the compilations it would ask for, with one tile for all products or the table's."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(plan: Plan, *tensors: Tensor) -> None:
        launches.append((plan.kernel.fn, (*tensors, *plan.numbers), plan.constants))

    replacements = {
        "launch": record,
        "input_precision": lambda *_: precision,
        "architecture": lambda _: configs.listed(target),
        "multiprocessors": lambda _: 100,
    }
    if tile is not None:
        persistent = isinstance(tile, configs.PersistentConfig)
        replacements["matmul_config"] = lambda *_: tile
        replacements["persistent_config"] = lambda *_: tile if persistent else None
    with ExitStack() as stack:
        stack.enter_context(patch.object(configs, "plans", {}))
        for module in (
            import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
        ):
            for name, replacement in replacements.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        result = launcher(*arguments)
    return result, [_request(target, *launch) for launch in launches]


def _request(target: str, function: Any, values: tuple[Any, ...], constants: dict[str, Any]) -> Request:
    types: dict[str, str | list[str]] = {}
    unaligned, fixed = [], dict(constants)
    for name, value in zip(inspect.signature(function).parameters, values, strict=False):
        if isinstance(value, Tensor):
            types[name] = "*" + TRITON_NAMES[value.dtype]
        elif isinstance(value, tuple):
            types[name] = ["i32:1" if number == 1 else "i32" for number in value]
        elif value == 1:
            fixed[name] = 1
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            unaligned += [name] if value % 16 else []
    options = {name: fixed.pop(name) for name in OPTIONS if name in fixed}
    kernel = f"{function.__module__}:{function.__name__}"
    return {
        "kernel": kernel,
        "architecture": target,
        "types": types,
        "constants": fixed,
        "unaligned": unaligned,
        **options,
    }


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _half_dtypes(target: str) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] if TARGETS[target].bfloat16 else [torch.float16]


def _tables(target: str) -> Iterator[tuple[torch.dtype, str, Sequence[configs.MatmulConfig]]]:
    """(dtype, precision, the tiles of its table) for every dtype of a matrix product."""
    listed = configs.listed(target)
    pairs = [(dtype, "ieee") for dtype in (*_half_dtypes(target), torch.float32, torch.float64)]
    for dtype, precision in dict.fromkeys([*pairs, (torch.float32, configs.reduced_precision(listed))]):
        yield dtype, precision, configs.matmul_candidates(listed, dtype, precision)


def linear_launches(target: str) -> Iterator[Launch]:
    """Every tile of the tables and what is taken for odd sizes; of one 16-bit dtype also all backward, few tiles
    with a long sum, and float32 results."""
    aligned, odd, deep = (512, 784, 512), (509, 783, 511), (64, 8192, 128)
    half = _half_dtypes(target)[0]
    for dtype, precision, tiles in _tables(target):
        persistent = configs.persistent_candidates(configs.listed(target), dtype, precision)
        first: tuple[configs.Tile, ...] = (tiles[0], *persistent[:1])
        table: list[tuple[configs.Tile | None, tuple[int, int, int]]] = [(tile, aligned) for tile in tiles]
        table += [(tile, aligned) for tile in persistent]
        for tile, shape in [*table, (None, odd), *([(None, deep)] if dtype is half else [])]:
            M, K, N = shape
            x, w, b, y = (_empty(*sizes, dtype=dtype) for sizes in ((M, K), (N, K), (N,), (M, N)))
            _, forward = recorded(target, tile, precision, linear.linear, x, w, b, True)
            requests = forward
            if shape != deep and (dtype is half or tile in first):
                requests += recorded(target, tile, precision, linear.linear_backward, y, x, w, y, True)[1]
            if dtype is half and tile in persistent[:1]:
                exact = _empty(M, N, dtype=torch.float32)
                requests += recorded(target, tile, precision, linear.matmul, x, w.t(), None, False, None, exact)[1]
            for request in requests:
                leading = tile in first and dtype.itemsize == 2
                yield Launch("linear", request, f"{M}x{K}x{N}", shape != odd, leading=leading)


def conv_launches(target: str) -> Iterator[Launch]:
    """Every tile of the tables; backward with all of one 16-bit dtype; few channels, odd ones, groups and volumes."""
    body, stride_2 = (8, 256, (28, 28), 256, (3, 3), 1, 1), (8, 128, (28, 28), 64, (3, 3), 2, 1)
    others = (
        (8, 3, (64, 64), 64, (7, 7), 2, 1),  # a stem
        (8, 24, (28, 28), 40, (3, 3), 1, 1),  # channels that are multiples of 8 alone
        (8, 6, (28, 28), 13, (5, 5), 1, 1),  # odd ones
        (8, 64, (28, 28), 64, (3, 3), 2, 64),  # depthwise
        (8, 64, (28, 28), 128, (3, 3), 1, 2),
        (8, 64, (100,), 64, (5,), 2, 1),
        (2, 32, (8, 14, 14), 64, (3, 3, 3), 2, 1),
    )
    half = _half_dtypes(target)[0]
    for dtype, precision, tiles in _tables(target):
        if precision != "ieee" and target.startswith("gfx"):
            continue  # `input_precision`: AMD's convolutions are float32
        table: list[tuple[configs.MatmulConfig | None, tuple[Any, ...]]] = [(tile, body) for tile in tiles]
        if dtype is half:
            table += [(tiles[0], stride_2), *((None, shape) for shape in others)]
        for tile, shape in table:
            N, C, size, out, kernel, stride, groups = shape
            n = len(size)
            x, w, b = (_empty(*sizes, dtype=dtype) for sizes in ((N, C, *size), (out, C // groups, *kernel), (out,)))
            options = (stride,) * n, tuple(k // 2 for k in kernel), (1,) * n, groups
            contiguous = torch.contiguous_format
            y, forward = recorded(target, tile, precision, conv.conv, x, w, b, *options, True, contiguous)
            arguments = (y, x, w, y, x.shape, w.shape, *options, True, contiguous)
            backward = []
            if dtype is half or tile == tiles[0]:
                backward = recorded(target, tile, precision, conv.conv_backward, *arguments)[1]
            for request in (*forward, *backward):
                name = f"{'x'.join(map(str, x.shape))} * {'x'.join(map(str, w.shape))} stride {stride}"
                launch = Launch("conv", request, name + (f" groups {groups}" if groups > 1 else ""))
                even = C // groups % 8 == 0 and out // groups % 8 == 0
                wide = launch.product and dtype.itemsize == 2 and even
                yield launch._replace(wide=wide, leading=tile == tiles[0] and shape == body and dtype.itemsize == 2)


def _loss_launches(
    target: str, op: str, shape: str, odd: bool, tensors: int, launcher: Callable[..., Any], *arguments: Any
) -> tuple[Any, list[Launch]]:
    """What the launcher returns, and its launches: of a kernel that passes over large ``tensors``, and of its sums."""
    result, (main, *sums) = recorded(target, None, "ieee", launcher, *arguments)
    if target.startswith("gfx"):
        main.pop("debug", None)  # an assertion of AMD brings a hundred accesses of its own
    threads = main["num_warps"] * TARGETS[target].warp_size
    elements = math.prod(value for name, value in main["constants"].items() if name.startswith("BLOCK"))
    stream = tensors * elements * arguments[0].element_size() // threads
    first = Launch(op, main, shape, stream=stream, width=64 if odd else 128)
    return result, [first, *(Launch(op, request, shape) for request in sums)]


def mse_launches(target: str) -> Iterator[Launch]:
    """Each dtype with a mean, and one without reduction; aligned sizes and odd ones."""
    half = _half_dtypes(target)
    for dtype, reduction, size in [
        *((dtype, "mean", 512 * 2048) for dtype in (*half, torch.float32, torch.float64)),
        (half[0], "none", 512 * 2048),
        (half[0], "mean", 509 * 2047),
        (torch.float32, "none", 509 * 2047),
    ]:
        a, shape, each, odd = _empty(size, dtype=dtype), f"{size} {reduction}", reduction == "none", size % 2 == 1
        loss, forward = _loss_launches(target, "mse_loss", shape, odd, 2 + each, mse.mse_loss, a, a, reduction)
        yield from forward
        arguments = (loss, a, a, reduction, True, True)
        yield from _loss_launches(target, "mse_loss", shape, odd, 4 + each, mse.mse_loss_backward, *arguments)[1]


def add_relu_launches(target: str) -> Iterator[Launch]:
    """Each dtype; aligned sizes and odd ones."""
    half = _half_dtypes(target)
    dtypes = (*half, torch.float32, torch.float64)
    for dtype, size in [*((dtype, 512 * 2048) for dtype in dtypes), (half[0], 509 * 2047)]:
        a, options = _empty(size, dtype=dtype), ("add_relu", str(size), size % 2 == 1, 3)
        result, forward = _loss_launches(target, *options, add_relu.add_relu, a, a)
        yield from forward
        yield from _loss_launches(target, *options, add_relu.add_relu_backward, a, result)[1]


def bce_launches(target: str) -> Iterator[Launch]:
    """Each dtype, with a weight for each element and one for each column; odd sizes without the latter."""
    half = _half_dtypes(target)
    op = "binary_cross_entropy_with_logits"
    shapes = [*((dtype, (512, 2048)) for dtype in (*half, torch.float32, torch.float64)), (half[0], (509, 2047))]
    for dtype, (rows, columns) in shapes:
        a, shape, odd = _empty(rows, columns, dtype=dtype), f"{rows}x{columns}", columns % 2 == 1
        arguments: tuple[Any, ...] = (a, a, a, None if odd else a[0], "mean")
        loss, forward = _loss_launches(target, op, shape, odd, 3, bce.bce, *arguments)
        yield from forward
        yield from _loss_launches(target, op, shape, odd, 5, bce.bce_backward, loss, *arguments, True, True)[1]


def cross_entropy_launches(target: str) -> Iterator[Launch]:
    """Few classes, many, probabilities, images, and odd numbers of classes."""
    half = _half_dtypes(target)
    for dtype, sizes, probabilities in (
        (half[0], (4096, 16, 1), False),
        (half[0], (4096, 1024, 1), True),
        (half[0], (4096, 32000, 1), False),
        (half[0], (4096, 50257, 1), False),
        (half[0], (4093, 1021, 1), True),
        (half[0], (8, 16, 4096), False),
        (half[-1], (4096, 1024, 1), False),
        (torch.float32, (4096, 1024, 1), False),
        (torch.float32, (4093, 13, 1), False),
        (torch.float64, (4096, 1024, 1), True),
    ):
        N, classes, positions = sizes
        logits = _empty(*sizes, dtype=dtype)
        truth = logits if probabilities else _empty(N, positions, dtype=torch.int64)
        weight = _empty(classes, dtype=dtype) if probabilities else None
        common, options = (logits, truth, weight), ("mean", -100, 0.1 if probabilities else 0.0)
        shape = f"{N}x{classes}x{positions} {'probabilities' if probabilities else 'indices'}"
        which = (target, "cross_entropy", shape, classes % 2 == 1)
        forward, backward = cross_entropy.cross_entropy, cross_entropy.cross_entropy_backward
        (loss, *saved), found = _loss_launches(*which, 1 + probabilities, forward, *common, *options)
        yield from found
        arguments = (loss, *common, *saved, *options, True, probabilities)
        yield from _loss_launches(*which, 2 + 2 * probabilities, backward, *arguments)[1]


def head_launches(target: str) -> Iterator[Launch]:
    """The first tile of every table, class indices or all options of probabilities; aligned sizes and odd ones."""
    half = _half_dtypes(target)[0]
    aligned, odd = (512, 768, 1024), (509, 783, 1021)
    for dtype, precision, _ in _tables(target):
        cases = [(aligned, True), *([(aligned, False), (odd, False)] if dtype is half else [])]
        for (M, K, N), dense in cases:
            x, w, b = (_empty(*sizes, dtype=dtype) for sizes in ((M, K), (N, K), (N,)))
            truth = _empty(M, N, dtype=dtype) if dense else _empty(M, dtype=torch.int64)
            goal = Target(truth, b if dense else None, -100, 0.1 if dense else 0.0, N)
            vector = _empty(M, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
            saved, needs = (goal, vector, vector, vector), (True, True, True, dense)
            for launcher, arguments in (
                (linear_cross_entropy.linear_cross_entropy, (x, w, b, goal, 1 << 30)),
                (linear_cross_entropy.linear_cross_entropy_backward, (vector, x, w, b, *saved, needs, 1 << 30)),
            ):
                for request in recorded(target, None, precision, launcher, *arguments)[1]:
                    if request["kernel"].startswith(linear_cross_entropy.__name__):  # the products behind are linear's
                        shape = f"{M}x{K}x{N} {'probabilities' if dense else 'indices'}"
                        yield Launch("linear_cross_entropy", request, shape, M == 512)


OPS: dict[str, Callable[[str], Iterator[Launch]]] = {
    "linear": linear_launches,
    "conv": conv_launches,
    "add_relu": add_relu_launches,
    "mse_loss": mse_launches,
    "cross_entropy": cross_entropy_launches,
    "binary_cross_entropy_with_logits": bce_launches,
    "linear_cross_entropy": head_launches,
}


def launches(target: str, ops: Sequence[str]) -> list[Launch]:
    """The launches of some ops for one target, each compilation once."""
    found: dict[str, Launch] = {}
    for op in ops:
        for launch in OPS[op](target):
            found.setdefault(repr(launch.request), launch)
    return list(found.values())
