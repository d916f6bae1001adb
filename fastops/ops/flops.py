"""What `torch.utils.flop_counter.FlopCounterMode` counts for raw ops: as many as for the torch expression.

Importing that module takes longer than all of fastops. So it is told when a raw op first meets the dispatcher after
somebody imported it: the table for all counters to come, and the counters that count already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import private

Formula = Callable[..., int]

formulas: dict[Any, Formula] = {}  # by the raw op, without its overload


def tell_counters() -> None:
    """Make the formulas known to whoever counts."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = [getattr(mode, "counter", None) for mode in private.dispatch_modes()]
    for table in (module, *counters):
        for op, formula in formulas.items():
            getattr(table, "flop_registry", formulas).setdefault(op, formula)


def product(input: Any, weight: Any, *_: Any, out_val: Any) -> int:
    """Of [..., K] x [N, K]."""
    return int(2 * input.numel() * weight.shape[0])


def product_backward(grad_output: Any, input: Any, weight: Any, output: Any, *rest: Any, out_val: Any) -> int:
    need_input, need_weight, *_ = rest
    features = (weight if need_input else input).shape[-1] if need_input or need_weight else 0
    return int(2 * grad_output.numel() * features * (need_input + need_weight))


def convolution(input: Any, weight: Any, *_: Any, out_val: Any) -> int:
    from torch.utils.flop_counter import conv_flop_count

    return int(conv_flop_count(input.shape, weight.shape, out_val.shape))


def convolution_backward(grad_output: Any, input: Any, weight: Any, output: Any, *rest: Any, out_val: Any) -> int:
    from torch.utils.flop_counter import flop_registry

    input_shape, weight_shape, stride, padding, dilation, groups, _, *needs, _ = rest
    shapes, options = (input_shape, weight_shape), (stride, padding, dilation, False, [0], groups, needs)
    torchs: Any = flop_registry[torch.ops.aten.convolution_backward]
    return int(torchs(grad_output.shape, *shapes, None, *options, out_val=(*shapes, None)))


def head(input: Any, weight: Any, *_: Any, out_val: Any) -> int:
    return int(2 * input.shape[0] * weight.numel())


def head_backward(grad_output: Any, input: Any, weight: Any, *rest: Any, out_val: Any) -> int:
    need_input, need_weight, *_ = rest[-5:]
    return head(input, weight, out_val=None) * (need_input + need_weight)
