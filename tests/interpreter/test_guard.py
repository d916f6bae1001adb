"""The guard sees what a kernel touches, the addresses that a mask hides, and every bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastops import guard


@triton.jit
def copy_kernel(
    source_ptr, target_ptr, size, read, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK lanes, of which ``read`` are clamped to the first ``size`` where they load."""
    lanes = tl.arange(0, BLOCK)
    sources = tl.where(lanes < read, tl.minimum(lanes, size - 1), lanes)
    values = tl.load(source_ptr + sources, mask=lanes < size if MASK_LOAD else None)
    tl.store(target_ptr + lanes, values, mask=lanes < size if MASK_STORE else None)


def copied(read: int, mask_load: bool = True, mask_store: bool = True) -> Callable[[Tensor], Tensor]:
    def launcher(source: Tensor) -> Tensor:
        target = torch.empty_like(source)
        copy_kernel[(1,)](source, target, len(source), read, mask_load, mask_store, 8)
        return target

    return launcher


def test_clamped_and_masked_lanes_are_right() -> None:
    source = torch.randn(5)
    assert torch.equal(guard.run_guarded(copied(read=8), source), source)


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (copied(read=0), "where the mask of a load is false"),
        (copied(read=0, mask_load=False), "reached outside"),
        (copied(read=8, mask_store=False), "reached outside"),
    ],
)
def test_addresses_outside_are_seen(launcher: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(Exception, match=words):
        guard.run_guarded(launcher, torch.randn(5))


def test_addresses_between_elements_are_seen() -> None:
    """Nobody may read them, but where a mask is false one may be formed."""
    with pytest.raises(Exception, match="reached outside"):
        guard.run_guarded(copied(read=8), torch.randn(10)[::2])


def test_kernels_that_are_let_off_are_kernels() -> None:
    from fastops.kernels import cross_entropy, depthwise, matmul

    known = {name for module in (cross_entropy, depthwise, matmul) for name in vars(module)}
    assert known.issuperset(guard.MASKED_OUTSIDE)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([torch.nan]), -torch.tensor([torch.nan]), True),
        (torch.tensor([torch.inf]), torch.tensor([torch.finfo(torch.float32).max]), False),
        (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16), False),
        (torch.ones(2, 3).t(), torch.ones(3, 2), False),
        ((torch.ones(()), None), (torch.ones(()), None), True),
        (torch.ones(2, 1)[:, 0], torch.ones(2, 1)[:, 0], True),
    ],
)
def test_same_bits(first: Tensor, second: Tensor, same: bool) -> None:
    assert guard.same_bits(first, second) is same
