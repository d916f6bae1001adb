"""What `print` shows of a layer in a swapped model: also what it is fused with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch

_fused: Final[ContextVar[Mapping[int, str] | None]] = ContextVar("fused", default=None)


@contextmanager
def showing(find: Callable[[], Mapping[int, str]]) -> Iterator[None]:
    """Inside, layers show what ``find`` says of them, by id. The outermost of such blocks decides."""
    outer = _fused.get()
    token = _fused.set(find() if outer is None else outer)
    try:
        yield
    finally:
        _fused.reset(token)


def shown(kind: type[torch.nn.Module]) -> Callable[[Any], str]:
    """The ``extra_repr`` of a layer of ours in the place of ``kind``."""

    def extra_repr(self: Any) -> str:
        return ", ".join(filter(None, (kind.extra_repr(self), (_fused.get() or {}).get(id(self)))))

    return extra_repr
