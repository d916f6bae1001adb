"""Modules of a class that `fastops.swap` made are copied, pickled and printed as those of the user's class."""

from __future__ import annotations

import copy
import copyreg
import threading
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from .nn.shown import showing


def set_class(module: nn.Module, new: type) -> None:
    if new is not type(module):
        object.__setattr__(module, "__class__", new)


def disguised(user: type) -> dict[str, Any]:
    """Methods that copy a module as one of ``user``, by the methods of that, pickle it as one, and print it."""

    def reduced(module: Any, protocol: Any) -> Any:
        result = module.__reduce_ex__(protocol)
        if isinstance(result, str):
            return result
        function, arguments, *state = result
        # Pickle calls ``copyreg.__newobj__`` only for the class that the module has.
        newobj = copyreg.__newobj__  # type: ignore[attr-defined]
        return (_new if function is newobj else function, arguments, *state)

    return {
        "__repr__": _repr(user),
        "__reduce_ex__": lambda self, protocol: _as_user(self, user, lambda module: reduced(module, protocol)),
        "__copy__": lambda self: _as_user(self, user, copy.copy),
        "__deepcopy__": lambda self, memo: _as_user(self, user, lambda module: copy.deepcopy(module, memo)),
    }


_copies: Final = threading.RLock()


def _as_user(module: Any, user: type, action: Callable[[Any], Any]) -> Any:
    """What ``action`` makes of ``module`` as a module of class ``user``; a copy gets the class of the original."""
    with _copies:  # two threads that copy one module must not take each other's class for its own
        found = type(module)
        set_class(module, user)
        try:
            result = action(module)
        finally:
            set_class(module, found)
    if type(result) is user:
        object.__setattr__(result, "__class__", found)
    return result


def _new(user: Any, *arguments: object) -> Any:
    return user.__new__(user, *arguments)


def _repr(user: Any) -> Callable[[Any], str]:
    """The user's own, in which layers say what they are fused with."""

    def __repr__(self: Any) -> str:
        from .reading import fused_layers  # which imports this file

        with showing(lambda: fused_layers(self)):
            return str(user.__repr__(self))

    return __repr__
