"""Finds the source of a function, believes it only if it compiles to that very function, and compiles changes of it.

The unmodified function is compiled anew where it was, in its class and with the imports of its file, and only if that
gives the very code that it has is the source believed. What a changed one calls besides comes in as variables of an
enclosing function, so that defaults, closures, `super()` and line numbers stay.

Nothing of torch is imported here.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any, Final

SCOPES: Final = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


class LeftAlone(Exception):
    """A method, or a layer, stays as it is, for the reason in the message."""


@dataclass(frozen=True)
class _File:
    lines: list[str]
    functions: Mapping[tuple[int, str], ast.FunctionDef]
    imports: str  # a line that imports the same names: calls of what is imported compile differently


_files: dict[str, _File] = {}
# Those that change how a function compiles.
_FUTURE: Final = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names[2:])


def _file_of(function: FunctionType) -> _File:
    name = function.__code__.co_filename
    lines = linecache.getlines(name, function.__globals__)
    if not lines:
        raise LeftAlone("its source is not there")
    known = _files.get(name)
    if known is not None and known.lines is lines:
        return known
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        raise LeftAlone("its source is no Python") from None
    functions = {
        (min([n.lineno, *(d.lineno for d in n.decorator_list)]), n.name): n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef)
    }
    imported: dict[str, None] = {}
    stack: list[ast.AST] = [tree]
    while stack:
        for child in ast.iter_child_nodes(stack.pop()):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                imported |= dict.fromkeys((a.asname or a.name).split(".")[0] for a in child.names if a.name != "*")
            elif isinstance(child, (ast.stmt, ast.ExceptHandler)) and not isinstance(child, SCOPES):
                stack.append(child)
    if len(_files) > 64:
        _files.clear()
    file = _files[name] = _File(lines, functions, "; ".join(f"import {name}" for name in imported) or "pass")
    return file


def _compiled(node: ast.FunctionDef, imports: str, function: FunctionType, names: Sequence[str]) -> CodeType:
    """The code of ``node``, compiled where ``function`` was: in its class, ``names`` being variables around that."""
    code, owner = function.__code__, function.__qualname__.split(".")[-2:-1]
    lines = [f"def _outer({', '.join(names)}):"] if names else []
    if owner and owner[0].isidentifier():
        if names and owner[0] not in names:
            lines[0] += f"\n global {owner[0]}"  # which the class is for its methods
        lines.append(" " * len(lines) + f"class {owner[0]}:")
    wrapper = inner = ast.parse("\n".join([imports, *lines, " " * len(lines) + "pass"]))
    for _ in lines:
        inner = inner.body[-1]  # type: ignore[assignment]
    inner.body[-1] = node
    stack = [compile(wrapper, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)]
    while stack:
        found = stack.pop()
        if found.co_name == code.co_name and found.co_firstlineno == code.co_firstlineno:
            return found
        stack += [constant for constant in found.co_consts if isinstance(constant, CodeType)]
    raise LeftAlone("its source defines something else")


@dataclass(frozen=True)
class Source:
    """The definition of a function, and a copy of it to be changed."""

    function: FunctionType
    node: ast.FunctionDef
    tree: ast.FunctionDef
    imports: str

    def recompiled(self, names: Iterable[str]) -> CodeType:
        """The code of the changed definition, with ``names`` as variables around it.

        Raises:
            LeftAlone: if the unchanged one does not compile to the function's code.
        """
        code = self.function.__code__
        nested = code.co_flags & inspect.CO_NESTED
        free = [name for name in code.co_freevars if name != "__class__"]
        same = _compiled(self.node, self.imports, self.function, free or ["_"] if nested else [])
        if same != code or same.co_linetable != code.co_linetable:
            raise LeftAlone("its source is not what it was compiled from")
        new = _compiled(self.tree, self.imports, self.function, [*code.co_freevars, *names])
        new = new.replace(co_flags=code.co_flags)
        return new.replace(co_qualname=code.co_qualname) if hasattr(code, "co_qualname") else new


def source_of(function: FunctionType) -> Source:
    """The source of ``function``.

    Raises:
        LeftAlone: with the reason, if it cannot be found.
    """
    code = function.__code__
    if hasattr(function, "__wrapped__"):
        raise LeftAlone("it is decorated")
    if code.co_name == "<lambda>":
        raise LeftAlone("it is a lambda")
    file, first = _file_of(function), code.co_firstlineno
    node = file.functions.get((first, code.co_name))
    if node is None:
        raise LeftAlone("its source does not define it")
    block = ast.parse("if 1:\n" + "".join(file.lines[first - 1 : node.end_lineno])) if node.col_offset else None
    tree = copy.deepcopy(node) if block is None else ast.increment_lineno(block, first - 2).body[0].body[0]  # type: ignore[attr-defined]
    return Source(function, node, tree, file.imports)


def twin_of(function: FunctionType, code: CodeType, helpers: Mapping[str, Callable[..., Any]]) -> FunctionType:
    """A function like ``function`` with other ``code``."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] if name in cells else CellType(helpers[name]) for name in code.co_freevars)
    twin = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    annotations = "__annotate__" if hasattr(function, "__annotate__") else "__annotations__"  # the first since 3.14
    for name in ("__module__", "__qualname__", "__doc__", annotations):
        setattr(twin, name, getattr(function, name))
    return twin
