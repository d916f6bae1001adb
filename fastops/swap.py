"""Puts fastops layers into existing models, and takes them out again.

`swap` works in two steps, both in place:

1. Every layer with a counterpart in `fastops.nn` changes its class. It stays the same object, so parameters, optimizer
   state, hooks, parametrizations, tied weights and keys are untouched.
2. The class of each module that the user wrote gives way to a subclass of it, whose methods are the user's with calls
   such as ``relu(layer(x))`` rewritten (`fastops.callsites`): what the two callables are then decides, in each call,
   whether they run as one (`fastops.promises`).

Nothing is stored on the modules or beside them: what was swapped is written in their classes alone. Only a module that
was to be left alone keeps the reason, in an attribute (`fastops.recognition.LEFT_ALONE`).
"""

from __future__ import annotations

import abc
import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType, MemberDescriptorType
from typing import Any, Final, TypeVar

import torch
from torch import nn

from . import nn as fnn
from .callsites import Rewritten, Surroundings, rewrite
from .choice import Patterns, left_alone
from .disguise import disguised, set_class
from .fusions import COUNTERPARTS, LAYER_FUNCTIONS, ORIGINALS, SIGNATURES
from .nn.overrides import replaced
from .ops.activations import METHODS
from .promises import (
    HELPERS,
    HELPERS_FOR_LAYERS,
    chain,
    run_what_waited,
    sequential_forward,
)
from .recognition import LEFT_ALONE, plain_class, user_class
from .source import LeftAlone, twin_of

_Model = TypeVar("_Model", bound=nn.Module)


def swap(
    model: _Model,
    *,
    fuse: bool = True,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    memory_format: torch.memory_format | None = None,
) -> _Model:
    """Swap fastops layers into ``model``, in place, and fuse them with the ReLUs behind them.

    Parameters, their names, hooks and results stay as they are. In evaluation mode, where no gradient of the
    parameters is wanted and the output is much larger than the weight, a batch norm runs as part of the convolution
    before it, unless backend ``"torch"`` is selected: that changes results by rounding, and parameters not at all, as
    the folded weight is computed anew in each call. Whatever cannot be swapped or fused safely is left
    alone; `report` says why. After new layers were put into the model, swap again. If an error is raised, the model is
    what it was.

    Args:
        model: any module, a loss too.
        fuse: whether layers may run in one call with what is behind them. If not, only classes of layers change.
        include: what may be swapped and fused, everything if None: a name pattern as of `fnmatch`, for paths as in
            ``model.named_modules()`` (``"layer4"``, ``"*.conv1"``), a module class, or a sequence of these. What
            matches stands for all inside of it. An activation that is a function goes with the layer before it, sums
            and layers that are functions with the module whose method has them.
        exclude: the same for what stays exactly torch. It goes before ``include``. Another `swap` chooses anew.
        memory_format: `torch.channels_last`, say: what ``model.to(memory_format=...)`` does to the weights, and so to
            the outputs of their layers. It helps with large feature maps and costs with small ones. `unswap` leaves it.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is not a module, or a pattern neither a string nor a module class.
        ValueError: if a pattern or a class matches no module.
    """
    check("swap", model)
    reasons = left_alone(model, include, exclude)
    before = [(module, type(module), module.__dict__.get(LEFT_ALONE)) for module in model.modules()]
    known: dict[tuple[type, tuple[type, ...], bool], type] = {}  # looked up once for all modules of a class
    try:
        for module, found, _ in before:
            reason = reasons.get(id(module))
            if found not in COUNTERPARTS.values() or reason is not None:
                set_class(module, original_class(found))
            chosen = reason is None
            if chosen:
                with suppress(LeftAlone):
                    set_class(module, swapped_class(module))
            elif any(id(inner) not in reasons for inner in module.modules()):
                reason = None  # its methods may apply an activation to a layer that is included
            _set_reason(module, reason)
            if reason is None and fuse and "forward" not in module.__dict__:
                key = type(module), _variant(module), chosen
                if key not in known:
                    known[key] = key[0]
                    with suppress(LeftAlone):
                        known[key] = site_class(*key)
                set_class(module, known[key])
        if memory_format is not None:
            model.to(memory_format=memory_format)
    except BaseException:  # an interrupt too: half a swap must not stay; it is raised again
        for module, found, reason in before:
            set_class(module, found)
            _set_reason(module, reason)
        raise
    return model


def unswap(model: _Model) -> _Model:
    """Give every module of ``model`` its plain torch class, or the user's own, back: in place, the reverse of `swap`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    check("unswap", model)
    for module in model.modules():
        set_class(module, original_class(type(module)))
        _set_reason(module, None)
    return model


def check(verb: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} expects a torch.nn.Module, not {type(model).__name__}")


def original_class(found: type) -> type:
    """As `plain_class`, also for classes that something else derived from one that `swap` gave to a module."""
    plain = plain_class(found)
    if not found.__module__.startswith("torch.") or "_fastops_made_of" in vars(found):
        return plain
    if plain is not found and vars(plain).keys() - _NOT_COPIED == vars(found).keys() - _NOT_COPIED:
        return plain  # unless it was parametrized further
    # Parametrizing or sharding a module derives a class from the one that it had: derive it from the original.
    bases = tuple(map(plain_class, found.__bases__))
    return found if bases == found.__bases__ and plain is found else with_bases(found, bases)


def with_bases(found: type, bases: tuple[type, ...], **more: object) -> type:
    namespace = {name: value for name, value in vars(found).items() if name not in _NOT_COPIED}
    return type.__new__(type(found), found.__name__, bases, namespace | more)


_USER_CLASS: Final = "_fastops_user_class"
_NOT_COPIED: Final = {"__dict__", "__weakref__", "__slotnames__", _USER_CLASS}


def _set_reason(module: nn.Module, reason: str | None) -> None:
    module.__dict__.pop(LEFT_ALONE, None)
    if reason is not None and not isinstance(module, torch.jit.ScriptModule):
        module.__dict__[LEFT_ALONE] = reason


# Layers ---------------------------------------------------------------------------------------------------------------

# What a subclass of a layer may define and still compute what the layer does.
_HARMLESS: Final = {
    *("__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__", "__constants__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"),
    *("__static_attributes__", "__parameters__", "__orig_bases__", "__repr__", "extra_repr", "reset_parameters"),
}


def layer_class(found: type) -> type | None:
    """The layer or loss of torch that ``found`` is or is derived from, if it has a counterpart."""
    if issubclass(found, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # MultiheadAttention takes its weights and never calls it
    return next((original for original in COUNTERPARTS if issubclass(found, original)), None)


def swapped_class(module: nn.Module) -> type:
    """The class that takes the place of the class of ``module``: its own if it has no counterpart.

    Raises:
        LeftAlone: if it has a counterpart that cannot take its place.
    """
    found = type(module)
    known = layer_class(found)
    if known is None or found.__module__.startswith(fnn.__name__) or isinstance(module, torch.jit.ScriptModule):
        return found
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        raise LeftAlone("its forward was replaced on the object")
    if replaced(known):
        raise LeftAlone(f"somebody replaced what {known.__name__} computes")
    if found is known:
        return COUNTERPARTS[known]
    if issubclass(found, nn.modules.lazy.LazyModuleMixin):
        raise LeftAlone("it has no weights yet: run it once, then swap again")
    if found.__module__ == nn.utils.parametrize.__name__:
        base = found.__bases__[0]
        if base in ORIGINALS:
            return found
        return with_bases(found, (_derived_layer(module, base, known),), _fastops_user_class=found)
    return _derived_layer(module, found, known)


def _derived_layer(module: nn.Module, found: type, known: type[nn.Module]) -> type:
    """What takes the place of a subclass that only adds a constructor: a subclass of it and of the counterpart."""
    if found is known:
        return COUNTERPARTS[known]
    used = {*dir(known), *module.__dict__, *module._parameters, *module._buffers, "weight", "bias"} - _HARMLESS
    for kind in found.__mro__:
        if kind not in known.__mro__ and (own := sorted(used & vars(kind).keys())):
            raise LeftAlone(f"its class {found.__name__} is a subclass of {known.__name__} with its own {own[0]}")
    return _derived(found, (COUNTERPARTS[known],), {})


# Call sites -----------------------------------------------------------------------------------------------------------


def _method(
    user: type, name: str, twin: Callable[..., Any], holding: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``twin``, a rewritten method, as long as the user's class still has the one that it was made from.

    ``holding`` is one that may return a promise, for callers that look for it (`recognition.forward_that_holds`).
    """
    original = vars(user)[name]

    @functools.wraps(twin)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(user, name, None) is original:
            try:
                return twin(self, *args, **kwargs)
            except Exception as error:
                run_what_waited(error)
                raise
        ours = next(c for c in type(self).__mro__ if vars(c).get(name) is method)
        return getattr(super(ours, self), name)(*args, **kwargs)

    # torch.compile keeps its results by code object, a limited number for each: every method needs its own.
    method.__code__ = method.__code__.replace(co_name=name)  # type: ignore[attr-defined]
    if holding is not None:

        def holds(self: Any, input: Any) -> Any:
            return holding(self, input) if getattr(user, name, None) is original else self(input)

        method._fastops_holds = holds  # type: ignore[attr-defined]
    return method


def _class_method(name: str, original: Any) -> classmethod[Any, Any, Any]:
    """A class method that gets the user's class, as it would without us."""

    def method(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(user_class(cls), name)(*args, **kwargs)

    with suppress(AttributeError, TypeError):  # whatever was made a class method need not be a function
        functools.update_wrapper(method, original.__func__)
    return classmethod(method)


def _variant(module: nn.Module) -> tuple[type, ...]:
    """Sequentials of other layers get other classes: torch.compile keeps few results for each, and torch's has none."""
    if not isinstance(module, nn.Sequential):
        return ()
    return tuple(plain_class(type(child)) for child in module._modules.values())


def site_class(user: type, variant: tuple[type, ...] = (), functions: bool = True) -> type:
    """A subclass of ``user`` under its name with rewritten methods, ``user`` itself if there is nothing to rewrite.

    Its bases are rewritten likewise and come after ``user``, so that ``super()`` finds them. There is one for each
    ``variant``. Without ``functions`` it fuses only what is behind a layer, and no function or sum of its methods.

    Raises:
        LeftAlone: with the reason, if there could be no such class.
    """
    if not is_users(user) and user is not nn.Sequential:
        return user
    bases = tuple(new for base in user.__bases__ if (new := site_class(base, variant, functions)) is not base)
    methods: dict[str, Any] = {}
    if user is nn.Sequential:
        if _is_torchs_sequential():
            methods["forward"] = _method(user, "forward", sequential_forward, chain)
    else:
        for name, value in vars(user).items():
            rewritten = None
            with suppress(LeftAlone):
                rewritten = rewritten_method(user, name)
            if rewritten is not None and (rewritten.code or rewritten.holding) is not None:
                twin, holding = (
                    None if code is None else twin_of(value, code, HELPERS if functions else HELPERS_FOR_LAYERS)
                    for code in (rewritten.code, rewritten.holding)
                )
                methods[name] = _method(user, name, twin or value, holding)
            if (rewritten is None or rewritten.code is None) and _finds_itself_by_its_class(value):
                raise LeftAlone(f"its {name} calls super() with the class of the object")
    if not (bases or methods):
        return user
    for name, value in vars(user).items():
        if isinstance(value, classmethod) and name not in ("__init_subclass__", "__class_getitem__"):
            methods[name] = _class_method(name, value)
    return _derived(user, bases, methods, variant, functions)


def is_users(found: type | FunctionType) -> bool:
    """Whether a user, or a library other than torch, wrote the class or function ``found``."""
    package = found.__module__.partition(".")[0]
    return package not in ("torch", *sys.stdlib_module_names) and not found.__module__.startswith(fnn.__name__)


def _below_attributes(found: type) -> type | None:
    """In the line of bases that lays out objects of ``found``, the last one whose own have no ``__dict__``."""
    base: type | None = found
    while base is not None and base.__dictoffset__:
        base = base.__base__
    return base


def rewritten_method(user: type, name: str) -> Rewritten | None:
    """Code and call sites of a method that ``user`` itself defines, None if that is no method.

    Raises:
        LeftAlone: with the reason, if it cannot be rewritten.
    """
    value = vars(user)[name]
    if isinstance(value, staticmethod):
        raise LeftAlone("it is a static method")
    if not isinstance(value, FunctionType) or not is_users(value):  # typing.Protocol puts some of its own there
        return None
    if name.startswith("__") and name.endswith("__") and not _names(value) & {"type", "__class__"}:
        return None  # a constructor and the like
    around = Surroundings(_is_candidate, _is_activation, _is_layer_function, _is_sum, tuple(METHODS), _unsteady(user))
    return rewrite(value, around, HELPERS)


def _is_candidate(value: object) -> bool:
    return isinstance(value, nn.Module) or _is_activation(value) or hides_an_activation(value)


def hides_an_activation(value: object) -> bool:
    """Whether it is a function of the user's that may have one inside: `report` says that it was not looked into."""
    return isinstance(value, FunctionType) and is_users(value) and any("relu" in n.lower() for n in _names(value))


def _is_activation(value: object) -> bool:
    return any(value is function for function in SIGNATURES)


def _is_layer_function(value: object) -> bool:
    return any(value is function for function in LAYER_FUNCTIONS)


def _is_sum(value: object) -> bool:
    return value is torch.add


def _is_torchs_sequential() -> bool:
    return nn.Sequential.forward.__globals__.get("__name__") == nn.Sequential.__module__


def _unsteady(user: type) -> frozenset[str]:
    """The attributes of ``user`` that run code when they are read: "*" for all."""
    found = set()
    for kind in user.__mro__:
        if is_users(kind):
            found |= {"*"} & {"*" if name in vars(kind) else "" for name in ("__getattr__", "__getattribute__")}
            for name, value in vars(kind).items():
                plain = isinstance(value, (FunctionType, staticmethod, classmethod, MemberDescriptorType))
                if hasattr(type(value), "__get__") and not plain:
                    found.add(name)
    return frozenset(found)


def _names(value: Any) -> set[str]:
    """The names that a function uses, or one inside a property, a method of the class or a decorator."""
    names: set[str] = set()
    for inner in (value, *(getattr(value, name, None) for name in ("fget", "fset", "__func__", "__wrapped__"))):
        stack = [inner.__code__] if isinstance(inner, FunctionType) else []
        while stack:
            code = stack.pop()
            names |= set(code.co_names)
            stack += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return names


def _finds_itself_by_its_class(value: object) -> bool:
    """Whether it calls ``super(type(self), self)`` or the like: in a subclass of ours that would never end."""
    names = _names(value)
    return "super" in names and bool(names & {"type", "__class__"})


def _derived(
    user: type, bases: tuple[type, ...], methods: dict[str, Any], variant: tuple[type, ...] = (), functions: bool = True
) -> type:
    """A subclass of ``user`` under its name, with ``bases`` after it: the same one for the same methods.

    Raises:
        LeftAlone: if Python allows no such class.
    """
    made_of = (bases, {name: vars(user)[name] for name in methods}, variant, functions)
    subclasses: list[type] = type.__subclasses__(user)
    for known in subclasses:
        if vars(known).get(_USER_CLASS) is user and vars(known)["_fastops_made_of"] == made_of:
            return known
    more = {"_fastops_made_of": made_of, _USER_CLASS: user, **methods}
    try:
        return subclass(user, bases, more)
    except TypeError as error:
        raise LeftAlone(f"it cannot be subclassed ({error})") from None


def subclass(user: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    """A subclass of ``user`` under its name, with ``bases`` after it, that copies and pickles as ``user`` does.

    Raises:
        TypeError: if Python allows no such class.
    """
    namespace = {
        "__slots__": (),
        "__module__": user.__module__,
        "__qualname__": user.__qualname__,
        "__doc__": user.__doc__,
        **namespace,
        **(disguised(user) if issubclass(user, nn.Module) else {}),
    }
    # To keep the user's ``__init_subclass__`` silent, a class needs a base of its own, to have it first.
    before = () if _is_silent(user) else (_silent(user),)
    return _made(type(user), user.__name__, (*before, user, *bases), namespace)


def _made(metaclass: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    """A class without a call of the metaclass, so that nothing of the user's runs: no ``__new__``, no ``__init__``."""
    new: type = type.__new__(metaclass, name, bases, namespace)
    if isinstance(new, abc.ABCMeta):
        abc._abc_init(new)  # type: ignore[attr-defined]  # else it would share the caches of isinstance with a base
    return new


def _is_silent(found: type) -> bool:
    """Whether to derive a class from ``found`` runs nothing of the user's."""
    owner = next(base for base in found.__mro__ if "__init_subclass__" in vars(base))
    return owner.__module__ in ("builtins", "typing")


def _silent(user: type) -> type:
    """A base with an ``__init_subclass__`` that does nothing, and objects laid out as those of ``user``.

    Else these could not become objects of a class that is derived from both.
    """
    layout: tuple[type, ...] = ()
    if issubclass(user, nn.Module):  # mixins have no objects of their own
        below = _below_attributes(user)
        layout = (nn.Module,) if below in (None, object) else (below, nn.Module)
        if not _is_silent(layout[0]):
            raise TypeError(f"its base {layout[0].__name__} lays out objects in a way of its own")
    metaclass = type(layout[0]) if layout else type
    silence = {"__slots__": (), "__init_subclass__": classmethod(lambda cls: None)}
    return _made(metaclass, "_Silent", layout, silence)
