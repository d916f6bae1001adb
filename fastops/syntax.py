"""What the source of a method says: which calls there are, what they may be, and who reads their results.

Nothing of torch is imported here.
"""

from __future__ import annotations

import ast
import builtins
import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Final

from .source import SCOPES, LeftAlone

UNKNOWN: Final = object()  # what a name or an attribute is that only a call knows


@dataclass(frozen=True)
class Call:
    """A call whose result goes into the next one, of ``function``, and what may have made its argument.

    With None it is a sum, and ``inputs`` may have made what that is written into.
    """

    function: ast.expr | None
    inputs: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """What the source of a method is judged by.

    ``is_candidate`` says of a global object whether it may be a layer or an activation, ``is_activation`` whether it is
    a function that computes one, ``is_layer_function`` whether it computes what a layer does, ``is_sum`` whether it is
    `torch.add`; ``methods`` are those of tensors that are activations; ``unsteady`` has the attributes of ``self`` that
    run code.
    """

    is_candidate: Callable[[object], bool]
    is_activation: Callable[[object], bool]
    is_layer_function: Callable[[object], bool]
    is_sum: Callable[[object], bool]
    methods: Sequence[str]
    unsteady: frozenset[str] = frozenset()


_INERT: Final = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.Tuple, ast.List, ast.Subscript, ast.Slice, ast.UnaryOp, ast.Compare),
    *(ast.BoolOp, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)
_LOOKS_AT_FRAMES: Final = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe"}


def names_in(node: ast.AST, name: str) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]


def stores(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def deletes(node: ast.AST) -> set[str]:
    """The variables that may have no value any longer behind ``node``."""
    deleted = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Del)}
    return deleted | {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler) and n.name}


def _reads(node: ast.AST) -> tuple[str, ...]:
    """The variable that ``node`` itself reads or deletes."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
        return (node.id,)
    return (node.target.id,) if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) else ()


def same_place(new: Any, old: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(new, old))


def target_of(statement: ast.stmt) -> str | None:
    """The local variable that ``statement`` assigns, if it assigns nothing else."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        targets = [statement.target]
    else:
        return None
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def tail(node: ast.AST | None) -> str:
    """A short name for what an expression gives."""
    if isinstance(node, ast.Call):
        return tail(node.func)
    if isinstance(node, (ast.Attribute, ast.Name)):
        return node.attr if isinstance(node, ast.Attribute) else node.id
    if isinstance(node, ast.BinOp):
        return type(node.op).__name__.lower()
    return "a value" if node is None else ast.unparse(node)[:40]


_Consumer = tuple[ast.AST, ast.Name]  # a call, a sum or a return, and the name in it


class Method:
    """The definition of a method, as far as its source shows what happens to the values in it."""

    def __init__(self, function: FunctionType, tree: ast.FunctionDef, around: Surroundings, holds: bool) -> None:
        self.method, self.globals, self.around = function.__qualname__, function.__globals__, around
        self.tree, self.holds = tree, holds  # whether it may return a promise
        self.self_name = tree.args.args[0].arg if tree.args.args else ""
        nodes = list(ast.walk(tree))
        self.locals = {n.arg for n in nodes if isinstance(n, ast.arg)} | set(function.__code__.co_freevars)
        self.locals |= stores(tree) | {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        self.locals |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        self.locals |= {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
        self.mentions = Counter(n.id for n in nodes if isinstance(n, ast.Name))
        self.reads_of = Counter(name for n in nodes for name in _reads(n))
        # Variables that another scope sees: a function that runs in between could read them.
        self.seen = {name for n in nodes if isinstance(n, (ast.Global, ast.Nonlocal)) for name in n.names}
        scopes = [n for n in nodes if isinstance(n, SCOPES) and n is not tree]
        self.seen |= {n.id for scope in scopes for n in ast.walk(scope) if isinstance(n, ast.Name)}
        mentioned = {n.id for n in nodes if isinstance(n, ast.Name)} | {
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        }
        if looks := sorted(mentioned & _LOOKS_AT_FRAMES):
            raise LeftAlone(f"it calls {looks[0]}, which may look at its variables")
        if any(isinstance(n, ast.AsyncFunctionDef) for n in nodes):
            raise LeftAlone("it is asynchronous")
        if any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in nodes):
            self.holds = False
        self.sums: dict[int, Call] = {}  # statements that add in place to what may be new memory, by id
        self.known: dict[tuple[str, int, int], bool] = {}  # what `wanted` has found out so far
        self.guarded = 0  # inside so many blocks whose exceptions something may catch
        self.depth = 0  # inside so many statements with blocks of their own, `if` apart

    # What a node is ---------------------------------------------------------------------------------------------------

    def resolve(self, node: ast.AST | None) -> object:
        """The object that a global name, or an attribute of a module, is; UNKNOWN for all else."""
        if isinstance(node, ast.Name) and node.id not in self.locals:
            return self.globals.get(node.id, getattr(builtins, node.id, UNKNOWN))
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return getattr(owner, node.attr, UNKNOWN) if isinstance(owner, ModuleType) else UNKNOWN
        return UNKNOWN

    def inert(self, node: ast.AST) -> bool:
        """Whether running it changes nothing but local variables and calls nobody, as far as the source shows."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            value = node.value
            return target_of(node) is not None and value is not None and self.inert(value)
        if isinstance(node, ast.Expr):
            return self.inert(node.value)
        if isinstance(node, ast.If):
            return self.decides(node.test) and all(map(self.inert, [*node.body, *node.orelse]))
        if any(isinstance(n, (ast.UnaryOp, ast.BoolOp, ast.Compare)) and self._reads_deep(n) for n in ast.walk(node)):
            return False
        return isinstance(node, ast.Pass) or all(
            (isinstance(n, _INERT) and not (isinstance(n, ast.Attribute) and self._is_unsteady(n.value, n.attr)))
            or self._is_getattr(n)
            for n in ast.walk(node)
        )

    def decides(self, test: ast.expr) -> bool:
        """Whether the test of an ``if`` is inert: it asks a value whether it is true."""
        return self.inert(test) and not self._reads_deep(test)

    def _reads_deep(self, node: ast.AST) -> bool:
        """Whether it computes with an attribute of an attribute, as a statistic that a layer changes while it runs."""
        if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            return False
        deep = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Attribute))
        return any(self.resolve(n) is UNKNOWN for n in deep)

    def _is_unsteady(self, owner: ast.expr, attribute: str) -> bool:
        of_self = isinstance(owner, ast.Name) and owner.id == self.self_name
        return of_self and ("*" in self.around.unsteady or attribute in self.around.unsteady)

    def _is_getattr(self, node: ast.AST) -> bool:
        """Whether it reads an attribute by its name, as in ``getattr(self, "aa", None)``."""
        if not isinstance(node, ast.Call) or self.resolve(node.func) is not getattr or node.keywords:
            return False
        name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
        return isinstance(name, str) and not self._is_unsteady(node.args[0], name)

    def unary(self, node: ast.AST) -> tuple[ast.expr, ast.expr, bool] | None:
        """Function and argument of a call that may be one of a layer, and whether it goes by the keyword ``input``."""
        if not isinstance(node, ast.Call) or len(node.args) + len(node.keywords) != 1:
            return None
        if not self._is_candidate(node.func):
            return None
        if node.keywords:
            return (node.func, node.keywords[0].value, True) if node.keywords[0].arg == "input" else None
        argument = node.args[0]
        return None if isinstance(argument, (ast.Starred, ast.Constant)) else (node.func, argument, False)

    def _is_candidate(self, function: ast.expr) -> bool:
        value = self.resolve(function)
        return value is UNKNOWN or self.around.is_candidate(value)

    def application(self, node: ast.AST) -> tuple[ast.expr | None, ast.expr] | None:
        """Function, or None for a method of the value, and argument of a call that may be one of an activation."""
        if not isinstance(node, ast.Call):
            return None
        f, further = node.func, [*node.args[1:], *(k.value for k in node.keywords)]
        if isinstance(f, ast.Attribute) and f.attr in self.around.methods and not (node.args or node.keywords):
            return None, f.value
        if not further:
            found = self.unary(node)
            return None if found is None or found[2] else found[:2]
        fits = bool(node.args) and all(k.arg is not None for k in node.keywords)
        if not fits or not self.around.is_activation(self.resolve(f)):
            return None
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return None
        return (f, node.args[0]) if all(map(self.inert, further)) else None

    def is_layer_call(self, node: ast.AST) -> bool:
        """Whether it calls a function that computes what a layer does."""
        if not isinstance(node, ast.Call) or not node.args:
            return False
        if not self.around.is_layer_function(self.resolve(node.func)):
            return False
        return not any(isinstance(n, ast.Starred) for n in node.args) and all(k.arg is not None for k in node.keywords)

    def is_producer(self, node: ast.expr) -> bool:
        """Whether the call may be one of a layer, or a sum: what is applied to an activation never joins it."""
        found = self.unary(node)
        if found is not None and not self.around.is_activation(self.resolve(found[0])):
            return True
        return self.summands(node) is not None or self.is_layer_call(node)

    def summands(self, node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return node.left, node.right
        if isinstance(node, ast.Call) and len(node.args) == 2 and self.around.is_sum(self.resolve(node.func)):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            return None if starred or node.keywords else (node.args[0], node.args[1])
        if self.is_add_method(node) and not isinstance(node.args[0], ast.Starred):  # type: ignore[attr-defined]
            return node.func, node.args[0]  # type: ignore[attr-defined]
        return None

    def is_add_method(self, node: ast.AST) -> bool:
        """Whether it is ``x.add(y)``: what that adds shows when it runs."""
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add"
            and (len(node.args), len(node.keywords)) == (1, 0)
            and self.resolve(node.func) is UNKNOWN
        )

    # What happens to a variable ---------------------------------------------------------------------------------------

    def consumer(self, statement: ast.stmt, name: str, following: list[ast.stmt]) -> _Consumer | None:
        """The call or sum in ``statement`` that alone reads ``name``, before anything else happens and the last time.

        ``following`` is what comes behind.
        """
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            return None
        if name in self.seen:
            return None
        if isinstance(statement, ast.AugAssign):
            target, value = statement.target, statement.value
            is_sum = id(statement) in self.sums and isinstance(target, ast.Name) and self.wanted(target.id, following)
            if is_sum and isinstance(target, ast.Name) and target.id == name:
                fits = not names_in(value, name) and (self.inert(value) or self.may_do_nothing(value))
                return (statement, target) if fits else None
            if is_sum and isinstance(value, ast.Name) and value.id == name:
                return (statement, value) if self.is_last(name, following) else None
            if not self.inert(target):
                return None
        found = names_in(statement, name)
        overwrites = isinstance(statement, (ast.Assign, ast.AnnAssign)) and target_of(statement) == name
        if sum(isinstance(n.ctx, ast.Load) for n in found) != 1 or len(found) > 1 + overwrites:
            return None
        if not (overwrites or isinstance(statement, ast.Return) or self.is_last(name, following)):
            return None
        node: ast.AST | None = statement.value
        if self.returns(statement) and isinstance(node, ast.Name):
            return statement, node
        while node is not None:  # down to the name, past what Python evaluates before it
            applied = self.application(node)
            if applied is not None and isinstance(applied[1], ast.Name) and applied[1].id == name:
                return (node, applied[1]) if applied[0] is None or self.inert(applied[0]) else None
            pair = self.summands(node)
            for operand, other in (pair, pair[::-1]) if pair is not None else ():
                if isinstance(operand, ast.Name) and operand.id == name:
                    comes_later = operand is pair[0] and self.may_do_nothing(other)  # type: ignore[index]
                    fits = self.inert(other) or comes_later
                    return (node, operand) if fits and self.is_activated(statement, node, following) else None
            if not isinstance(node, (ast.Call, ast.Attribute, ast.BinOp, ast.Tuple, ast.List, ast.keyword)):
                return None
            for child in ast.iter_child_nodes(node):
                if names_in(child, name):
                    node = child
                    break
                if not self.inert(child):
                    return None
        return None

    def is_last(self, name: str, following: list[ast.stmt]) -> bool:
        """Whether nothing behind a statement that reads ``name`` reads it again."""
        if self.reads_of[name] == 1:
            return True
        return not self.depth and not any(name in _reads(n) for s in following for n in ast.walk(s))

    def is_activated(self, statement: ast.stmt, sum: ast.AST, following: list[ast.stmt]) -> bool:
        """Whether an activation may be applied to ``sum``, an expression in ``statement``."""
        if self.returns(statement) and statement.value is sum:  # type: ignore[attr-defined]
            return True
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is sum:
            name = target_of(statement)
            return name is not None and not self.guarded and self.wanted(name, following)
        return any((found := self.application(n)) is not None and found[1] is sum for n in ast.walk(statement))

    def returns(self, statement: ast.stmt) -> bool:
        """Whether it returns what may be a promise: then outside of any ``with`` and ``try``."""
        return self.holds and not self.depth and isinstance(statement, ast.Return)

    def wanted(self, name: str, following: list[ast.stmt]) -> bool:
        """Whether a call of ``name`` pays to be held: what comes next may be applied to its result."""
        if not following:
            return False
        outermost, key = not self.known, (name, id(following[0]), len(following))
        if key not in self.known:
            self.known[key] = False
            self.known[key] = self._is_wanted(name, following)
        found = self.known[key]
        if outermost:  # what is known holds until the next statement is rewritten
            self.known.clear()
        return found

    def _is_wanted(self, name: str, following: list[ast.stmt]) -> bool:
        for index, statement in enumerate(following):
            rest = following[index + 1 :]
            if self.consumer(statement, name, rest) or self.loop(statement) == name:
                return True
            mentioned = bool(names_in(statement, name))
            if isinstance(statement, ast.If) and (mentioned or not self.inert(statement)):
                if names_in(statement.test, name) or not self.decides(statement.test):
                    return False
                return any(self.wanted(name, branch + rest) for branch in (statement.body, statement.orelse))
            if mentioned or not (self.inert(statement) or self.is_passed(statement)):
                return False
        return False

    def is_passed(self, statement: ast.stmt) -> bool:
        """Whether it is ``v = f(w)``, which does nothing where ``f`` is an identity."""
        return isinstance(statement, ast.Assign) and bool(target_of(statement)) and self.may_do_nothing(statement.value)

    def may_do_nothing(self, node: ast.expr) -> bool:
        """Whether it is a call that does nothing where its function is an identity."""
        found = self.unary(node)
        if found is None or self.around.is_activation(self.resolve(found[0])):
            return False
        return self.inert(found[0]) and self.inert(found[1])

    def next_function(self, name: str, following: list[ast.stmt]) -> list[ast.expr]:
        """What is applied to ``name`` next, if that is known beforehand and not for certain an activation.

        One expression, or two for an attribute: what has it and its name.
        """
        assigned = {name}
        for index, statement in enumerate(following):
            found = self.consumer(statement, name, following[index + 1 :])
            applied = None if found is None else self.application(found[0])
            if applied is not None:
                function = applied[0]
                if function is None or self.around.is_activation(self.resolve(function)):
                    return []
                depends = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                if depends & assigned:
                    return []
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):  # looked up if need be
                    return [copy.deepcopy(function.value), same_place(ast.Constant(function.attr), function)]
                return [copy.deepcopy(function)]
            if names_in(statement, name) or not self.inert(statement):
                return []
            assigned |= stores(statement)
        return []

    def loop(self, statement: ast.stmt) -> str | None:
        """The variable v of ``for f in ...: v = f(v)``, where every call is the only reader of the one before."""
        if not isinstance(statement, ast.For) or len(statement.body) != 1 or statement.orelse or statement.type_comment:
            return None
        body, each = statement.body[0], statement.target
        name = target_of(body) if isinstance(body, ast.Assign) else None
        found = self.unary(body.value) if isinstance(body, ast.Assign) else None
        if name is None or found is None or not isinstance(each, ast.Name) or self.guarded or name in self.seen:
            return None
        function, argument, by_keyword = found
        fits = isinstance(function, ast.Name) and function.id == each.id and not by_keyword
        fits = fits and isinstance(argument, ast.Name) and argument.id == name != each.id
        alone = self.mentions[each.id] == 2 and each.id not in self.seen
        return name if fits and alone and self.inert(statement.iter) and not names_in(statement.iter, name) else None

    def makers(self, before: list[ast.stmt], name: str) -> list[Any]:
        """The statements of ``before`` that may have made ``name``, each by a call; none if that is not sure."""
        found: list[ast.Assign] = []
        for statement in reversed(before):
            if not names_in(statement, name):
                continue
            last: ast.stmt | None = statement
            if isinstance(statement, ast.If) and not statement.orelse and not names_in(statement.test, name):
                last = next((s for s in reversed(statement.body) if names_in(s, name)), None)
            if not isinstance(last, ast.Assign) or target_of(last) != name or self.unary(last.value) is None:
                return []
            if name in self.seen or self.unary(last.value)[2]:  # type: ignore[index]
                return []
            found.append(last)
            if last is statement:
                return found
        return []

    def is_sum_in_place(self, statement: ast.stmt, name: str) -> bool:
        return (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.op, ast.Add)
            and not names_in(statement.value, name)
        )
