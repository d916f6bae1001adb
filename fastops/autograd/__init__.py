"""Hand-written `torch.autograd.Function` subclasses, one file per op.

Each file is imported when it is first used: the Functions register with TorchDynamo, whose import takes seconds and
Triton. As an attribute of this package and not by an import statement, which costs more than a kernel's launch.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)
