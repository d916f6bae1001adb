"""Traces the ``forward`` of one module, and says when the trace may stand in for it.

A trace replays what ``forward`` did once, on stand-ins for its tensors. It is right only as long as ``forward`` would
do the same again, so three fences surround it:

1. What a trace cannot express ends it with a reason (`LeftAlone`): control flow that depends on values, side effects
   (assignments to attributes, printing), ``with`` and ``try`` blocks, tensors made on the spot, random numbers, state
   that could change unseen.
2. What the trace took for constant is noted and compared before every run (`Assumptions`): the children's names and
   classes, the plain attributes that ``forward`` read, the global constants and functions that it named.
3. A trace covers calls whose inputs are all tensors, one for each parameter of ``forward`` that has no default.

Not seen: a number or the like of an enclosing function, if it is assigned anew later.
"""

from __future__ import annotations

import builtins
import copy
import dis
import enum
import gc
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Path = tuple[str, ...]

_MISSING: Final = object()
_PLAIN: Final = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_CODE: Final = (FunctionType, BuiltinFunctionType, property, type)
_PURE_BUILTINS: Final = (
    *(abs, all, any, callable, divmod, format, getattr, hasattr, isinstance, issubclass, iter, len, max, min, next),
    *(pow, repr, round, sorted, sum),
)
_TORCH_NAMESPACES: Final = ("torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft")
# The parts of torch whose Python functions do nothing but compute, and show the tensors they are given to the trace.
_PURE_TORCH: Final = (
    *("torch.fx.", "torch.nn.functional", "torch.nn.modules.", "torch.nn.utils.parametrize", "torch.functional"),
    *("torch._tensor", "torch._jit_internal", "torch.overrides", "torch._VF", "torch._ops"),
    "torch._dynamo.utils",  # follows the life of modules: of a slice of a ModuleList too
)
_LOCK: Final = threading.RLock()


class LeftAlone(Exception):
    """A module stays as it is, for the reason in the message."""


@dataclass(frozen=True)
class Global:
    """A global variable that ``forward`` named, and what a trace remembers of it."""

    namespace: Mapping[str, object] = field(compare=False, repr=False)
    module: str
    name: str
    token: object


@dataclass(frozen=True)
class Assumptions:
    """What must hold for a trace to do what ``forward`` would do.

    ``inputs`` names the parameters without a default; ``structures`` has, for each module whose children were used, its
    path and its children's names and classes; ``aliases`` has the paths that lead to one and the same child; ``reads``
    has the path, name and token of each attribute; ``plain`` maps a class to the one that the user wrote.
    """

    inputs: tuple[str, ...]
    structures: tuple[tuple[Path, Path, tuple[type, ...]], ...]
    aliases: tuple[tuple[Path, ...], ...]
    reads: tuple[tuple[Path, str, object], ...]
    globals: tuple[Global, ...]
    plain: Callable[[type], type] = field(compare=False, repr=False)

    def accept(self, arguments: tuple[object, ...], keywords: Mapping[str, object]) -> bool:
        """Whether a call gives exactly the inputs that were traced, as tensors."""
        if len(arguments) + len(keywords) != len(self.inputs):
            return False
        if keywords and keywords.keys() != set(self.inputs[len(arguments) :]):
            return False
        # A list: a generator takes longer than all the rest.
        return all([isinstance(value, Tensor) for value in (*arguments, *keywords.values())])

    def hold(self, module: nn.Module) -> bool:
        """Whether everything that the trace of ``module`` took for constant is still the same."""
        for path, names, classes in self.structures:
            children = _resolve(module, path)._modules
            if tuple(children) != names:
                return False
            now = tuple(map(type, children.values()))
            if now != classes and tuple(map(self.plain, now)) != tuple(map(self.plain, classes)):
                return False
        for paths in self.aliases:
            if any(_resolve(module, path) is not _resolve(module, paths[0]) for path in paths):
                return False
        try:
            for path, name, token in self.reads:
                if _token(_look(_resolve(module, path), name)) != token:
                    return False
            for item in self.globals:
                if _token(item.namespace.get(item.name, _MISSING)) != item.token:
                    return False
        except LeftAlone:
            return False
        return True


def trace(module: nn.Module) -> list[Tracer]:
    """Trace ``module.forward`` with all children as leaves: once, or in training and in evaluation mode if it asks.

    Raises:
        LeftAlone: with the reason, if a trace could not stand in for ``forward``.
    """
    with _LOCK:
        tracer = Tracer(module)
        if not any(name == "training" for _, name, _ in tracer.reads):
            return [tracer]
        modes = {child: child.training for child in module.modules()}
        try:
            tracers = []
            for mode in (True, False):
                for child in modes:
                    child.__dict__["training"] = mode
                tracers.append(Tracer(module))
            return tracers
        finally:
            for child, mode in modes.items():
                child.__dict__["training"] = mode


def _resolve(module: nn.Module, path: Path) -> nn.Module:
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _look(owner: nn.Module, name: str) -> object:
    """What ``owner.name`` is, found without running any code of its class."""
    state = owner.__dict__
    for table in (state, state["_parameters"], state["_buffers"], state["_modules"]):
        if name in table:
            return table[name]
    found = getattr(type(owner), name, _MISSING)
    if isinstance(found, MemberDescriptorType):
        return getattr(owner, name, _MISSING)
    return getattr(found, "__func__", found)


def _token(value: object) -> object:
    """What an assumption remembers of ``value``: equal tokens mean that a trace cannot tell the values apart.

    Raises:
        LeftAlone: for a value that could change without its token changing.
    """
    if isinstance(value, Tensor):
        return Tensor
    if value is _MISSING or isinstance(value, _CODE):
        return value
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple) or type(value) in (list, set, frozenset, dict):
        items = list(value.items() if isinstance(value, dict) else value)  # type: ignore[call-overload]
        tokens = [_token(item) for item in items]
        if Tensor in tokens:
            raise LeftAlone(f"a {type(value).__name__} of tensors")
        return type(value), tokens
    raise LeftAlone(f"an object of class {type(value).__name__}")


def _alike(value: object, other: object) -> bool:
    try:
        return _token(value) == _token(other)
    except LeftAlone:
        return False


def _module_of(frame: FrameType | None) -> str:
    return frame.f_globals.get("__name__", "") if frame is not None else "torch"


def _trusted(module: str) -> bool:
    return module in (__name__, "fastops.functional", "torch") or module.startswith("torch.")


def _is_users(frame: FrameType | None) -> bool:
    """Whether ``frame`` runs for ``forward`` itself, not for something inside torch."""
    if _trusted(_module_of(frame)):
        return False
    while frame is not None and not _trusted(_module_of(frame)):
        frame = frame.f_back
    return frame is not None and frame.f_globals is globals() and frame.f_code.co_name in ("run", "read")


class _Proxy(fx.Proxy):
    """Stands for a tensor, or for whatever a child returns.

    It closes the gaps through which an `fx.Proxy` lets ``forward`` take a decision unnoticed, or lose an effect.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if self.tracer.builtin is isinstance:  # type: ignore[attr-defined]
            raise LeftAlone("its forward asks for the class of a value")
        return type(self)

    def __getattr__(self, name: str) -> Attribute:
        if not hasattr(Tensor, name) or name in ("grad", "grad_fn", "data"):
            raise LeftAlone(f"its forward reads .{name} of a value")
        return _Attribute(self, name)


class _Attribute(_Proxy, Attribute):
    """Stands for an attribute of such a value."""


def in_place(symbol: str, left: Any, right: Any) -> Any:
    """``left += right`` and its like, which changes ``left`` itself if that is a tensor."""
    return getattr(operator, symbol)(left, right)


def _recorded(symbol: str) -> Callable[[_Proxy, object], fx.Proxy]:
    def record(self: _Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (symbol, self, other), {})

    return record


for _name in ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"):
    setattr(_Proxy, f"__i{_name}__", _recorded(f"i{_name}"))


class _NoTensors(TorchFunctionMode):
    """Ends a trace that computes on real tensors: their values would be frozen into it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            raise LeftAlone(f"its forward makes a tensor of its own ({func.__name__})")
        return func(*args, **(kwargs or {}))


class Tracer(fx.Tracer):
    """One trace of one module: ``graph``, and notes on all that it depends on.

    Raises:
        LeftAlone: with the reason, if a trace could not stand in for ``forward``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._scanned: dict[CodeType, list[str]] = {}
        self._paths: dict[int, Path] = {id(module): ()}
        self._owners: dict[Path, nn.Module] = {}
        self._noted: dict[tuple[Path, str], nn.Module] = {}
        self._globals: dict[tuple[int, str], Mapping[str, object]] = {}
        self._copies: list[tuple[str, object, object]] = []
        self.builtin: Any = None  # the built-in function that forward is calling
        self.inputs = _inputs(module)
        if sys.getprofile() is not None:
            raise LeftAlone("a Python profiler is running, which tracing would end")
        try:
            self.trace(module)
        except LeftAlone:
            raise
        except TraceError:
            raise LeftAlone("its forward branches on a value or loops over one") from None
        except Exception as error:  # forward runs on stand-ins here: whatever it raises only means that it cannot
            raise LeftAlone(f"its forward cannot be traced ({type(error).__name__}: {_first_line(error)})") from None
        for node in self.graph.nodes:
            node.type = None
        self.reads = tuple((path, name, _token(_look(owner, name))) for (path, name), owner in self._noted.items())
        for name, value, handed in self._copies:
            if not _alike(value, handed):
                raise LeftAlone(f"its forward changes self.{name}")
        self.globals = tuple(
            Global(space, str(space.get("__name__", "")), name, _token(space.get(name, _MISSING)))
            for (_, name), space in self._globals.items()
        )

    def assumptions(self, plain: Callable[[type], type]) -> Assumptions:
        """What the trace depends on, with the children's classes as they are now."""
        structures, paths = [], dict[int, list[Path]]()
        for path, owner in self._owners.items():
            children = owner._modules
            structures.append((path, tuple(children), tuple(map(type, children.values()))))
            for name, child in children.items():
                if child is not None:
                    paths.setdefault(id(child), []).append((*path, name))
        aliases = tuple(tuple(group) for group in paths.values() if len(group) > 1)
        return Assumptions(self.inputs, tuple(structures), aliases, self.reads, self.globals, plain)

    # What torch.fx asks of a tracer ----------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        def run(*arguments: object) -> object:
            return root_fn(*arguments)

        def watched(*arguments: object) -> object:
            with self._watch():
                return run(*arguments)

        return watched, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.inputs)]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self._paths.get(id(m))
        if not path:
            raise LeftAlone(f"its forward calls a {type(m).__name__} that is not its child")
        for value in (*args, *kwargs.values()):
            if type(value) in (list, dict, set):
                name = ".".join(path)
                raise LeftAlone(f"its forward hands a {type(value).__name__} to {name}, which could change it")
        return self.create_proxy("call_module", ".".join(path), args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) in (_Proxy, _Attribute):
            return super().create_arg(a)
        if isinstance(a, Tensor):
            raise LeftAlone("its forward uses a tensor that is not its own")
        plain = type(a) in (tuple, list, dict) or hasattr(a, "_fields") or type(a).__module__.startswith("torch.fx.")
        if isinstance(a, (tuple, list, dict, set)) and not plain:
            raise LeftAlone(f"its forward returns or passes on a {type(a).__name__}")
        return super().create_arg(a)

    # The watch over forward ------------------------------------------------------------------------------------------

    @contextmanager
    def _watch(self) -> Iterator[None]:
        thread = threading.get_ident()
        collecting = gc.isenabled()

        def read(owner: nn.Module, name: str) -> Any:
            caller = sys._getframe(1)
            module = _module_of(caller)
            internal = module == __name__ or module.startswith("torch.fx.") or caller.f_code is _GETATTR
            if internal or threading.get_ident() != thread or (name.startswith("__") and name != "__dict__"):
                return object.__getattribute__(owner, name)
            handed = self._note(owner, name)
            return object.__getattribute__(owner, name) if handed is _MISSING else handed

        gc.disable()  # finalizers of other objects would run under the watch
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        sys.setprofile(self._observe)
        try:
            with _NoTensors():
                yield
            if sys.getprofile() is None:  # an error of the watch ends it: somebody caught that
                raise LeftAlone("its forward cannot be watched")
        finally:
            sys.setprofile(None)
            del nn.Module.__getattribute__
            if collecting:
                gc.enable()

    def _note(self, owner: nn.Module, name: str) -> object:
        """Note that forward reads ``owner.name``, and return what it gets instead of a tensor or a container."""
        path = self._paths.get(id(owner))
        if path is None and type(owner) is nn.ModuleList:  # a slice of one
            return _MISSING
        if path is None:
            raise LeftAlone(f"its forward uses a {type(owner).__name__} that is not its child")
        value = _look(owner, name)
        if name == "_modules" or isinstance(value, nn.Module):
            if name not in ("_modules", *owner._modules):
                raise LeftAlone(f"its forward uses self.{name}, a module that is not registered")
            self._owners.setdefault(path, owner)
            for key, child in owner._modules.items():
                if child is not None:
                    self._paths.setdefault(id(child), (*path, key))
        elif name == "__dict__":
            raise LeftAlone("its forward reads self.__dict__")
        elif value is _MISSING or value is not getattr(nn.Module, name, _MISSING):
            self._noted.setdefault((path, name), owner)
            try:
                _token(value)
            except LeftAlone as reason:
                raise LeftAlone(f"its forward reads self.{name}, {reason}") from None
            if isinstance(value, Tensor):
                return self.create_proxy("get_attr", ".".join((*path, name)), (), {})
            if type(value) in (list, set, dict):
                handed = copy.deepcopy(value)
                self._copies.append((name, value, handed))
                return handed
        return _MISSING

    def _observe(self, frame: FrameType, event: str, argument: Any) -> None:
        """Look at every function before it runs (``sys.setprofile``)."""
        module = _module_of(frame)
        if event == "call":
            if not _trusted(module):
                if _is_users(frame):
                    self._scan(frame)
            elif module.startswith("torch") and not module.startswith(_PURE_TORCH) and _is_users(frame.f_back):
                raise LeftAlone(f"its forward calls {module}.{frame.f_code.co_name}")
        elif not _trusted(module) and _is_users(frame):
            if event == "c_call" and not _is_pure(argument):
                raise LeftAlone(f"its forward calls {argument.__name__}")
            self.builtin = argument if event == "c_call" else None

    def _scan(self, frame: FrameType) -> None:
        """Refuse code with effects that a trace drops, and note the globals that it names."""
        code = frame.f_code
        if code not in self._scanned:
            if not any(code in outer.co_consts for outer in self._scanned):  # variables of forward itself may change
                _refuse_hidden_state(
                    code, [frame.f_locals.get(name) for name in code.co_freevars if name != "__class__"]
                )
                _refuse_hidden_state(code, _defaults(getattr(type(self.root), code.co_name, None)))
            tested = self._scan_code(code, frame.f_globals)
            # The inputs of forward itself are known to be tensors.
            self._scanned[code] = [] if code is type(self.root).forward.__code__ else tested
        for name in self._scanned[code]:
            if isinstance(frame.f_locals.get(name), fx.Proxy):
                raise LeftAlone(f"its forward tests a value with `is` ({name} in {code.co_name})")

    def _scan_code(self, code: CodeType, namespace: dict[str, Any]) -> list[str]:
        """Refuse effects, note globals, and return the parameters that the code tests with ``is``."""
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        tested: list[str] = []
        before: list[dis.Instruction] = []
        scope: object = None
        for step in dis.get_instructions(code):
            name = str(step.argval)
            if step.opname in _EFFECTS or (step.opname == "STORE_DEREF" and name in code.co_freevars):
                raise LeftAlone(f"its forward {_EFFECTS.get(step.opname, 'assigns')}".replace("NAME", name))
            if name in _PRIVATE and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                raise LeftAlone(f"its forward uses {name}")
            if step.opname == "IS_OP" or step.opname.endswith("_NONE"):
                for operand in before[-2:] if step.opname == "IS_OP" else before[-1:]:
                    tested += _tested_name(operand, parameters)
            if step.opname == "LOAD_GLOBAL":
                scope = self._note_global(namespace, name)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(scope, ModuleType):
                scope = self._note_global(vars(scope), name)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(scope, (type, FunctionType)):
                value = getattr(scope, name, len)
                if not (_trusted(scope.__module__) or callable(value) or isinstance(value, enum.Enum)):
                    raise LeftAlone(f"its forward reads {scope.__name__}.{name}, which could change")
                scope = None
            else:
                scope = None
            if step.opname not in ("CACHE", "PRECALL", "NOP", "EXTENDED_ARG", "NOT_TAKEN"):
                before.append(step)
        return tested

    def _note_global(self, namespace: Mapping[str, object], name: str) -> object:
        value = namespace.get(name, getattr(builtins, name, _MISSING))
        if str(namespace.get("__name__", "")).partition(".")[0] in ("torch", "math", "operator"):
            return value
        if value is type:
            raise LeftAlone("its forward asks for the class of a value")
        if value is getattr(builtins, name, _MISSING) or isinstance(value, (ModuleType, type)):
            return value
        if isinstance(value, BuiltinFunctionType):
            if not _is_pure(value):
                raise LeftAlone(f"its forward names the function {name}")
        elif isinstance(value, FunctionType):
            if not _trusted(value.__module__):
                cells = [cell.cell_contents for cell in value.__closure__ or ()]
                _refuse_hidden_state(value.__code__, [*cells, *_defaults(value)])
                self._globals[id(namespace), name] = namespace
        elif isinstance(value, _PLAIN):
            self._globals[id(namespace), name] = namespace
        else:
            raise LeftAlone(f"its forward reads the global {name}, an object of class {type(value).__name__}")
        return value


_GETATTR: Final = nn.Module.__getattr__.__code__
_PRIVATE: Final = ("__class__", "__dict__", "__setattr__", "__delattr__")
_EFFECTS: Final = {
    "STORE_ATTR": "assigns the attribute NAME",
    "DELETE_ATTR": "deletes the attribute NAME",
    "STORE_GLOBAL": "assigns the global NAME",
    "DELETE_GLOBAL": "deletes the global NAME",
    "BEFORE_WITH": "has a with block",
    "SETUP_WITH": "has a with block",
    "LOAD_SPECIAL": "has a with block",
    "SETUP_FINALLY": "has a try block",
    "PUSH_EXC_INFO": "has a try block",
}


def _is_fixed(value: object) -> bool:
    """Whether no call can change ``value`` or make it give something else the next time."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return isinstance(value, (*_PLAIN, FunctionType, BuiltinFunctionType, ModuleType, nn.Module, fx.Proxy))


def _defaults(function: object) -> list[object]:
    """The defaults of the parameters of a function, nothing for any other object."""
    if not isinstance(function, FunctionType):
        return []
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _refuse_hidden_state(code: CodeType, values: list[object]) -> None:
    for value in values:
        if not _is_fixed(value):
            raise LeftAlone(f"its forward uses a {type(value).__name__} that outlives the call of {code.co_name}")


def _tested_name(operand: dis.Instruction, parameters: tuple[str, ...]) -> list[str]:
    """The parameter that ``is`` is applied to, if any; attributes and constants are safe, other values are not."""
    if operand.opname.startswith("LOAD_FAST") and operand.argval in parameters:
        return [operand.argval]
    if operand.opname in ("LOAD_ATTR", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_DEREF"):
        return []
    raise LeftAlone("its forward tests a value with `is`")


def _is_pure(function: Any) -> bool:
    """Whether a built-in function only computes from its arguments."""
    owner = function.__self__
    if owner is None or isinstance(owner, ModuleType):
        if function.__module__ == "builtins":
            return function in _PURE_BUILTINS
        if function.__module__ == "torch":
            return getattr(torch._C._VariableFunctions, function.__name__, None) is not None
        return function.__module__ in ("math", "_operator", *_TORCH_NAMESPACES)
    return type(owner) in (str, bytes, int, float, list, tuple, dict, set, slice, range)


def _inputs(module: nn.Module) -> tuple[str, ...]:
    """The parameters of ``forward`` without a default."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        raise LeftAlone("its forward is decorated")
    if type(module).__getattribute__ is not object.__getattribute__:
        raise LeftAlone("its class has its own __getattribute__")
    parameters = list(inspect.signature(forward).parameters.values())
    required = [parameter for parameter in parameters[1:] if parameter.default is parameter.empty]
    if any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
        raise LeftAlone("its forward has keyword-only inputs")
    if any(parameter.kind is parameter.POSITIONAL_ONLY or parameter.name == "self" for parameter in required):
        raise LeftAlone("its forward has positional-only inputs, or one that is called self")
    return tuple(p.name for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
