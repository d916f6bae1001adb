"""The ops, a file for each kernel file. Importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from .op import OPS, Explanation, FallbackError, FallbackWarning, Op

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["OPS", "Explanation", "FallbackError", "FallbackWarning", "Op"]
