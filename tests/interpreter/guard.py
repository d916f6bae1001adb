"""What runs a launcher: `fastops.guard`, or nothing."""

from collections.abc import Callable
from typing import Any

from fastops.guard import run_guarded, same_bits

__all__ = ["call_plainly", "run_guarded", "same_bits"]


def call_plainly(launcher: Callable[..., Any], *arguments: Any) -> Any:
    """``launcher(*arguments)``: what `run_guarded` does, without a guard."""
    return launcher(*arguments)
