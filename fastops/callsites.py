"""Finds, in the source of methods, calls whose result only another call sees, and lets both be decided at once.

::

    x = self.conv(x)                  held = hold(self.conv, x, self.bn)
    x = self.bn(x)             ->     held = link(self.bn, held)
    return F.relu(self.fc(x))         return join(F.relu, self.fc, x)       # and so on

`hold` (all of them are in `fastops.promises`) may put a call off, and the next of them runs it: at the latest before
anything else happens. So the order of all that has effects stays Python's. A call is held only over statements that are
inert: names, attributes, constants and comparisons, but no calls. The promise lies in a variable of its own; the user's
gets its value when it is there.

Nothing is guessed about what the source means: `fastops.source` believes it only if it compiles to the very code that
the method has.

Nothing of torch is imported here.
"""

from __future__ import annotations

import ast
import builtins
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

from .source import SCOPES, LeftAlone, source_of

UNKNOWN: Final = object()  # what a name or an attribute is that only a call knows
HELD: Final = "_fastops_held"  # the variable that promises lie in: there is never more than one at a time


@dataclass(frozen=True)
class Call:
    """A call whose result goes into the next one, of ``function``, and what may have made its argument.

    With None it is a sum, and ``inputs`` may have made what that is written into.
    """

    function: ast.expr | None
    inputs: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Site:
    """A call of what may be a ReLU: ``function``, or with None a method of the value. ``inputs`` may be fused with it.

    Without any, ``reason`` says why.
    """

    method: str
    line: int
    function: ast.expr | None
    argument: ast.expr
    inputs: tuple[Call, ...]
    reason: str
    unrolled: bool = False  # a loop over functions: which they are shows only when it runs


@dataclass(frozen=True)
class Rewritten:
    """What became of a method: its new code, None if there is nothing to change, and the calls that were found."""

    code: CodeType | None
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Surroundings:
    """What the source of a method is judged by.

    ``is_candidate`` says of a global object whether it may be a layer or a ReLU, ``is_relu`` whether it is a ReLU
    function, ``is_sum`` whether it is `torch.add`; ``unsteady`` has the attributes of ``self`` that run code.
    """

    is_candidate: Callable[[object], bool]
    is_relu: Callable[[object], bool]
    is_sum: Callable[[object], bool]
    relu_methods: Sequence[str]
    unsteady: frozenset[str] = frozenset()


_INERT: Final = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.Tuple, ast.List, ast.Subscript, ast.Slice, ast.UnaryOp, ast.Compare),
    *(ast.BoolOp, ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)
_LOOKS_AT_FRAMES: Final = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe"}


def names_in(node: ast.AST, name: str) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]


def _stores(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def _same_place(new: Any, old: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(new, old))


def _name(name: str, at: ast.AST, store: bool = False) -> ast.Name:
    return _same_place(ast.Name(name, ast.Store() if store else ast.Load()), at)


def _call(at: ast.AST, helper: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    return _same_place(ast.Call(_name(f"_fastops_{helper}", at), list(arguments), list(keywords)), at)


def _assign(at: ast.AST, target: ast.expr | str, value: ast.expr) -> ast.stmt:
    target = _name(target, at, store=True) if isinstance(target, str) else target
    return _same_place(ast.Assign([target], value), at)


def _target(statement: ast.stmt) -> str | None:
    """The local variable that ``statement`` assigns, if it assigns nothing else."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        targets = [statement.target]
    else:
        return None
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


@dataclass(frozen=True)
class _Pending:
    """The variable ``name`` whose value lies in `HELD`, where it may still be a promise, and what may have made it."""

    name: str
    calls: tuple[Call, ...]


class _Rewriter(ast.NodeTransformer):
    """Rewrites one function in place. ``sites`` has what was found, ``changed`` whether anything is different."""

    def __init__(self, function: FunctionType, tree: ast.FunctionDef, around: Surroundings) -> None:
        self.method, self.globals, self.around = function.__qualname__, function.__globals__, around
        self.tree, self.sites, self.changed = tree, list[Site](), False
        self.self_name = tree.args.args[0].arg if tree.args.args else ""
        nodes = list(ast.walk(tree))
        self.locals = {n.arg for n in nodes if isinstance(n, ast.arg)} | set(function.__code__.co_freevars)
        self.locals |= _stores(tree) | {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        self.locals |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        self.locals |= {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
        self.mentions = Counter(n.id for n in nodes if isinstance(n, ast.Name))
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
        self.reads: dict[int, tuple[Call, ...]] = {}  # calls whose argument lies in HELD, by id, and what made that
        self.marks: dict[int, str] = {}  # statements whose result, if it is new memory, a sum is written into
        self.sums: dict[int, Call] = {}  # the sums in place among these
        self.made: dict[str, ast.expr | None] = {}  # what was called last to make a variable, for reasons
        self.bound = {
            n.arg for n in ast.walk(tree.args) if isinstance(n, ast.arg)
        }  # variables that have a value here for certain
        self.guarded = 0  # inside so many blocks whose exceptions something may catch
        tree.body, pending = self.block(tree.body, [], None)
        tree.body += self.settle(pending, tree)

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
            return _target(node) is not None and value is not None and self.inert(value)
        if isinstance(node, ast.Expr):
            return self.inert(node.value)
        if isinstance(node, ast.If):
            return all(map(self.inert, [node.test, *node.body, *node.orelse]))
        return isinstance(node, ast.Pass) or all(
            isinstance(n, _INERT) and not (isinstance(n, ast.Attribute) and self._is_unsteady(n))
            for n in ast.walk(node)
        )

    def _is_unsteady(self, node: ast.Attribute) -> bool:
        of_self = isinstance(node.value, ast.Name) and node.value.id == self.self_name
        return of_self and ("*" in self.around.unsteady or node.attr in self.around.unsteady)

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
        """Function, or None for a method of the value, and argument of a call that may be one of a ReLU."""
        if not isinstance(node, ast.Call):
            return None
        f, further = node.func, [*node.args[1:], *(k.value for k in node.keywords)]
        if isinstance(f, ast.Attribute) and f.attr in self.around.relu_methods and not (node.args or node.keywords):
            return None, f.value
        if not further:
            found = self.unary(node)
            return None if found is None or found[2] else found[:2]
        fits = len(further) == 1 and len(node.args) >= 1 and all(k.arg == "inplace" for k in node.keywords)
        if not fits or not self.around.is_relu(self.resolve(f)) or isinstance(node.args[0], ast.Starred):
            return None
        return (f, node.args[0]) if self.inert(further[0]) else None

    def summands(self, node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return node.left, node.right
        if isinstance(node, ast.Call) and len(node.args) == 2 and self.around.is_sum(self.resolve(node.func)):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            return None if starred or node.keywords else (node.args[0], node.args[1])
        if self._is_add_method(node) and not isinstance(node.args[0], ast.Starred):  # type: ignore[attr-defined]
            return node.func, node.args[0]  # type: ignore[attr-defined]
        return None

    def _is_add_method(self, node: ast.AST) -> bool:
        """Whether it is ``x.add(y)``: what that adds shows when it runs."""
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add"
            and (len(node.args), len(node.keywords)) == (1, 0)
            and self.resolve(node.func) is UNKNOWN
        )

    # What happens to a variable ---------------------------------------------------------------------------------------

    def consumer(self, statement: ast.stmt, name: str) -> ast.Call | None:
        """The call in ``statement`` that alone reads ``name``, before anything else happens and for the last time."""
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            return None
        found = names_in(statement, name)
        overwrites = isinstance(statement, (ast.Assign, ast.AnnAssign)) and _target(statement) == name
        if sum(isinstance(n.ctx, ast.Load) for n in found) != 1 or len(found) > 1 + overwrites:
            return None
        if not (overwrites or self.mentions[name] == 2 or isinstance(statement, ast.Return)) or name in self.seen:
            return None
        if isinstance(statement, ast.AugAssign) and not self.inert(statement.target):
            return None
        node: ast.AST | None = statement.value
        while node is not None:  # down to the name, past what Python evaluates before it
            applied = self.application(node)
            if applied is not None and isinstance(applied[1], ast.Name) and applied[1].id == name:
                assert isinstance(node, ast.Call)
                return node if applied[0] is None or self.inert(applied[0]) else None
            if not isinstance(node, (ast.Call, ast.Attribute, ast.BinOp, ast.Tuple, ast.List, ast.keyword)):
                return None
            for child in ast.iter_child_nodes(node):
                if names_in(child, name):
                    node = child
                    break
                if not self.inert(child):
                    return None
        return None

    def wanted(self, name: str, following: list[ast.stmt]) -> bool:
        """Whether a call of ``name`` pays to be held: what comes next may be applied to its result."""
        for index, statement in enumerate(following):
            if self.consumer(statement, name) or self.loop(statement) == name:
                return True
            mentioned = bool(names_in(statement, name))
            if isinstance(statement, ast.If) and (mentioned or not self.inert(statement)):
                if names_in(statement.test, name) or not self.inert(statement.test):
                    return False
                rest = following[index + 1 :]
                return any(self.wanted(name, branch + rest) for branch in (statement.body, statement.orelse))
            if mentioned or not self.inert(statement):
                return False
        return False

    def next_function(self, name: str, following: list[ast.stmt]) -> list[ast.expr]:
        """What is applied to ``name`` next, if that is known beforehand and not for certain a ReLU.

        One expression, or two for an attribute: what has it and its name.
        """
        assigned = {name}
        for statement in following:
            call = self.consumer(statement, name)
            applied = None if call is None else self.application(call)
            if applied is not None:
                function = applied[0]
                if function is None or self.around.is_relu(self.resolve(function)):
                    return []
                depends = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                if depends & assigned:
                    return []
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):  # looked up if need be
                    return [copy.deepcopy(function.value), _same_place(ast.Constant(function.attr), function)]
                return [copy.deepcopy(function)]
            if names_in(statement, name) or not self.inert(statement):
                return []
            assigned |= _stores(statement)
        return []

    def loop(self, statement: ast.stmt) -> str | None:
        """The variable v of ``for f in ...: v = f(v)``, where every call is the only reader of the one before."""
        if not isinstance(statement, ast.For) or len(statement.body) != 1 or statement.orelse or statement.type_comment:
            return None
        body, each = statement.body[0], statement.target
        name = _target(body) if isinstance(body, ast.Assign) else None
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
            if not isinstance(last, ast.Assign) or _target(last) != name or self.unary(last.value) is None:
                return []
            if name in self.seen or self.unary(last.value)[2]:  # type: ignore[index]
                return []
            found.append(last)
            if last is statement:
                return found
        return []

    # Statements -------------------------------------------------------------------------------------------------------

    def block(
        self, body: list[ast.stmt], after: list[ast.stmt], pending: _Pending | None
    ) -> tuple[list[ast.stmt], _Pending | None]:
        """Rewrite ``body``, which ``after`` follows. ``pending``, there and in the result: the variable that waits."""
        if not self.guarded:
            for index, statement in enumerate(body):
                name = _target(statement) if isinstance(statement, ast.AugAssign) else None
                if name and self.is_sum_in_place(statement, name) and self.wanted(name, body[index + 1 :] + after):
                    makers = self.makers(body[:index], name)
                    self.marks |= dict.fromkeys(map(id, makers), name)
                    if makers:
                        self.marks[id(statement)] = name
                        self.sums[id(statement)] = Call(None, tuple(Call(maker.value.func) for maker in makers))
        new: list[ast.stmt] = []
        for index, statement in enumerate(body):
            rest = body[index + 1 :] + after
            if pending is not None and not self.goes_on(statement, pending.name):
                new += self.settle(pending, statement)
                pending = None
            statements, pending = self.statement(statement, rest, pending)
            new += statements
        return new, pending

    def is_sum_in_place(self, statement: ast.stmt, name: str) -> bool:
        return (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.op, ast.Add)
            and not names_in(statement.value, name)
        )

    def goes_on(self, statement: ast.stmt, name: str) -> bool:
        """Whether a call may still wait when ``statement`` begins."""
        if isinstance(statement, ast.If):
            return self.inert(statement.test) and not names_in(statement.test, name)
        if self.consumer(statement, name) or self.loop(statement) == name:
            return True
        return self.inert(statement) and not names_in(statement, name)

    def settle(self, pending: _Pending | None, at: ast.AST) -> list[ast.stmt]:
        """The statement that ends the waiting."""
        if pending is None:
            return []
        self.bound.add(pending.name)
        place = at if isinstance(at, ast.stmt) and not isinstance(at, ast.FunctionDef) else self.tree.body[-1]
        return [_assign(place, pending.name, _call(place, "now", _name(HELD, place))), self.release(place)]

    def release(self, at: ast.AST) -> ast.stmt:
        return _assign(at, HELD, _same_place(ast.Constant(None), at))

    def statement(
        self, statement: ast.stmt, rest: list[ast.stmt], pending: _Pending | None
    ) -> tuple[list[ast.stmt], _Pending | None]:
        if isinstance(statement, ast.If):
            return self.branches(statement, rest, pending)
        name = _target(statement)
        if (looped := self.loop(statement)) is not None:
            assert isinstance(statement, ast.For)
            return self.chain(statement, looped, rest, pending)
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            return [self.compound(statement)], pending
        if pending is not None:
            call = self.consumer(statement, pending.name)
            if call is None:  # an inert one
                self.bound |= _stores(statement)
                return [self.generic_visit(statement)], pending  # type: ignore[list-item]
            self.reads[id(call)] = pending.calls
        waits = name is not None and not self.guarded
        marked = self.marks.get(id(statement))
        if isinstance(statement, ast.AugAssign):
            waits = waits and marked is not None
        elif marked is not None or statement.value is None or not self.is_producer(statement.value):
            waits = False
        if waits and name is not None and self.wanted(name, rest):
            return self.put_off(statement, name, rest)
        made = self.unary(statement.value) if name is not None and isinstance(statement, ast.Assign) else None
        if marked is not None and isinstance(statement, ast.Assign):
            new: ast.stmt = self.mark(statement, marked)
        else:
            new = self.generic_visit(statement)  # type: ignore[assignment]
        if name is not None:
            self.made[name] = None if made is None else made[0]
        self.bound |= _stores(statement)
        ends = pending is not None and not isinstance(statement, ast.Return)
        return [new, self.release(statement)] if ends else [new], None

    def is_producer(self, node: ast.expr) -> bool:
        """Whether the call may be one of a layer, or a sum: what is applied to a ReLU never joins it."""
        found = self.unary(node)
        return self.summands(node) is not None or (
            found is not None and not self.around.is_relu(self.resolve(found[0]))
        )

    def put_off(self, statement: ast.stmt, name: str, rest: list[ast.stmt]) -> tuple[list[ast.stmt], _Pending | None]:
        """``name = f(x)`` with a call that waits for what follows."""
        value = statement.value  # type: ignore[attr-defined]
        if isinstance(statement, ast.AugAssign):
            fresh = _name(f"_fastops_fresh_{name}", statement)
            held: ast.expr = _call(statement, "hold_sum_in_place", _name(name, statement), self.visit(value), fresh)
            call = self.sums[id(statement)]
        else:
            held, call = self.held(value, self.next_function(name, rest))
        self.changed = True
        new = [_assign(statement, HELD, held)]
        if name in self.bound:  # what it was must not live longer than it would have
            new.append(
                _assign(statement, name, _call(statement, "shown", _name(HELD, statement), _name(name, statement)))
            )
        return new, _Pending(name, (call,))

    def mark(self, statement: ast.Assign, name: str) -> ast.stmt:
        """``name = f(x)`` that also notes whether the result is new memory."""
        call = statement.value
        found = self.unary(call)
        assert found is not None and isinstance(call, ast.Call)
        function, argument, _ = found
        self.changed = True
        value, inputs = self.argument(call, argument)
        self.note(call, function, argument, inputs)
        marked = _call(call, "mark", self.visit(function), value)
        pair = ast.Tuple([statement.targets[0], _name(f"_fastops_fresh_{name}", call, store=True)], ast.Store())
        return _assign(statement, _same_place(pair, statement), marked)

    def chain(
        self, statement: ast.For, name: str, rest: list[ast.stmt], pending: _Pending | None
    ) -> tuple[list[ast.stmt], _Pending | None]:
        self.changed = True
        start = _name(name if pending is None else HELD, statement)
        self.sites.append(
            Site(self.method, statement.lineno, None, statement.iter, (), "decided when the loop runs", unrolled=True)
        )
        chained = _call(statement, "chain", statement.iter, start)
        if self.wanted(name, rest):
            return [_assign(statement, HELD, chained)], _Pending(name, ())
        new = [_assign(statement, name, _call(statement, "now", chained))]
        return (new if pending is None else [*new, self.release(statement)]), None

    def branches(
        self, statement: ast.If, rest: list[ast.stmt], pending: _Pending | None
    ) -> tuple[list[ast.stmt], _Pending | None]:
        """An ``if``: what waits at the end of one branch waits at the end of the other too, or in neither."""
        statement.test = self.visit(statement.test)
        before = set(self.bound)
        statement.body, first = self.block(statement.body, rest, pending)
        bound_first, self.bound = self.bound, set(before)
        statement.orelse, second = self.block(statement.orelse, rest, pending)
        bound_second = self.bound
        waiting = first or second
        agree = waiting is not None and all(end is None or end.name == waiting.name for end in (first, second))
        keep = waiting is not None and agree and self.wanted(waiting.name, rest)
        for branch, end, bound in ((statement.body, first, bound_first), (statement.orelse, second, bound_second)):
            if end is None and waiting is not None:
                keep = keep and (waiting.name in bound or self._jumps(branch))
        for branch, end in ((statement.body, first), (statement.orelse, second)):
            if end is not None and not keep:
                branch += self.settle(end, branch[-1] if branch else statement)
            elif end is None and keep and waiting is not None and not self._jumps(branch):
                branch.append(_assign(statement, HELD, _name(waiting.name, statement)))
        self.bound = bound_first & bound_second
        if not keep or waiting is None:
            return [statement], None
        calls = tuple(dict.fromkeys(call for end in (first, second) if end is not None for call in end.calls))
        return [statement], _Pending(waiting.name, calls)

    @staticmethod
    def _jumps(branch: list[ast.stmt]) -> bool:
        return bool(branch) and isinstance(branch[-1], (ast.Return, ast.Raise, ast.Break, ast.Continue))

    def compound(self, statement: ast.stmt) -> ast.stmt:
        """A statement with blocks of its own, at whose ends nothing waits, or one without any."""
        catches = isinstance(statement, (ast.Try, *((ast.TryStar,) if hasattr(ast, "TryStar") else ())))
        if isinstance(statement, (ast.With, ast.AsyncWith)):
            catches = not all(self._is_torchs(item.context_expr) for item in statement.items)
        if isinstance(statement, ast.ClassDef):
            return statement
        self.guarded += catches
        before = set(self.bound)
        for field, value in ast.iter_fields(statement):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.bound = set(before)
                body, pending = self.block(value, [], None)
                setattr(statement, field, body + self.settle(pending, value[-1]))
            elif isinstance(value, list):
                setattr(statement, field, [self.part(item) for item in value])
            elif isinstance(value, ast.AST):
                setattr(statement, field, self.visit(value))
        self.bound = before | (_stores(statement) if isinstance(statement, ast.With) and not catches else set())
        self.guarded -= catches
        return statement

    def part(self, node: Any) -> Any:
        """A handler of exceptions, a case of a match or an expression: blocks may be inside."""
        if isinstance(node, (ast.ExceptHandler, ast.match_case)):
            body, pending = self.block(node.body, [], None)
            node.body = body + self.settle(pending, node.body[-1])
            return node
        return self.visit(node) if isinstance(node, ast.AST) else node

    def _is_torchs(self, node: ast.expr) -> bool:
        """Whether it is a context manager of torch: these catch no exceptions."""
        value = self.resolve(node.func if isinstance(node, ast.Call) else node)
        return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self.compound(node)

    # Expressions ------------------------------------------------------------------------------------------------------

    def held(self, node: ast.expr, following: list[ast.expr] | None = None) -> tuple[ast.expr, Call]:
        """``node``, a producer, as an expression that may give a promise. ``following`` is what is applied to it."""
        pair, found = self.summands(node), self.unary(node)
        if pair is not None:
            if self._is_add_method(node):
                return _call(node, "hold_sum_method", *map(self.visit, pair)), Call(None)
            by = [self.visit(node.func)] if isinstance(node, ast.Call) else []
            return _call(node, "hold_sum_by" if by else "hold_sum", *by, *map(self.visit, pair)), Call(None)
        assert found is not None and isinstance(node, ast.Call)
        function, argument, by_keyword = found
        if by_keyword:
            keyword = ast.keyword("input", self.visit(argument))
            return _call(node, "hold_keyword", self.visit(function), keywords=[keyword]), Call(function)
        value, inputs = self.argument(node, argument)
        self.note(node, function, argument, inputs)
        words = [value]
        if isinstance(value, ast.Call) and ast.unparse(value.func) in _UNARY and len(value.args) == 2:
            helper, words = "link_layer", value.args
        else:
            helper = "hold" if inputs is None else "link"
        return _call(node, helper, self.visit(function), *words, *(following or [])), Call(function, inputs or ())

    def argument(self, call: ast.Call, argument: ast.expr) -> tuple[ast.expr, tuple[Call, ...] | None]:
        """The argument of ``call`` rewritten, and what may have made it if it may be a promise, else None."""
        if id(call) in self.reads:
            return _name(HELD, argument), self.reads[id(call)]
        if self.is_producer(argument):
            value, made = self.held(argument)
            return value, (made,)
        return self.visit(argument), None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        applied = self.application(node)
        if applied is None:
            if self.resolve(node.func) is type and len(node.args) == 1 and not node.keywords:
                self.changed = True
                return _call(node, "user_class", self.generic_visit(node))  # type: ignore[arg-type]
            return self.generic_visit(node)
        function, argument = applied
        if (
            function is not None
            and id(node) not in self.reads
            and (found := self.unary(argument))
            and len(node.args) == 1
        ):
            layer, input, by_keyword = found
            inner = isinstance(argument, ast.Call) and (id(argument) in self.reads or self.is_producer(input))
            if not inner and not by_keyword and not node.keywords:
                self.changed = True
                self.note(node, function, argument, (Call(layer),))
                return _call(node, "join", self.visit(function), self.visit(layer), self.visit(input))
        visited = None if function is None else self.visit(function)  # in Python's order, for the order of the report
        value, inputs = self.argument(node, argument)
        self.note(node, function, argument, inputs)
        if inputs is None:
            if visited is None:
                node.func.value = value  # type: ignore[attr-defined]
            else:
                node.func, node.args[0] = visited, value
            return node
        self.changed = True
        if visited is None:
            name = _same_place(ast.Constant(node.func.attr), node)  # type: ignore[attr-defined]
            return _call(node, "method", value, name)
        rest = [self.visit(a) for a in node.args[1:]]
        return _call(node, "apply", visited, value, *rest, keywords=[self.visit(k) for k in node.keywords])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr != "__class__" or not isinstance(node.ctx, ast.Load):
            return node
        self.changed = True
        return _call(node, "user_class", node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node

    def note(
        self, node: ast.Call, function: ast.expr | None, argument: ast.expr, inputs: tuple[Call, ...] | None
    ) -> None:
        reason = ""
        if inputs is None:
            made = self.made.get(argument.id) if isinstance(argument, ast.Name) else None
            if made is not None:
                where = "in a block that may catch an exception" if self.guarded else "used elsewhere too"
                reason = f"the output of {tail(made)} is {where}"
            else:
                reason = f"its input is {tail(argument)}, not a layer"
        self.sites.append(Site(self.method, node.lineno, function, argument, inputs or (), reason))


_UNARY: Final = ("_fastops_hold", "_fastops_link")


def tail(node: ast.AST | None) -> str:
    """A short name for what an expression gives."""
    if isinstance(node, ast.Call):
        return tail(node.func)
    if isinstance(node, (ast.Attribute, ast.Name)):
        return node.attr if isinstance(node, ast.Attribute) else node.id
    if isinstance(node, ast.BinOp):
        return type(node.op).__name__.lower()
    return "a value" if node is None else ast.unparse(node)[:40]


_rewritten: weakref.WeakKeyDictionary[FunctionType, Rewritten] = weakref.WeakKeyDictionary()


def rewrite(function: FunctionType, around: Surroundings, helpers: Iterable[str]) -> Rewritten:
    """``function`` with its calls rewritten to those of ``helpers``.

    Raises:
        LeftAlone: with the reason, if its source cannot be found or is not what the function was compiled from.
    """
    known = _rewritten.get(function)
    if known is None:
        source = source_of(function)
        rewriter = _Rewriter(function, source.tree, around)
        code = source.recompiled(helpers) if rewriter.changed else None
        known = _rewritten[function] = Rewritten(code, tuple(rewriter.sites))
    return known
