"""Values and slopes of the activations in the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from accuracy import assert_as_accurate_as_torch
from torch import Tensor

from fastops.kernels.activation import PARAMETERS, Activation, needs_input
from fastops.kernels.epilogue import activated, slope
from fastops.ops.activations import FUNCTIONS

INF, NAN = float("inf"), float("nan")
SPECIAL = [INF, -INF, NAN, 0.0, -0.0, 1e4, -1e4, 3.0, -3.0, 6.0, 1e-30, -1e-30]
ACTIVATIONS: list[Activation] = [(name, *parameters.values()) for name, parameters in PARAMETERS.items()]
ACTIVATIONS += [("leaky_relu", 0.3), ("leaky_relu", -0.3), ("leaky_relu", 0.0)]
ACTIVATIONS += [("elu", -0.7), ("elu", 2.5), ("softplus", 3.0, 2.0), ("softplus", -1.0, 20.0)]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


@triton.jit
def _kernel(z_ptr, y_ptr, slope_ptr, size, ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr):
    """One program."""
    ACCUMULATOR: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    positions = tl.arange(0, 4096)
    own = positions < size
    z = tl.load(z_ptr + positions, mask=own, other=0.0).to(ACCUMULATOR)
    y = activated(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    saved = z if NEEDS_INPUT else y.to(ACCUMULATOR)
    tl.store(y_ptr + positions, y, mask=own)
    tl.store(slope_ptr + positions, slope(saved, ACTIVATION).to(slope_ptr.dtype.element_ty), mask=own)


def run(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    y, slopes = torch.empty_like(z), torch.empty_like(z)
    _kernel[(1,)](z, y, slopes, z.numel(), activation, needs_input(activation))
    return y, slopes


def torchs(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    y = FUNCTIONS[activation[0]](z, *activation[1:])
    return y.detach(), torch.autograd.grad(y, z, torch.ones_like(y))[0]


def test_every_name_has_a_function_of_torch() -> None:
    assert FUNCTIONS.keys() == PARAMETERS.keys()


@every_dtype
@every_activation
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_accuracy(activation: Activation, dtype: torch.dtype, scale: float) -> None:
    z = (torch.randn(4000, dtype=torch.float64) * scale).to(dtype)
    for index in range(2):  # each held to its own error
        found = run(activation, z)[index : index + 1]
        assert_as_accurate_as_torch(lambda z, index=index: torchs(activation, z)[index : index + 1], (found, [z]))


@every_activation
def test_what_is_not_finite_or_zero_is_as_torchs(activation: Activation) -> None:
    """Wherever torch gives the same in float32 and float64, in vectors and one by one."""
    z = torch.tensor(SPECIAL)
    found = run(activation, z)
    alone = [torchs(activation, each[None]) for each in z]
    columns = found, torchs(activation, z.double()), torchs(activation, z), map(torch.cat, zip(*alone, strict=True))
    for result, exact, *others in zip(*columns, strict=True):
        exact = exact.float()
        agreed = torch.stack([torch.isclose(other, exact, equal_nan=True) for other in others]).all(0)
        torch.testing.assert_close(result[agreed], exact[agreed], equal_nan=True)
        zero = agreed & (exact == 0) & (activation[0] not in ("relu", "relu6"))
        assert torch.equal(result[zero].signbit(), exact[zero].signbit())
