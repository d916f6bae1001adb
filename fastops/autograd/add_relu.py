"""Sum with ReLU: ``y = relu(a + b)``, both gradients ``gy where not y <= 0, else 0``.

The mask does not depend on anything smoothly, so that gradient is linear in gy: where it may be differentiated again it
is the torch expression, and no Function of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import add_relu as ops
from .function import Function, add


@torch.compiler.allow_in_graph
class AddReLU(Function):
    """``relu(a + b)`` of two tensors of one shape."""

    raw = ops.add_relu

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend = inputs[2]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
        else:
            grad = ops.add_relu_backward.op(grad_output, output, ctx.backend)
        return *(grad if needed else None for needed in ctx.needs_input_grad[:2]), None

    @staticmethod
    def jvp(ctx: Any, t_input: Tensor | None, t_other: Tensor | None, _: None) -> Tensor:
        (output,) = ctx.saved_tensors
        tangent = add(t_input, t_other)
        assert tangent is not None
        return torch.where(output <= 0, 0, tangent)
