"""The calls that commands check and time, from the records in `fastops.ops`, and what torch has in an op's place."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops.functional as FF
from fastops import dispatch
from fastops.ops import Op
from fastops.ops.examples import SMALL, Example, Named, Sizes

Function = Callable[..., Tensor]


def draw(
    example: Example, sizes: Sizes, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> tuple[Named, Named]:
    """Its arguments: those to differentiate by, and constant ones. Class indices stay integers."""

    def convert(tensors: Named) -> Named:
        return {n: t.to(device, dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()}

    variables, constants = example.draw(sizes, generator)
    return convert(variables), convert(constants)


def draw_timed(example: Example, device: torch.device) -> tuple[Named, Named]:
    """Arguments in the sizes of real models, if the example is an `Op.timed` one."""
    return draw(example, SMALL, torch.default_generator, torch.float32, device)


def torch_function(op: Op) -> Function:
    """What the op must equal: torch's function, or torch's functions one after the other."""
    if op.replaces:
        return op.replaces[0]
    if op.fuses is None or len(op.fuses) > 2:
        return _expression(op)
    first, then = (getattr(F, name, None) or getattr(torch, name) for name in op.fuses)
    if op.fuses[0] == "relu":  # the options are those of what follows
        return lambda input, **options: then(first(input), **options)
    return lambda **arguments: then(first(**arguments))


def _expression(op: Op) -> Function:
    """The op's own torch expression, for want of a function of torch."""

    def call(**arguments: object) -> Tensor:
        with dispatch.backend("torch"):
            result: Tensor = getattr(FF, op.name)(**arguments)
            return result

    return call
