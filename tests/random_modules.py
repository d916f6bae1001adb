"""Writes random modules of a user's, as the source of a file, with what happens to a model of theirs.

`sources` draws such files. ``make()`` in it makes the model, ``prepare(model)`` hooks it, rows of ``SHAPE`` and
``DTYPE`` go in, on backend ``WAY``, and ``STEPS`` is what happens then: a function changes the model, a word is for
`test_swap_random.compare`. What the file notes in ``SEEN`` shows the order of effects. Every layer keeps the shape, so
that any value may go anywhere.

Left out is what torch does not define or what `fastops.swap` does not promise:

- ``v.is_contiguous()``, ``v.grad_fn`` and ``v._version``: how a value was made is no part of it;
- ELU in place: torch computes its gradient from the output then, and fused it is the one from the input, which
  rounds differently;
- methods that ask for the class of the object and are decorated, called by their class (``Base.step(self, t)``) or
  given to it after the swap: they are not rewritten, and see ours.
"""

from __future__ import annotations

import linecache
import sys
import types
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from random_words import (
    ACTIVATIONS,
    APPLIED,
    CHOSEN,
    COLLECTED,
    CONTEXTS,
    EDITS,
    EFFECTS,
    EFFECTS_OF_MODULES,
    FUNCTIONS,
    HEAD,
    HEADS,
    HOOKS,
    IN_PLACE,
    LAYERS,
    LOOPS,
    NORM,
    NORMS,
    OTHERS,
    OTHERWISE,
    OWN,
    POOL,
    SHAPES,
    SUMS,
    TESTS,
    WAYS,
)
from torch import nn


@dataclass(frozen=True)
class Scope:
    """Where a statement stands: variables that have a value, and what may be called."""

    names: tuple[str, ...]
    callees: tuple[str, ...]
    level: int = 0  # of blocks
    loop: bool = False
    is_method: bool = True
    asks_class: bool = True


@dataclass
class Author:
    """Draws one file. The first of several possibilities is the simplest: what fails shrinks to it."""

    draw: Any
    kind: str = "rows"
    budget: int = 0  # of statements

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, one_in: int) -> bool:
        return bool(self.draw(st.integers(0, one_in - 1)) == one_in - 1)

    def of(self, scope: Scope, templates: tuple[str, ...]) -> list[str]:
        """Those that may stand there."""
        return [template for template in templates if scope.is_method or "self" not in template]

    # Expressions ------------------------------------------------------------------------------------------------------

    def name(self, scope: Scope) -> str:
        """A variable, the newest one most often."""
        newest: str = scope.names[-1]
        return newest if self.draw(st.integers(0, 3)) < 2 else self.pick(scope.names)

    def fill(self, scope: Scope, template: str, depth: int) -> str:
        template = template.replace("{norm}", "F.batch_norm")
        parts = template.split("{}")
        filled = parts[0]
        for part in parts[1:]:
            filled += self.value(scope, depth) + part
        return filled

    def call(self, scope: Scope, depth: int) -> str:
        callee = self.pick(scope.callees)
        value = self.value(scope, depth)
        if callee.startswith("self.") and callee[5:].isidentifier() and self.chance(8):
            callee = f"getattr(self, {callee[5:]!r})"
        return f"{callee}(input={value})" if self.chance(12) else f"{callee}({value})"

    def applied(self, scope: Scope, value: str) -> str:
        way = self.draw(st.integers(0, 7))
        if way < 3 and scope.is_method:
            return f"self.act({value})"
        return str(self.pick(IN_PLACE if way == 7 else APPLIED)).format(value)

    def value(self, scope: Scope, depth: int) -> str:
        if depth == 0:
            return self.name(scope)
        way = self.draw(st.integers(0, 9))
        if way < 2:
            return self.name(scope)
        if way < 5:
            return self.call(scope, depth - 1)
        if way < 7:
            return self.applied(scope, self.value(scope, depth - 1))
        if way < 8:
            return self.fill(scope, self.pick(SUMS), depth - 1)
        if way < 9 or scope.level > 2:
            options = [t for t in self.of(scope, OTHERWISE) if "v0" not in t or "v0" in scope.names]
            template = self.pick(options)
            return self.fill(scope, template, 0 if " for " in template else depth - 1)  # none of := may stand there
        return f"({self.pick(('v1', 'v2', 'y'))} := {self.value(scope, depth - 1)})"

    def test(self, scope: Scope) -> str:
        options = [t for t in self.of(scope, TESTS) if "i ==" not in t or scope.loop]
        options = [t for t in options if "Net" not in t or scope.asks_class]
        return str(self.pick(options)).format(v=self.name(scope), w=self.name(scope))

    # Statements -------------------------------------------------------------------------------------------------------

    def block(self, scope: Scope, most: int) -> tuple[list[str], Scope]:
        """At least one statement, indented, and the scope behind it."""
        lines: list[str] = []
        for _ in range(self.draw(st.integers(1, most))):
            new, scope = self.statement(scope)
            lines += new
        return ["    " + line for line in lines], scope

    def statement(self, scope: Scope) -> tuple[list[str], Scope]:
        self.budget -= 1
        simple = (self.assign, self.assign, self.row, self.row, self.residual, self.augmented)
        rare = (self.effect, self.unpacked, self.deleted, self.closure, self.stored, self.several)
        nested = (self.branches, self.branches, self.loop, self.within, self.attempt, self.leave)
        way = self.draw(st.integers(0, 9))
        if way < 6 or self.budget < 0:
            return self.pick(simple)(scope)
        if way < 8 or scope.level > 1:
            return self.pick(rare)(scope)
        return self.pick(nested)(scope)

    def target(self, scope: Scope) -> str:
        return self.pick(("y", "v0", "v1", "v2"))

    def assigned(self, scope: Scope, *names: str) -> Scope:
        return replace(scope, names=(*(n for n in scope.names if n not in names), *names))

    def assign(self, scope: Scope) -> tuple[list[str], Scope]:
        target, value = self.target(scope), self.value(scope, 3)
        annotated = ": torch.Tensor" if self.chance(12) else ""
        return [f"{target}{annotated} = {value}"], self.assigned(scope, target)

    def row(self, scope: Scope) -> tuple[list[str], Scope]:
        """A layer, perhaps a norm, and an activation, a statement each."""
        target = self.target(scope)
        lines = [f"{target} = {self.call(scope, 0)}"]
        if scope.is_method and self.chance(2):
            lines += [f"{target} = self.n({target})"]
        if self.chance(6):
            lines += self.effect(scope)[0]
        if self.chance(4):
            lines += [f"if {self.test(scope)}:", f"    {target} = {self.applied(scope, target)}"]
        else:
            lines += [f"{target} = {self.applied(scope, target)}"]
        return lines, self.assigned(scope, target)

    def residual(self, scope: Scope) -> tuple[list[str], Scope]:
        """A layer, a sum and an activation."""
        target, other = self.target(scope), self.value(scope, 1)
        if scope.is_method and self.chance(2):
            other = f"self.n({self.name(scope)})"
        callee = self.pick(("self.n", "self.b", *scope.callees) if scope.is_method else scope.callees)
        lines = [f"{target} = {callee}({self.name(scope)})"]
        way = self.draw(st.integers(0, 4))
        if way < 2:
            lines += [f"{target} += {other}"]
        elif way < 4:
            lines += [f"{target} = {str(self.pick(SUMS)).format(*self.draw(st.permutations((target, other))))}"]
        else:
            other = other if other in scope.names else "y"
            lines += [f"if {self.test(scope)}:", f"    {other} = {self.call(scope, 0)}"]
            lines += [f"{target} = {target} + {other}"]
        lines += [f"{target} = {self.applied(scope, target)}"]
        return lines, self.assigned(scope, target)

    def augmented(self, scope: Scope) -> tuple[list[str], Scope]:
        target = self.name(scope)
        operator = self.pick(("+=", "+=", "*=", "-="))
        return [f"{target} {operator} {self.value(scope, 1)}"], self.assigned(scope, target)

    def effect(self, scope: Scope) -> tuple[list[str], Scope]:
        template = self.pick((*EFFECTS, *EFFECTS_OF_MODULES) if scope.is_method else EFFECTS)
        if "missing" in template and not self.chance(4):
            template = "pass"
        return [template.format(v=self.name(scope), w=self.name(scope))], scope

    def unpacked(self, scope: Scope) -> tuple[list[str], Scope]:
        one, other = self.draw(st.permutations(("v0", "v1", "y")))[:2]
        way = self.draw(st.integers(0, 3))
        if way < 2:
            values = (f"{one}, {other} = {self.value(scope, 2)}", f"{one} = {other} = {self.value(scope, 2)}")[way]
            values += f", {self.value(scope, 2)}" if way == 0 else ""
            return [values], self.assigned(scope, one, other)
        if way == 2:
            return [f"{one}, *rest = [{self.value(scope, 2)}, {self.name(scope)}]"], self.assigned(scope, one)
        return [f"{one} = {self.name(scope)}"], self.assigned(scope, one)

    def deleted(self, scope: Scope) -> tuple[list[str], Scope]:
        name = self.name(scope)
        if len(scope.names) < 3 or scope.level:
            return [f"{name} = {name}"], scope
        return [f"del {name}"], replace(scope, names=tuple(n for n in scope.names if n != name))

    def closure(self, scope: Scope) -> tuple[list[str], Scope]:
        body, _ = self.block(replace(scope, names=(*scope.names, "t"), level=scope.level + 1), 2)
        target, name = self.target(scope), self.name(scope)
        start = "    v0 = v1 = v2 = y = t"  # variables of its own
        lines = ["def inner(t, scale=2.0):", start, *body, "    return y * scale", f"{target} = inner({name})"]
        return lines, self.assigned(scope, target)

    def stored(self, scope: Scope) -> tuple[list[str], Scope]:
        if not scope.is_method:
            return self.assign(scope)
        name = self.target(scope)
        first, second = self.value(scope, 2), self.value(scope, 1)
        lines = [f"self.kept = {first}", f"{name} = {second}", f"{name} = {name} + self.kept", "del self.kept"]
        return lines, self.assigned(scope, name)

    def several(self, scope: Scope) -> tuple[list[str], Scope]:
        target = self.target(scope)
        values = ", ".join(self.value(scope, 2) for _ in range(2))
        way = self.pick(COLLECTED)
        return [f"{target} = {way.format(values)}"], self.assigned(scope, target)

    def branches(self, scope: Scope) -> tuple[list[str], Scope]:
        inner = replace(scope, level=scope.level + 1)
        lines = [f"if {self.test(scope)}:", *self.block(inner, 2)[0]]
        if self.chance(4):
            lines += [f"elif {self.test(scope)}:", *self.block(inner, 2)[0]]
        if self.chance(2):
            lines += ["else:", *self.block(inner, 2)[0]]
        return lines, scope

    def loop(self, scope: Scope) -> tuple[list[str], Scope]:
        inner = replace(scope, level=scope.level + 1)
        way = self.draw(st.integers(0, 4))
        if way < 2 and scope.is_method:
            over = self.pick(LOOPS)
            name = self.name(scope)
            if way == 0:
                return [f"for layer in {over}:", f"    {name} = layer({name})"], scope
            body, _ = self.block(replace(inner, callees=(*scope.callees, "layer", "layer")), 2)
            return [f"for layer in {over}:", *body], scope
        if way == 3:
            cases = [["    " + line for line in self.block(inner, 2)[0]] for _ in range(2)]
            return [f"match {self.name(scope)}.dim():", "    case 2:", *cases[0], "    case _:", *cases[1]], scope
        body, _ = self.block(replace(inner, loop=True), 2)
        if self.chance(4):
            body += [f"    if {self.test(replace(scope, loop=True))}:", f"        {self.pick(('break', 'continue'))}"]
        if way == 2:
            return ["i = 0", "while i < 2:", "    i += 1", *body], scope
        ending = ["else:", *self.block(inner, 1)[0]] if self.chance(6) else []
        return ["for i in range(3):", *body, *ending], scope

    def within(self, scope: Scope) -> tuple[list[str], Scope]:
        context = self.pick(self.of(scope, CONTEXTS))
        body, _ = self.block(replace(scope, level=scope.level + 1), 3)
        return [f"with {context}:", *body], scope

    def attempt(self, scope: Scope) -> tuple[list[str], Scope]:
        inner = replace(scope, level=scope.level + 1)
        body, _ = self.block(inner, 3)
        if self.chance(2):
            body += ["    raise ValueError('stop')"] if self.chance(2) else [f"    {self.name(scope)}.missing"]
        if self.chance(3):
            return ["try:", *body, "finally:", *self.block(inner, 1)[0]], scope
        lines = ["try:", *body, "except (ValueError, AttributeError, RuntimeError) as error:"]
        lines += ["    SEEN.append(type(error).__name__)", *self.block(inner, 1)[0]]
        return lines + (["else:", *self.block(inner, 1)[0]] if self.chance(3) else []), scope

    def leave(self, scope: Scope) -> tuple[list[str], Scope]:
        value = self.value(scope, 2)
        ending = "raise ValueError('left')" if self.chance(8) else f"return {value}"
        return [f"if {self.test(scope)}:", f"    {ending}"], scope

    # Methods and classes ----------------------------------------------------------------------------------------------

    def method(
        self, head: str, first: str, callees: tuple[str, ...], statements: int, several: bool = False
    ) -> list[str]:
        """A function that begins with ``head``, whose argument is ``first``."""
        is_method = "self" in head
        start = self.pick(("{x} * 1", "{x}", "{x} * 2", "{x}.clone()")).format(x=first)
        lines = [
            f"    v0 = {start}",
            f"    v1 = {first} - 1",
            f"    v2 = y = {first} * 2" if self.chance(2) else f"    v2, y = {first} * 2, {first} * 3",
        ]
        self.budget = statements
        scope = Scope(("v2", "v1", "v0", "y"), callees, is_method=is_method, asks_class="step" not in head)
        for _ in range(self.draw(st.integers(1, statements))):
            new, scope = self.statement(scope)
            lines += ["    " + line for line in new]
        last = self.value(scope, 3)
        if several and self.chance(2):
            last = self.pick(("{0}, {1}", "[{0}, {1}]", "{{'a': {0}, 'b': {1}}}")).format(last, self.name(scope))
        return [head, *lines, f"    return {last}"]

    def layer(self, more: tuple[str, ...] = ()) -> str:
        way = self.draw(st.integers(0, 9))
        norm = NORM[self.kind]
        if way < 4:
            return str(self.pick(LAYERS[self.kind]))
        if way < 6:
            return str(self.pick(NORMS)).format(norm=norm)
        if way < 8:
            return str(self.pick(ACTIVATIONS))
        if way < 9:
            return str(self.pick((*OTHERS, POOL) if self.kind == "image" else OTHERS))
        row = ", ".join(self.layer() for _ in range(self.draw(st.integers(1, 3))))
        return str(self.pick((f"nn.Sequential({row})", *more)))

    def attributes(self, more: tuple[str, ...] = ()) -> list[str]:
        layers = [self.layer(more) for _ in range(self.draw(st.integers(1, 3)))]
        rows = [self.pick(LAYERS[self.kind]) if self.chance(2) else self.layer(), self.pick(ACTIVATIONS)]
        lines = [
            f"self.a = {self.pick(LAYERS[self.kind])}",
            f"self.b = {self.layer(more)}",
            f"self.c = {self.pick(('self.a', self.layer(more)))}",
            f"self.n = {str(self.pick(NORMS)).format(norm=NORM[self.kind])}",
            f"self.act = {self.pick((*ACTIVATIONS, *FUNCTIONS))}",
            f"self.layers = nn.ModuleList([{', '.join(layers)}])",
            f"self.seq = nn.Sequential({', '.join([*rows, *([self.layer()] if self.chance(2) else [])])})",
            f"self.table = nn.ModuleDict({{'x': {self.layer()}, 'y': {self.pick(ACTIVATIONS)}}})",
            f"self.absent = {self.pick(('None', self.layer()))}",
            f"self.flag = {self.pick((True, False))}",
            "self.w = nn.Parameter(torch.randn(4, 4))",
            "self.gain = nn.Parameter(torch.randn(4))",
        ]
        if "Linear(" in lines[0] and "Linear(" in lines[1] and self.chance(2):
            lines.append("self.b.weight = self.a.weight")
        return lines

    def a_class(
        self, name: str, base: str, methods: list[list[str]], attributes: list[str], others: list[list[str]]
    ) -> list[str]:
        """A class with a constructor for those ``attributes`` that its methods or the ``others`` use."""
        text = "\n".join(line for method in (*methods, *others) for line in method)
        used = list[str]()
        for line in reversed(attributes):
            own = line.partition(" = ")[0]
            if (".weight" in own and "self.b" in text) or own in text or any(f"= {own}" in other for other in used):
                used.append(line)
        init = ["def __init__(self):", "    super().__init__()", *("    " + line for line in reversed(used))]
        lines = [f"\n\nclass {name}({base}):"]
        for number, method in enumerate([init, *methods] if attributes else methods):
            lines += [""] * bool(number) + ["    " + line for line in method]
        return lines

    def file(self) -> str:
        """All but what happens to the model."""
        self.kind = self.pick(tuple(SHAPES))
        way, dtype = self.pick(WAYS)
        parts = [HEAD.format(way=way, dtype=dtype, shape=SHAPES[self.kind]), ""]
        parts += self.method("def helper(t, scale=2.0):", "t", ("F.relu", "swish", "(lambda t: t * 2)"), 2)

        argument = self.pick(("x", "input"))
        block = [self.method(f"def forward(self, {argument}):", argument, OWN, 4)]
        parts += self.a_class("Block", "nn.Module", block, self.attributes(), [])

        step = self.method("def step(self, t):", "t", OWN, 3)
        if self.chance(8):
            step = [self.pick(("@torch.no_grad()", "@torch.enable_grad()")), *step]
        base = [step, self.method("def forward(self, x):", "x", (*OWN, "self.step"), 4)]
        methods = list[list[str]]()
        if self.chance(2):
            callees = (*OWN, "super().step", "Base.step.__get__(self)")
            methods.append(self.method("def step(self, t):", "t", callees, 3))
        callees = (*OWN, "self.step", "self.step", "super().forward", "self.b", "self.chosen")
        methods.append(self.method(f"def {self.pick(HEADS)}:", "x", callees, 8, several=True))
        chosen = list(self.pick(CHOSEN))
        if any("chosen" in line for line in methods[-1]):
            methods.append(chosen)
        parts += self.a_class("Base", "nn.Module", base, self.attributes(("Block()", "Block()")), methods)
        parts += self.a_class("Net", "Base", methods, [], [])
        return "\n".join([*parts, "\n\ndef make():\n    return Net()"])

    # What happens to the model ----------------------------------------------------------------------------------------

    def edit(self, model: nn.Module) -> str:
        """A change of the model, by what there is in it."""
        path = self.pick([path for path, _ in model.named_modules()][1:] or [""])
        templates = [t for kind, some in EDITS.items() if isinstance(model.get_submodule(path), kind) for t in some]
        return self.done(self.pick(templates), path)

    def done(self, template: str, path: str) -> str:
        return template.format(m=f"model.get_submodule({path!r})", path=path, new=f"{self.layer()}.to(DTYPE)")

    def steps(self, source: str) -> str:
        """What happens to the model of this file."""
        module = load(source, "random_module_draft")
        model = module.make()
        unload(module)
        paths, hooks = [path for path, _ in model.named_modules()], list[str]()
        for _ in range(self.draw(st.integers(0, 2))):
            some = f" for m in [*model.modules()][{self.pick((1, 2, 3))}::3]"
            alone = self.chance(2)
            hook = self.done(self.pick(HOOKS), self.pick(paths)) if alone else self.pick(HOOKS).format(m="m")
            hooks.append(hook if alone else f"[{hook}{some}]")
        parts = ["\n\n\ndef prepare(model):", *(f"    {line}" for line in hooks or ["pass"])]
        steps = ["'train'", "'eval'", "'infer'"]
        for number in range(self.draw(st.integers(0, 4))):
            if self.chance(2):
                steps.append(repr(self.pick(("swap", "swap", "unswap", "deepcopy", "copy", "pickle", "report"))))
            else:
                parts.append(f"\n\ndef edit_{number}(model):\n    {self.edit(model)}")
                steps.append(f"edit_{number}")
            steps.append(repr(self.pick(("call", "train", "eval", "infer", "call 2"))))
        return "\n".join([*parts, f"\n\nSTEPS = [{', '.join(steps)}]\n"])


def load(source: str, name: str) -> Any:
    """The module of this source, whose lines are found and whose classes can be pickled, in the place of one before."""
    module = types.ModuleType(name)
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    sys.modules[name] = module
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


def unload(module: types.ModuleType) -> None:
    del sys.modules[module.__name__]


@st.composite
def sources(draw: Any) -> str:
    author = Author(draw)
    source = author.file()
    return source + author.steps(source)
