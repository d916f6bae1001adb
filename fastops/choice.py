"""Which modules of a model `fastops.swap` may touch: what its ``include`` and ``exclude`` say."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .recognition import plain_class

Pattern = str | type[nn.Module]
Patterns = Pattern | Iterable[Pattern]
EXCLUDED, NOT_INCLUDED = "excluded", "not included"


def left_alone(model: nn.Module, include: Patterns | None, exclude: Patterns | None) -> dict[int, str]:
    """Why modules of ``model`` are to be left alone, by id.

    Raises:
        TypeError: if there is something else than `Patterns`.
        ValueError: if a pattern or a class matches nothing.
    """
    included, excluded = (
        None if given is None else _covered(model, option, given)
        for option, given in (("include", include), ("exclude", exclude))
    )
    found = {}
    for module in model.modules():
        if excluded is not None and id(module) in excluded:
            found[id(module)] = EXCLUDED
        elif included is not None and id(module) not in included:
            found[id(module)] = NOT_INCLUDED
    return found


def _covered(model: nn.Module, option: str, given: Any) -> set[int]:
    """The ids of the modules that match, and of all inside of them."""
    single = isinstance(given, (str, type)) or not isinstance(given, Iterable)
    patterns = [given] if single else list(given)
    for pattern in patterns:
        is_class = isinstance(pattern, type)
        if not isinstance(pattern, str) and not (is_class and issubclass(pattern, nn.Module)):
            what = f"the class {pattern.__name__}" if is_class else type(pattern).__name__
            raise TypeError(f"{option} expects name patterns, module classes or a sequence of them, not {what}")
    modules = list(model.named_modules(remove_duplicate=False)) if patterns else []
    found = set[int]()
    for pattern in patterns:
        matched = [module for path, module in modules if _matches(pattern, path, module)]
        if not matched:
            name = repr(pattern) if isinstance(pattern, str) else pattern.__name__
            raise ValueError(f"{option}: nothing in {type(model).__name__} matches {name}")
        for module in matched:
            if id(module) not in found:
                found.update(map(id, module.modules()))
    return found


def _matches(pattern: Pattern, path: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(path, pattern)
    return issubclass(plain_class(type(module)), plain_class(pattern))
