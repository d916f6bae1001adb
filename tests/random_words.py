"""The words that `random_modules` writes with: how a file begins; layers, expressions, statements, hooks and edits.

The first of a table is the simplest. In a template ``{v}`` and ``{w}`` are values, ``{m}`` is a module and ``{new}`` a
layer made for it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

HEAD = """\
import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import silu as swish

WAY, DTYPE, SHAPE = {way!r}, torch.{dtype}, {shape}
SEEN = []  # what happened, in order


def see(value):
    SEEN.append(value.detach().clone())
    return value


class Region:
    def __enter__(self):
        SEEN.append("enter")

    def __exit__(self, *_):
        SEEN.append("exit")


def doubled(module, inputs, output):
    return output * 2


def noted(module, inputs, output):
    SEEN.append((type(module).__name__, output.detach().clone()))


def shifted(module, inputs):
    return (inputs[0] + 1, *inputs[1:])


def halved(module, grad_inputs, grad_outputs):
    return tuple(None if gradient is None else gradient / 2 for gradient in grad_inputs)


def tripled(module, grad_outputs):
    return tuple(None if gradient is None else gradient * 3 for gradient in grad_outputs)


def hook_once(module):
    def hook(module, inputs, output):
        SEEN.append("once")
        handle.remove()

    handle = module.register_forward_hook(hook)


class Bare(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)


class Halving(Bare):
    def forward(self, input):
        return super().forward(input) / 2


class Noting(nn.ReLU):
    def forward(self, input):
        return see(super().forward(input))
"""

# Backend and dtype. "torch" is eager to the last bit; the others round differently where they fold or mask.
WAYS = (("torch", "float64"), ("torch", "float64"), ("torch", "float32"), ("auto", "float64"), ("onednn", "float64"))
SHAPES = {"rows": "(4,)", "signal": "(4, 4)", "image": "(4, 3, 4)"}
NORM = {"rows": "nn.BatchNorm1d", "signal": "nn.BatchNorm1d", "image": "nn.BatchNorm2d"}
POOL = "nn.MaxPool2d(3, 1, 1)"


def table(text: str) -> tuple[str, ...]:
    """What stands between bars, the simplest first: what fails shrinks to it. Often means twice."""
    return tuple(" ".join(part.split()) for part in text.split("|"))


# Constructors.
LAYERS = {
    "rows": table(
        """
        nn.Linear(4, 4) | nn.Linear(4, 4, bias=False) | Bare() | Halving() |
        nn.Linear(in_features=4, out_features=4)
        """
    ),
    "signal": table(
        """
        nn.Conv1d(4, 4, 1) | nn.Conv1d(4, 4, 3, padding=1, bias=False) | nn.Linear(4, 4) |
        nn.Conv1d(4, 4, 3, padding=1, padding_mode='circular')
        """
    ),
    "image": table(
        """
        nn.Conv2d(4, 4, 1) | nn.Conv2d(4, 4, 1, bias=False) | nn.Conv2d(4, 4, 3, padding='same', groups=4) |
        nn.Linear(4, 4)
        """
    ),
}
NORMS = table(
    """
    {norm}(4) | {norm}(4) | {norm}(4, affine=False) | {norm}(4, momentum=None) |
    {norm}(4, track_running_stats=False)
    """
)
ACTIVATIONS = table(
    """
    nn.ReLU() | nn.ReLU() | nn.ReLU(inplace=True) | nn.GELU() | nn.GELU('tanh') | nn.SiLU() |
    nn.SiLU(inplace=True) | nn.ReLU6() | nn.LeakyReLU(0.2) | nn.Sigmoid() | nn.Tanh() | nn.Hardswish() |
    nn.Hardsigmoid() | nn.ELU(0.5) | nn.Softplus(2.0) | nn.Mish() | nn.CELU() | nn.PReLU() | Noting() |
    nn.Hardtanh(0, 6)
    """
)
OTHERS = table(
    """
    nn.Identity() | nn.Identity() | nn.Dropout(0.5) | nn.LayerNorm(4) | nn.GroupNorm(2, 4)
    """
)
# Functions in the place of an activation.
FUNCTIONS = table(
    """
    F.relu | torch.relu | F.silu | torch.sigmoid | F.gelu | torch.tanh | F.mish |
    functools.partial(F.relu, inplace=False)
    """
)
# How a value is activated: as it is, and in place.
APPLIED = table(
    """
    F.relu({}) | F.relu({}) | torch.relu({}) | ({}).relu() | F.relu({}, False) | F.relu(input={}) | swish({}) |
    F.gelu({}, approximate='tanh') | F.leaky_relu({}, 0.2) | F.leaky_relu({}, negative_slope=0.3) |
    F.elu({}, alpha=0.5) | F.softplus({}, 2, 20) | F.hardtanh({}, 0, 6) | F.hardtanh({}) | torch.sigmoid({}) |
    ({}).sigmoid() | ({}).tanh() | F.silu({}) | F.mish({}) | F.hardswish({}) | F.relu6({}) | F.celu({}) |
    nn.ReLU()({}) | ({}).clamp(min=0)
    """
)
IN_PLACE = table(
    """
    F.relu({}, inplace=True) | F.relu({}, True) | torch.relu_({}) | ({}).relu_() | F.relu_({}) |
    F.silu({}, inplace=True) | F.leaky_relu({}, 0.2, True) | ({}).tanh_() | F.hardtanh({}, 0, 6, inplace=True) |
    ({}).sigmoid_()
    """
)
# What else makes values of values.
OTHERWISE = table(
    """
    ({}) * 2 | -({}) | ({}).clone() | ({}).contiguous() | ({}).detach() | ({}) - 1 | 2 * ({}) | ({}).view_as({}) |
    F.dropout({}, 0.5, self.training) | F.linear({}, self.w) | F.linear(weight=self.w, input={}) | see({}) |
    torch.stack([{}, {}]).mean(0) | torch.cat([{}, {}])[: len(v0)] | ({}).mul(0.5) | ({}) * self.gain |
    [{}, {}][1] | ({} if self.flag else {}) | ({} if self.training else {}) |
    {norm}({}, None, None, training=True) | ({}).mul_(0.5) | (lambda t: self.act(self.a(t)))({}) |
    (lambda t=v0: {})() | ({}) + torch.rand(4).to(v0) | sum(f({}) for f in self.layers) |
    [self.act(self.a(t)) for t in ({}, {})][0] | (lambda *t: t[-1])({}, {}) |
    functools.reduce(lambda t, f: f(t), self.layers, {}) | max(({}, {}), key=len) | self.a(*[{}]) |
    self.a(**dict(input={}))
    """
)
SUMS = table(
    """
    ({}) + ({}) | ({}) + ({}) | torch.add({}, {}) | ({}).add({}) | torch.add({}, {}, alpha=2) | ({}) + 1 |
    ({}) - ({})
    """
)
# Of values `{v}` and `{w}`.
TESTS = table(
    """
    self.flag | self.training | not self.training | self.absent is not None | {v}.shape[0] > 2 | {v}.dim() == 2 |
    {v}.sum() > 0 | torch.is_grad_enabled() | {v}.requires_grad | isinstance(self.a, nn.Linear) | {v} is {w} |
    i == 1 | type(self) is Net | hasattr(self, 'extra') | self.flag and not self.training | len({v}) > 2 |
    self.__class__ is Net | self.n.num_batches_tracked > 1 | self.a | getattr(self, 'flag', None) |
    {v}.size(0) == {w}.size(0)
    """
)
CONTEXTS = table(
    """
    torch.no_grad() | torch.enable_grad() | torch.set_grad_enabled(self.training) |
    contextlib.suppress(ValueError) | Region() | torch.autocast('cpu', dtype=torch.bfloat16) |
    contextlib.nullcontext()
    """
)
# Statements: of anything, and of a module.
EFFECTS = table(
    """
    pass | see({v}) | {v}.relu_() | {v}.mul_(2) | torch.rand(1) | SEEN.append(len({v})) | assert len({v}) | {v}[0] = 0 |
    ({v}, {w}) | {v} > {w}
    """
)
EFFECTS_OF_MODULES = table(
    """
    self.a({v}) | self.n({v}) | self.act({v}) | z = self.flag | z = self.a | z = {v}.shape | z = self.n.running_mean |
    z = self.n.num_batches_tracked | self.missing
    """
)
LOOPS = table(
    """
    self.layers | self.seq | self.table.values() | self.layers[:1] | [self.a, self.act] | reversed(self.layers)
    """
)
COLLECTED = table(
    """
    sum([{}]) | [{}][-1] | dict(zip('ab', [{}]))['a'] | max([{}], key=len) | torch.stack([{}]).sum(0)
    """
)
# What modules call, and how they are called.
OWN = table(
    """
    self.a | self.a | self.b | self.c | self.n | self.n | self.layers[0] | self.layers[-1] | self.seq | self.seq[0] |
    self.table['x'] | helper
    """
)
HEADS = table(
    """
    forward(self, x) | forward(self, x, scale=2.0) | forward(self, x, *, flag=None) |
    forward(self, x, *rest, **options)
    """
)
CHOSEN = (
    ("def chosen(self, t):", "    return self.act(self.a(t))"),
    ("@property", "def chosen(self):", "    return self.a"),
    ("@property", "def chosen(self):", "    SEEN.append('chosen')", "    return self.act"),
    ("@staticmethod", "def chosen(t):", "    return F.relu(t) * 2"),
    ("@classmethod", "def chosen(cls, t):", "    SEEN.append(cls.__name__)", "    return F.relu(t)"),
)
# What happens to a module `{m}` of the model at `{path}`, with a `{new}` one.
HOOKS = table(
    """
    {m}.register_forward_hook(doubled) | {m}.register_forward_hook(noted) | {m}.register_forward_pre_hook(shifted) |
    hook_once({m}) | {m}.register_full_backward_hook(halved) | {m}.register_full_backward_pre_hook(tripled)
    """
)
EDITS: dict[Any, tuple[str, ...]] = {
    nn.Module: table(
        """
        model.flag = not getattr(model, 'flag', True) | {m}.requires_grad_(False) | {m}.eval() | model.train() |
        {m}.forward = torch.tanh | model.act = nn.GELU() | model.act = torch.tanh | model.absent = {new} |
        model.extra = 1 | model.set_submodule({path!r}, {new}) | model.set_submodule({path!r}, {new}) |
        model.set_submodule({path!r}, nn.Identity()) | [p.data.mul_(0.5) for p in model.parameters()] |
        model.load_state_dict({{k: v * 2 for k, v in model.state_dict().items()}}) | Net.step = lambda self, t: t * 2 |
        globals().update(helper=torch.tanh) | Block.forward = lambda self, x: self.a(x).relu() | model.zero_grad()
        """
    )
    + HOOKS,
    nn.modules.batchnorm._BatchNorm: table(
        """
        {m}.momentum = None | {m}.reset_running_stats() | {m}.track_running_stats = False | {m}.eps = 0.1 | {m}.eval()
        """
    )
    * 2,
    nn.Linear: table(
        """
        nn.utils.parametrizations.weight_norm({m}) | nn.utils.prune.l1_unstructured({m}, 'weight', 0.5) |
        {m}.weight = nn.Parameter({m}.weight.detach() * 2) | {m}.bias = None
        """
    ),
    nn.ReLU: ("{m}.inplace = not {m}.inplace",) * 3,
    (nn.Sequential, nn.ModuleList): table(
        "{m}.append({new}) | {m}.insert(0, {new}) | {m}[0] = {new} | del {m}[0] | {m}.pop(-1)"
    )
    * 3,
    nn.ModuleDict: table("{m}.update({{'x': {new}}}) | {m}['z'] = {new} | del {m}['y']") * 3,
}
