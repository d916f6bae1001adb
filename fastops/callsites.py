"""Finds, in the source of methods, calls whose result only another call sees, and lets both be decided at once.

::

    x = self.conv(x)                  held_x = hold(self.conv, x, self.bn)
    x = self.bn(x)             ->     held_x = link(self.bn, held_x)
    x += identity                     held_x = hold_sum_in_place(held_x, identity, ..)
    return F.relu(self.fc(x))         return join(F.relu, self.fc, now(held_x))     # and so on

`hold` (all of them are in `fastops.promises`) may put a call off, and the next of them runs it: at the latest before
anything else happens. So the order of all that has effects stays Python's. A call is held only over statements that are
inert: names, attributes, constants and comparisons, but no calls. The promise lies in a variable of its own; the user's
gets its value when it is there. Of several such variables one at most has a promise.

Of a ``forward`` there is a second version, which may return a promise: for callers that hold it.

Nothing is guessed about what the source means: `fastops.source` believes it only if it compiles to the very code that
the method has.

Nothing of torch is imported here.
"""

from __future__ import annotations

import ast
import copy
import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Final

from .source import LeftAlone, source_of
from .syntax import UNKNOWN, Call, Method, Surroundings, deletes, names_in, same_place, stores, tail, target_of

__all__ = ["UNKNOWN", "Call", "LeftAlone", "Rewritten", "Site", "Surroundings", "rewrite", "tail"]


@dataclass(frozen=True)
class Site:
    """A call of what may be an activation: ``function``, or with None a method of the value.

    ``inputs`` may be fused with it. Without any, ``reason`` says why.
    """

    method: str
    line: int
    function: ast.expr | None
    argument: ast.expr
    inputs: tuple[Call, ...]
    reason: str
    unrolled: bool = False  # a loop over functions: which they are shows only when it runs
    name: str = ""  # of the method of the value


@dataclass(frozen=True)
class Rewritten:
    """What became of a method: its new code, None if there is nothing to change, and the calls that were found.

    ``holding`` is code of the method that may return a promise, None if it never would.
    """

    code: CodeType | None
    sites: tuple[Site, ...]
    holding: CodeType | None


def _name(name: str, at: ast.AST, store: bool = False) -> ast.Name:
    return same_place(ast.Name(name, ast.Store() if store else ast.Load()), at)


def _call(at: ast.AST, helper: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    return same_place(ast.Call(_name(f"_fastops_{helper}", at), list(arguments), list(keywords)), at)


def _assign(at: ast.AST, target: ast.expr | str, value: ast.expr) -> ast.stmt:
    target = _name(target, at, store=True) if isinstance(target, str) else target
    return same_place(ast.Assign([target], value), at)


def _held(name: str, at: ast.AST, store: bool = False) -> ast.Name:
    """The variable that promises of ``name`` lie in."""
    return _name(f"_fastops_held_{name}", at, store)


def _fresh(name: str, at: ast.AST, store: bool = False) -> ast.Name:
    """The variable that says whether ``name`` is new memory."""
    return _name(f"_fastops_fresh_{name}", at, store)


@dataclass(frozen=True)
class _Pending:
    """The variable ``name`` whose value may still be a promise, and what may have made it."""

    name: str
    calls: tuple[Call, ...]


_AllPending = tuple[_Pending, ...]


class _Rewriter(Method, ast.NodeTransformer):
    """Rewrites one function in place. ``sites`` has what was found, ``changed`` whether anything is different.

    ``returned`` says whether it may return a promise now.
    """

    def __init__(self, function: FunctionType, tree: ast.FunctionDef, around: Surroundings, holds: bool) -> None:
        super().__init__(function, tree, around, holds)
        self.sites, self.changed, self.returned = list[Site](), False, False
        self.reads: dict[int, tuple[Call, ...]] = {}  # names whose value may be a promise, by id, and what made that
        self.marks: dict[int, str] = {}  # statements whose result, if it is new memory, a sum is written into
        self.made: dict[str, ast.expr | None] = {}  # what was called last to make a variable, for reasons
        # Variables that have a value here for certain.
        self.bound = {n.arg for n in ast.walk(tree.args) if isinstance(n, ast.arg)}
        tree.body, pending = self.block(tree.body, [], ())
        tree.body += self.settle(pending, tree)

    # Statements -------------------------------------------------------------------------------------------------------

    def block(
        self, body: list[ast.stmt], after: list[ast.stmt], pending: _AllPending
    ) -> tuple[list[ast.stmt], _AllPending]:
        """Rewrite ``body``, which ``after`` follows. ``pending``, there and in the result: the variables that wait."""
        if not self.guarded:
            for index, statement in enumerate(body):
                name = target_of(statement) if isinstance(statement, ast.AugAssign) else None
                if name and self.is_sum_in_place(statement, name) and self.wanted(name, body[index + 1 :] + after):
                    makers = self.makers(body[:index], name)
                    self.marks |= dict.fromkeys(map(id, makers), name)
                    if makers:
                        self.marks[id(statement)] = name
                        self.sums[id(statement)] = Call(None, tuple(Call(maker.value.func) for maker in makers))
        new: list[ast.stmt] = []
        for index, statement in enumerate(body):
            rest = body[index + 1 :] + after
            for waiting in pending:
                if self.goes_on(statement, waiting.name, rest):
                    continue
                if self.is_passed(statement) and self.wanted(waiting.name, body[index:] + after):
                    new += self.past(statement, waiting.name)
                else:
                    new += self.settle((waiting,), statement)
                    pending = tuple(p for p in pending if p is not waiting)
            statements, pending = self.statement(statement, rest, pending)
            new += statements
        return new, pending

    def goes_on(self, statement: ast.stmt, name: str, following: list[ast.stmt]) -> bool:
        """Whether a call may still wait when ``statement`` begins, before ``following``."""
        if isinstance(statement, ast.If):
            return self.decides(statement.test) and not names_in(statement.test, name)
        if self.consumer(statement, name, following) or self.loop(statement) == name:
            return True
        return self.inert(statement) and not names_in(statement, name)

    def past(self, statement: ast.stmt, name: str) -> list[ast.stmt]:
        """What goes before a call that may do nothing: ``name`` still waits only if it does."""
        function = copy.deepcopy(statement.value.func)  # type: ignore[attr-defined]
        waits = _call(statement, "past", _held(name, statement), function)
        new = [_assign(statement, _held(name, statement, store=True), waits)]
        if name in self.bound:
            return [*new, *self.shown(name, statement)]
        show = _assign(statement, name, _held(name, statement))
        return [*new, same_place(ast.If(_call(statement, "is_there", _held(name, statement)), [show], []), statement)]

    def shown(self, name: str, at: ast.stmt) -> list[ast.stmt]:
        """What gives ``name`` its value if that is there; what it was must not live longer than it would have."""
        if name not in self.bound:
            return []
        return [_assign(at, name, _call(at, "shown", _held(name, at), _name(name, at)))]

    def settle(self, pending: _AllPending, at: ast.AST) -> list[ast.stmt]:
        """The statements that end the waiting."""
        place = at if isinstance(at, ast.stmt) and not isinstance(at, ast.FunctionDef) else self.tree.body[-1]
        new: list[ast.stmt] = []
        for name in (waiting.name for waiting in pending):
            self.bound.add(name)
            new += [_assign(place, name, _call(place, "now", _held(name, place))), self.release(name, place)]
        return new

    def release(self, name: str, at: ast.AST) -> ast.stmt:
        return _assign(at, _held(name, at, store=True), same_place(ast.Constant(None), at))

    def statement(
        self, statement: ast.stmt, rest: list[ast.stmt], pending: _AllPending
    ) -> tuple[list[ast.stmt], _AllPending]:
        if isinstance(statement, ast.If):
            return self.branches(statement, rest, pending)
        name = target_of(statement)
        if (looped := self.loop(statement)) is not None:
            assert isinstance(statement, ast.For)
            return self.chain(statement, looped, rest, pending)
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            return [self.compound(statement)], pending
        consumed = list[str]()
        for waiting in pending:
            if (found := self.consumer(statement, waiting.name, rest)) is not None:
                self.reads[id(found[1])] = waiting.calls
                consumed.append(waiting.name)
        pending = tuple(waiting for waiting in pending if waiting.name not in consumed)
        waits = name is not None and not self.guarded
        marked = id(statement) in self.marks
        if isinstance(statement, ast.AugAssign):
            waits = waits and marked
        elif not marked and (statement.value is None or not self.is_producer(statement.value)):
            waits = False
        if waits and name is not None and (marked or self.wanted(name, rest)):
            new, waiting = self.put_off(statement, name, rest)
            pending = (*pending, waiting)
        else:
            made = self.unary(statement.value) if name is not None and isinstance(statement, ast.Assign) else None
            if self.returns(statement) and statement.value is not None:
                assert isinstance(statement, ast.Return)
                new = [self.returning(statement)]
            else:
                new = [self.generic_visit(statement)]  # type: ignore[list-item]
            if name is not None:
                self.made[name] = None if made is None else made[0]
            self.bound |= stores(statement)
        if not isinstance(statement, ast.Return):
            new += [self.release(each, statement) for each in consumed if each not in [p.name for p in pending]]
        return new, pending

    def returning(self, statement: ast.Return) -> ast.stmt:
        """A return of what may be a promise."""
        value = statement.value
        assert value is not None
        if id(value) in self.reads:
            assert isinstance(value, ast.Name)
            statement.value, self.returned = _held(value.id, value), True
        elif self.is_producer(value):
            statement.value, self.returned = self.held(value)[0], True
        else:
            self.generic_visit(statement)
        return statement

    def put_off(self, statement: ast.stmt, name: str, rest: list[ast.stmt]) -> tuple[list[ast.stmt], _Pending]:
        """``name = f(x)`` with a call that waits for what follows."""
        value = statement.value  # type: ignore[attr-defined]
        target: ast.expr = _held(name, statement, store=True)
        if isinstance(statement, ast.AugAssign):
            left: ast.expr = _name(name, statement)
            if id(statement.target) in self.reads:
                left = _held(name, statement)
                left = _call(left, "past", left, copy.deepcopy(value.func)) if isinstance(value, ast.Call) else left
            operands = left, self.operand(value), _fresh(name, statement)
            held: ast.expr = _call(statement, "hold_sum_in_place", *operands)
            call = self.sums[id(statement)]
        elif id(statement) in self.marks:
            target = same_place(ast.Tuple([target, _fresh(name, statement, store=True)], ast.Store()), statement)
            held, call = self.mark(value)
        else:
            held, call = self.held(value, self.next_function(name, rest))
        self.changed = True
        return [_assign(statement, target, held), *self.shown(name, statement)], _Pending(name, (call,))

    def mark(self, value: ast.Call) -> tuple[ast.expr, Call]:
        """``f(x)`` that may wait, and also notes whether the result is new memory."""
        found = self.unary(value)
        assert found is not None
        function, argument, _ = found
        given, inputs = self.argument(argument)
        self.note(value, function, argument, inputs)
        return _call(value, "mark", self.visit(function), given), Call(function, inputs or ())

    def chain(
        self, statement: ast.For, name: str, rest: list[ast.stmt], pending: _AllPending
    ) -> tuple[list[ast.stmt], _AllPending]:
        self.changed = True
        start = _held(name, statement) if pending else _name(name, statement)
        self.sites.append(
            Site(self.method, statement.lineno, None, statement.iter, (), "decided when the loop runs", unrolled=True)
        )
        chained = _call(statement, "chain", statement.iter, start)
        if self.wanted(name, rest):
            return [_assign(statement, _held(name, statement, store=True), chained)], (_Pending(name, ()),)
        new = [_assign(statement, name, _call(statement, "now", chained))]
        return ([*new, self.release(name, statement)] if pending else new), ()

    def branches(
        self, statement: ast.If, rest: list[ast.stmt], pending: _AllPending
    ) -> tuple[list[ast.stmt], _AllPending]:
        """An ``if``: what waits at the end of one branch waits at the end of the other too, or in neither."""
        statement.test = self.visit(statement.test)
        before = set(self.bound)
        ends: list[tuple[list[ast.stmt], _AllPending, set[str]]] = []
        for branch in (statement.body, statement.orelse):
            self.bound = set(before)
            new, end = self.block(branch, rest, pending)
            ends.append((new, end, self.bound))
        self.bound = ends[0][2] & ends[1][2]
        merged = dict[str, dict[Call, None]]()
        for _, end, _ in ends:
            for waiting in end:
                merged.setdefault(waiting.name, {}).update(dict.fromkeys(waiting.calls))
        for branch, end, bound in ends:
            for name in list(merged):
                waits = any(waiting.name == name for waiting in end)
                # In a loop the other branch would read what another turn has made, which a consumer may have dropped.
                known = waits or (name in bound and not self.depth) or self._jumps(branch)
                if not self.wanted(name, rest) or not known:
                    del merged[name]
        for branch, end, _ in ends:
            for waiting in end:
                if waiting.name not in merged:
                    branch += self.settle((waiting,), branch[-1] if branch else statement)
            for name in merged.keys() - {waiting.name for waiting in end}:
                if not self._jumps(branch):
                    branch.append(_assign(statement, _held(name, statement, store=True), _name(name, statement)))
        statement.body, statement.orelse = ends[0][0], ends[1][0]
        return [statement], tuple(_Pending(name, tuple(calls)) for name, calls in merged.items())

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
        self.depth += 1
        before = self.bound - deletes(statement)
        for field, value in ast.iter_fields(statement):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.bound = set(before)
                body, pending = self.block(value, [], ())
                setattr(statement, field, body + self.settle(pending, value[-1]))
            elif isinstance(value, list):
                parts = []
                for item in value:
                    self.bound = set(before)
                    parts.append(self.part(item))
                setattr(statement, field, parts)
            elif isinstance(value, ast.AST):
                setattr(statement, field, self.visit(value))
        if isinstance(statement, ast.With) and not catches:
            before |= stores(statement) - deletes(statement)
        self.bound = before
        self.guarded -= catches
        self.depth -= 1
        return statement

    def part(self, node: Any) -> Any:
        """A handler of exceptions, a case of a match or an expression: blocks may be inside."""
        if isinstance(node, (ast.ExceptHandler, ast.match_case)):
            body, pending = self.block(node.body, [], ())
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
        self.changed = True
        pair, found = self.summands(node), self.unary(node)
        if pair is not None:
            left, right = pair
            if self.is_add_method(node):
                return _call(node, "hold_sum_method", self.visit(left), self.operand(right)), Call(None)
            by = [self.visit(node.func)] if isinstance(node, ast.Call) else []
            waits = self.inert(right) or self.may_do_nothing(right)
            first = self.before(self.operand(left), right) if waits else self.visit(left)
            return _call(node, "hold_sum_by" if by else "hold_sum", *by, first, self.operand(right)), Call(None)
        assert isinstance(node, ast.Call)
        if found is None:
            keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
            called = _call(node, "hold_function", *map(self.visit, [node.func, *node.args]), keywords=keywords)
            return called, Call(node.func)
        function, argument, by_keyword = found
        if by_keyword:
            keyword = ast.keyword("input", self.visit(argument))
            return _call(node, "hold_keyword", self.visit(function), keywords=[keyword]), Call(function)
        value, inputs = self.argument(argument)
        self.note(node, function, argument, inputs)
        words = [value]
        if isinstance(value, ast.Call) and ast.unparse(value.func) in _UNARY and len(value.args) == 2:
            helper, words = "link_layer", value.args
        else:
            helper = "hold" if inputs is None else "link"
        return _call(node, helper, self.visit(function), *words, *(following or [])), Call(function, inputs or ())

    def argument(self, argument: ast.expr) -> tuple[ast.expr, tuple[Call, ...] | None]:
        """The argument of a call rewritten, and what may have made it if it may be a promise, else None."""
        if id(argument) in self.reads:
            assert isinstance(argument, ast.Name)
            return _held(argument.id, argument), self.reads[id(argument)]
        if self.is_producer(argument):
            value, made = self.held(argument)
            return value, (made,)
        return self.visit(argument), None

    def operand(self, node: ast.expr) -> ast.expr:
        """A summand rewritten, before whose sum nothing else happens: it may be a promise."""
        return self.visit(node) if self.summands(node) is not None else self.argument(node)[0]

    def before(self, left: ast.expr, right: ast.expr) -> ast.expr:
        """A summand that may be a promise, as it is before the other one, which may be a call that does nothing."""
        if not isinstance(right, ast.Call) or self.inert(left):
            return left
        return _call(left, "past", left, copy.deepcopy(right.func))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        applied = self.application(node)
        if applied is None:
            if self.resolve(node.func) is type and len(node.args) == 1 and not node.keywords:
                self.changed = True
                return _call(node, "user_class", self.generic_visit(node))  # type: ignore[arg-type]
            return self.generic_visit(node)
        function, argument = applied
        is_read = id(argument) in self.reads
        if function is not None and not is_read and (found := self.unary(argument)) and len(node.args) == 1:
            layer, input, by_keyword = found
            inner = id(input) in self.reads or self.is_producer(input)
            if not inner and not by_keyword and not node.keywords:
                self.changed = True
                self.note(node, function, argument, (Call(layer),))
                return _call(node, "join", self.visit(function), self.visit(layer), self.visit(input))
        visited = None if function is None else self.visit(function)  # in Python's order, for the order of the report
        value, inputs = self.argument(argument)
        self.note(node, function, argument, inputs)
        if inputs is None:
            if visited is None:
                node.func.value = value  # type: ignore[attr-defined]
            else:
                node.func, node.args[0] = visited, value
            return node
        self.changed = True
        if visited is None:
            name = same_place(ast.Constant(node.func.attr), node)  # type: ignore[attr-defined]
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
        elif not inputs:
            reason = "what the loop before it gives shows only when it runs"
        name = node.func.attr if function is None else ""  # type: ignore[attr-defined]
        self.sites.append(Site(self.method, node.lineno, function, argument, inputs or (), reason, name=name))


_UNARY: Final = ("_fastops_hold", "_fastops_link")


_rewritten: weakref.WeakKeyDictionary[FunctionType, Rewritten] = weakref.WeakKeyDictionary()


def rewrite(function: FunctionType, around: Surroundings, helpers: Iterable[str]) -> Rewritten:
    """``function`` with its calls rewritten to those of ``helpers``.

    Raises:
        LeftAlone: with the reason, if its source cannot be found or is not what the function was compiled from.
    """
    known = _rewritten.get(function)
    if known is None:
        source = source_of(function)
        rewriter = _Rewriter(function, source.tree, around, holds=False)
        code = source.recompiled(helpers) if rewriter.changed else None
        holding = None
        if function.__name__ == "forward" and _takes_one(function):
            source = source_of(function)
            if _Rewriter(function, source.tree, around, holds=True).returned:
                holding = source.recompiled(helpers)
        known = _rewritten[function] = Rewritten(code, tuple(rewriter.sites), holding)
    return known


def _takes_one(function: FunctionType) -> bool:
    """Whether it is a method of one argument."""
    code = function.__code__
    variable = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return (code.co_argcount, code.co_kwonlyargcount) == (2, 0) and not variable
