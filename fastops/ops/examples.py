"""How the commands call an op, to check it, to time it and to compile it for GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

Named = dict[str, Any]


class Sizes(NamedTuple):
    """The numbers of rows, of features or classes, and of outputs."""

    rows: int
    features: int
    outputs: int


TINY: Final = Sizes(2, 3, 2)  # for numerical derivatives, which cost two calls per element
SMALL: Final = Sizes(13, 37, 11)  # for a CPU, which may have to interpret kernels
LARGE: Final = Sizes(300, 517, 261)  # for a GPU: several tiles each way, the last ones not full


class Example(NamedTuple):
    """One way to call an op.

    ``draw`` makes its tensors, float32 and on the CPU: those to differentiate by, and constant ones. ``options`` are
    the other keyword arguments.
    """

    name: str
    draw: Callable[[Sizes, torch.Generator], tuple[Named, Named]]
    options: Named = {}  # noqa: RUF012  (nobody writes to it)


def transposed(tensor: Tensor) -> Tensor:
    """The same values, in the other order in memory."""
    return tensor.mT.contiguous().mT


class Audit(Protocol):
    """What `Op.audit` is handed for one target. It runs launchers on tensors without values, and notes their launches.

    A launch that is yielded says what its machine code should show; ``_replace`` changes that: ``wide`` (a product with
    aligned rows), ``leading`` (one that fills the GPU, with the first tile of its table).
    """

    target: str
    half_dtypes: Sequence[torch.dtype]  # those of 16 bits that the target has
    dtypes: Sequence[torch.dtype]

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor without values."""

    def tables(self) -> Iterator[tuple[torch.dtype, str, Sequence[Any], Sequence[Any]]]:
        """Dtype and precision of every kind of product, and the tiles of its two tables."""

    def launches(
        self, shape: str, tile: Any, precision: str, launcher: Callable[..., Any], *arguments: Any
    ) -> tuple[Any, list[Any]]:
        """What the launcher returns, and its launches: with one tile for all products, or for None the table's."""

    def streams(
        self, shape: str, odd: bool, tensors: int, launcher: Callable[..., Any], *arguments: Any
    ) -> tuple[Any, list[Any]]:
        """The same where the first kernel passes once over this many large ``tensors``, of an odd size or not."""
