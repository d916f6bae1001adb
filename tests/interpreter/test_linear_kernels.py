"""The linear kernels in the interpreter."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from accuracy import assert_as_accurate_as_torch
from guard import call_plainly, run_guarded, same_bits
from launches import record_stores, replace_launch
from torch import Tensor
from triton.runtime import _allocation

from fastops.kernels import configs, linear, matmul, private
from fastops.kernels.activation import RELU, Activation
from fastops.kernels.activation_backward import activation_backward
from fastops.kernels.configs import MatmulConfig, PersistentConfig
from fastops.kernels.launch import accumulator_dtype
from fastops.ops import activations

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = MatmulConfig(32, 16, 16, 1, 1)  # so that there are several tiles in each direction
SIZES = {
    "one": (1, 1, 1),
    "prime": (37, 23, 29),
    "tile-1": (31, 15, 15),
    "tile": (32, 16, 16),
    "tile+1": (33, 17, 17),
    "inner smaller than a tile": (40, 5, 20),
    "several groups of rows": (300, 16, 20),
}
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "strided": lambda rows, columns: torch.randn(2 * rows, 3 * columns)[::2, ::3],
    "expanded rows": lambda rows, columns: torch.randn(1, columns).expand(rows, columns),
    "expanded columns": lambda rows, columns: torch.randn(rows, 1).expand(rows, columns),
}


described = pytest.mark.skipif(
    private.triton_version() == "3.5", reason="the interpreter of Triton 3.5 refuses strides of descriptors in elements"
)


def torch_linear_relu(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (torch.relu(a @ b + bias),)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_sizes(dtype: torch.dtype, sizes: str) -> None:
    M, K, N = SIZES[sizes]
    tensors = tuple(torch.randn(shape).to(dtype) for shape in ((M, K), (K, N), (N,)))
    result = run_guarded(matmul.matmul, *tensors, RELU, SMALL)
    assert_as_accurate_as_torch(torch_linear_relu, ((result,), tensors))


@pytest.mark.parametrize(("M", "K", "N"), [(17, 70, 20), (1, 80, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_in_parts(dtype: torch.dtype, M: int, K: int, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of parts of the inner dimension, even more than steps, and the same bits each time."""
    tensors = tuple(torch.randn(shape).to(dtype) for shape in ((M, K), (K, N), (N,)))
    results = {}
    for splits in (1, 3, 100):
        monkeypatch.setattr(matmul, "inner_splits", lambda *_, splits=splits: splits)
        configs.forget_plans()
        call = run_guarded if splits == 3 else call_plainly
        results[splits] = call(matmul.matmul, *tensors, RELU, SMALL)
        assert_as_accurate_as_torch(torch_linear_relu, ((results[splits],), tensors))
    monkeypatch.setattr(matmul, "inner_splits", lambda *_: 3)
    configs.forget_plans()
    assert same_bits(results[3], matmul.matmul(*tensors, RELU, SMALL)), "not deterministic"
    plain = matmul.matmul(*tensors[:2], config=SMALL)
    assert_as_accurate_as_torch(lambda a, b: (a @ b,), ((plain,), tensors[:2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "K", "N", "parts"), [(8, 4096, 8, 2), (8, 128, 8, 1), (64, 4096, 512, 1), (64, 784, 128, 1)]
)
def test_few_tiles_and_a_long_sum_go_in_parts(
    M: int, K: int, N: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is rounded between the parts and their sum."""
    launched: list[tuple[str, Tensor]] = []
    replace_launch(monkeypatch, lambda plan, *tensors: launched.append((plan.kernel.__name__, tensors[-2])))
    c = matmul.matmul(torch.empty(M, K, dtype=dtype), torch.empty(K, N, dtype=dtype))
    (name, result), *rest = launched
    assert name == "matmul_kernel"
    if parts == 1:
        assert result is c and not rest
    else:
        assert result.shape == (parts, M, N) and result.dtype is accumulator_dtype(dtype)
        assert [name for name, _ in rest] == ["sum_of_splits_kernel"]


@pytest.mark.parametrize("tiles", [1, 3, 60, 131, 132, 133, 264, 265, 5000])
def test_number_of_parts_on_a_gpu(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is without a multiprocessor, no part is short, and no more moves than the operands have."""
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 132)
    found = set()
    for steps in (1, 7, 8, 100):
        for partial in (1 << 10, 1 << 20):
            for operands in (partial, 4 * partial, 100 * partial):
                splits = configs.inner_splits(torch.device("cuda"), tiles, steps, partial, operands)
                assert splits == 1 or (
                    splits * tiles <= 2 * 132 and 4 * splits <= steps and 2 * splits * partial <= operands
                )
                found.add(splits)
    assert (len(found) > 1) == (tiles <= 132)


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_matmul_layouts(a_layout: str, b_layout: str) -> None:
    tensors = LAYOUTS[a_layout](40, 24), LAYOUTS[b_layout](24, 20), torch.randn(20, 1)[:, 0]
    result = run_guarded(matmul.matmul, *tensors, RELU, SMALL)
    assert_as_accurate_as_torch(torch_linear_relu, ((result,), tensors))
    assert result.is_contiguous()


@described
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("b_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("a_layout", ["contiguous", "transposed"])
def test_persistent_matmul_has_the_bits_of_the_other(a_layout: str, b_layout: str, halves: bool) -> None:
    """All edges of tiles, an inner dimension of whole steps and one that is smaller than a step, and a lone tile."""
    config = PersistentConfig(*SMALL, HALVES=halves, WARP_SPECIALIZE=True)
    for M, K, N in ((72, 48, 40), (40, 8, 24), (16, 16, 8)):
        tensors = LAYOUTS[a_layout](M, K), LAYOUTS[b_layout](K, N), torch.randn(N)
        result = run_guarded(matmul.matmul, *tensors, RELU, config)
        assert same_bits(result, matmul.matmul(*tensors, RELU, SMALL))
    assert same_bits(matmul.matmul(*tensors[:2], config=config), matmul.matmul(*tensors[:2], config=SMALL))


@described
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_persistent_matmul_where_the_last_step_is_short(dtype: torch.dtype) -> None:
    config = PersistentConfig(*SMALL, HALVES=dtype.itemsize > 2, WARP_SPECIALIZE=False)
    tensors = tuple(torch.randn(shape).to(dtype) for shape in ((40, 40), (40, 24), (24,)))
    result = run_guarded(matmul.matmul, *tensors, RELU, config)
    assert_as_accurate_as_torch(torch_linear_relu, ((result,), tensors))


IN_DESCRIPTORS = [PersistentConfig(*SMALL, HALVES=halves, WARP_SPECIALIZE=False) for halves in (False, True)]


@pytest.mark.parametrize(
    ("config", "parts"), [(SMALL, 1), (SMALL, 3), *(pytest.param(each, 1, marks=described) for each in IN_DESCRIPTORS)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_added_to_what_is_there(
    dtype: torch.dtype, config: configs.Tile, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, to every element, and to nothing else: sums of whole numbers are exact."""
    monkeypatch.setattr(matmul, "inner_splits", lambda *_: parts)
    a, b, total = (torch.randint(-4, 5, shape).to(dtype) for shape in ((72, 48), (48, 40), (72, 40)))
    total = total.float()

    def added(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
        return matmul.matmul(a, b, config=config, out=total.clone(), add=True)

    assert torch.equal(run_guarded(added, a, b, total), total + a.float() @ b.float())


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_added_to_is_written_once(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes behind the edge repeat the last element: on a GPU one could read what the other has written."""
    monkeypatch.setattr(matmul, "inner_splits", lambda *_: parts)
    written, total = record_stores(monkeypatch), torch.zeros(71, 37)
    matmul.matmul(torch.randn(71, 48), torch.randn(48, 37), config=SMALL, out=total, add=True)
    addresses = np.concatenate(written)
    assert len(addresses) == len(np.unique(addresses)) == total.numel() * (1 if parts == 1 else parts + 1)


HALF = {"dtype": torch.bfloat16}
CHOICES = {
    "16 bits": ("sm90", torch.empty(512, 64, **HALF), torch.empty(64, 512, **HALF), True),
    "both transposed": ("sm100", torch.empty(64, 512, **HALF).t(), torch.empty(512, 64, **HALF).t(), True),
    "rows within larger ones": ("sm120", torch.empty(512, 128, **HALF)[:, 64:], torch.empty(64, 512, **HALF), True),
    "an older GPU": ("sm80", torch.empty(512, 64, **HALF), torch.empty(64, 512, **HALF), False),
    "float32": ("sm90", torch.empty(512, 64), torch.empty(64, 512), False),
    "few tiles": ("sm90", torch.empty(128, 64, **HALF), torch.empty(64, 128, **HALF), False),
    "address": ("sm90", torch.empty(512, 128, **HALF)[:, 1:65], torch.empty(64, 512, **HALF), False),
    "stride": ("sm90", torch.empty(512, 68, **HALF)[:, :64], torch.empty(64, 512, **HALF), False),
    "rows of the result": ("sm90", torch.empty(512, 64, **HALF), torch.empty(64, 520, **HALF)[:, :508], False),
    "nothing contiguous": ("sm90", torch.empty(512, 128, **HALF)[:, ::2], torch.empty(64, 512, **HALF), False),
    "expanded": ("sm90", torch.empty(1, 64, **HALF).expand(512, 64), torch.empty(64, 512, **HALF), False),
    "overlapping": (
        "sm90",
        torch.empty(8192, **HALF).as_strided((512, 64), (8, 1)),
        torch.empty(64, 512, **HALF),
        False,
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice_of_the_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor descriptors where the GPU has them, they can describe all tensors, and no multiprocessor stays idle."""
    architecture, a, b, persistent = CHOICES[case]
    names: list[str] = []
    replace_launch(monkeypatch, lambda plan, *_: names.append(plan.kernel.__name__))
    monkeypatch.setattr(configs, "architecture", lambda _: architecture)
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 4)
    monkeypatch.setattr(configs, "_INTERPRETED", configs.matmul_candidates(architecture, a.dtype, "ieee"))
    matmul.matmul(a, b)
    assert names[0] == ("persistent_matmul_kernel" if persistent else "matmul_kernel")


def test_descriptors_leave_the_users_allocator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one of their own, also in a thread where none was set, while the kernel starts and no longer."""
    allocator, allocators = _allocation._allocator, []
    replace_launch(monkeypatch, lambda *_: allocators.append(allocator.get()))
    tensors = torch.empty(16, 16), torch.empty(16, 16)
    config = PersistentConfig(*SMALL, HALVES=False, WARP_SPECIALIZE=False)

    def users(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    matmul.matmul(*tensors, config=config)
    nobodys = allocator.get()
    triton.set_allocator(users)
    try:
        matmul.matmul(*tensors, config=config)
        assert allocator.get() is users
    finally:
        triton.set_allocator(nobodys)
    thread = threading.Thread(target=matmul.matmul, args=tensors, kwargs={"config": config})
    thread.start()
    thread.join()
    assert [own.__module__ for own in allocators] == [matmul.__name__] * 3


@pytest.mark.parametrize("need_sum", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (130, 40), (3, 1025)])
def test_activation_backward(shape: tuple[int, int], layout: str, need_sum: bool) -> None:
    grad, output = LAYOUTS[layout](*shape), torch.randn(shape)
    output.flatten()[0] = float("nan")  # torch's ReLU keeps NaN, and lets its gradient through
    masked, total = run_guarded(activation_backward, grad, output, need_sum)
    expected = torch.ops.aten.threshold_backward(grad, output, 0)
    assert torch.equal(masked, expected)
    assert (total is not None) == need_sum
    if total is not None:
        assert_as_accurate_as_torch(lambda grad: (grad.sum(0),), ((total,), (expected,)))


def test_column_sum_of_many_rows_takes_two_stages() -> None:
    grad = torch.randn(1100, 40)
    _, total = activation_backward(grad, None, True)
    assert_as_accurate_as_torch(lambda grad: (grad.sum(0),), ((total,), (grad,)))


def torchs_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, output: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gz = grad_output if output is None else torch.where(output <= 0, 0, grad_output)
    gz = gz.flatten(0, -2)
    return (gz @ weight).reshape(input.shape), gz.t() @ input.flatten(0, -2), gz.sum(0)


KINDS: dict[str, MatmulConfig | PersistentConfig | None] = {
    "pointers": SMALL,
    "descriptors": PersistentConfig(*SMALL, HALVES=False, WARP_SPECIALIZE=False),
    "halves": PersistentConfig(*SMALL, HALVES=True, WARP_SPECIALIZE=False),
    "parts": SMALL,
}


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activation(kind: str, dtype: torch.dtype, saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the product before it is rounded; what is saved is the product as it is without an activation."""
    if kind == "parts":
        monkeypatch.setattr(matmul, "inner_splits", lambda *_: 3)
        configs.forget_plans()
    a, b, bias = (torch.randn(shape).to(dtype) for shape in ((72, 48), (48, 40), (40,)))
    before = torch.full((72, 40), torch.nan, dtype=dtype) if saves else None
    result = run_guarded(lambda *given: matmul.matmul(*given[:3], ("silu",), KINDS[kind], None, before), a, b, bias)
    assert_as_accurate_as_torch(lambda a, b, bias: (F.silu(a @ b + bias),), ((result,), (a, b, bias)))
    if before is not None:
        assert same_bits(before, matmul.matmul(a, b, bias, config=KINDS[kind]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [("silu",), ("tanh",), ("leaky_relu", -0.3)], ids=str)
def test_activation_backward_of_others(activation: Activation, dtype: torch.dtype) -> None:
    def torchs(grad: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
        before = activations.before(activation, grad, saved)
        return before, before.sum(0)

    grad, saved = torch.randn(70, 33).to(dtype).t().contiguous().t(), torch.randn(70, 33).to(dtype)
    results = run_guarded(lambda *given: activation_backward(*given, True, activation), grad, saved)
    assert_as_accurate_as_torch(torchs, (results, (grad, saved)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_linear_backward(relu: bool, dtype: torch.dtype) -> None:
    grad_output, input, weight = (torch.randn(shape).to(dtype) for shape in ((5, 8, 20), (5, 8, 33), (20, 33)))
    output = torch.randn(5, 8, 20).to(dtype) if relu else None
    tensors = grad_output, input, weight, output
    results = run_guarded(linear.linear_backward, *tensors, True)
    assert_as_accurate_as_torch(torchs_backward, (results, tensors))
    assert same_bits(results, linear.linear_backward(*tensors, True)), "not deterministic"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_linear_backward_with_the_vendors_products(relu: bool, dtype: torch.dtype, layout: str) -> None:
    shapes = (40, 20), (40, 33), (20, 33), (40, 20)
    vendor = functools.partial(linear.linear_backward, vendor=True)
    runs = []
    for call in (run_guarded, *[call_plainly] * 15):
        *tensors, output = (LAYOUTS[layout](*shape).to(dtype) for shape in shapes)
        if layout.startswith("expanded"):
            tensors[0] = LAYOUTS["strided"](*shapes[0]).to(dtype)  # the error of a sum of equal numbers is luck
        tensors.append(output if relu else None)
        runs.append((call(vendor, *tensors, True), tensors))
        expected = linear.linear_backward(*tensors, True)
        assert [result.stride() for result in runs[-1][0]] == [result.stride() for result in expected]
    assert_as_accurate_as_torch(torchs_backward, *runs)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3)), ids=str)
def test_vendors_products_leave_one_launch(
    needed: tuple[bool, bool, bool], relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask and the sum, and none where there is neither."""
    launched: list[str] = []
    replace_launch(monkeypatch, lambda plan, *_: launched.append(plan.kernel.__name__))
    grad, input, weight = torch.randn(2, 4, 3), torch.randn(2, 4, 5), torch.randn(3, 5)
    words = input if needed[1] else None, weight if needed[0] else None, grad if relu else None, needed[2]
    results = linear.linear_backward(grad, *words, vendor=True)
    assert tuple(result is not None for result in results) == needed
    assert all(result._base is None for result in results[:2] if result is not None)  # autograd wants no views
    assert launched == ["activation_backward_kernel"] * (relu or needed[2])


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed(needed: tuple[bool, bool, bool]) -> None:
    grad_output, input, weight = torch.randn(4, 3), torch.randn(4, 5), torch.randn(3, 5)
    results = linear.linear_backward(
        grad_output, input if needed[1] else None, weight if needed[0] else None, None, needed[2]
    )
    assert tuple(result is not None for result in results) == needed
