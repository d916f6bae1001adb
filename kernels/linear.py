"""Linear layer, optionally with an activation f: a matrix product and one pass over the output gradient.

With input ``x`` [M, K], weight ``w`` [N, K] and bias ``b`` [N]::

    y  = f(z), z = x w^T + b                 forward:     matmul, bias and activation in the epilogue
    gz = gy f'(z)                            activation_backward: gz and the partial sums of gb in one pass
    gx = gz w,   gw = gz^T x,   gb = sum over rows of gz

Both backward products are the forward's again, on transposed views. Masking inside the products would read less but
would starve the matrix units (the mask would run in the inner loop of both), so it is a pass of its own.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .activation import NONE, RELU, Activation
from .activation_backward import MaskPlan, activation_backward, mask_and_sum, mask_plan
from .configs import Kind, planned
from .launch import input_precision, launch, reshaped
from .matmul import ProductPlan, multiply, product_plan

Operands: TypeAlias = tuple[tuple[int, int, int], tuple[tuple[int, ...], tuple[int, ...]], bool]  # of `product_plan`


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, before: Tensor | None = None
) -> Tensor:
    """``activation(input @ weight.T + bias)``: [..., K], [N, K], [N] -> [..., N], no dimension empty.

    What it was before the activation is written to ``before`` if given: contiguous, in the result's shape.
    """
    N, K = weight.shape
    output = input.new_empty((*input.shape[:-1], N))
    matrix, columns = input.reshape(-1, K), weight.t()
    aligned = (matrix.data_ptr() | weight.data_ptr() | output.data_ptr()) % 16 == 0
    if before is not None:
        aligned = aligned and before.data_ptr() % 16 == 0
    kind, strides = (input.device, input.dtype, input_precision(input)), (matrix.stride(), columns.stride())
    epilogue = bias is not None, activation, before is not None
    plan = product_plan(kind, (matrix.shape[0], N, K), strides, aligned, epilogue)
    if plan.single:
        other = output if before is None else before
        launch(plan.product, matrix, columns, output if bias is None else bias.contiguous(), output, other)
    else:
        multiply(plan, matrix, columns, bias, output, before)
    return output


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    need_bias: bool,
    activation: Activation = RELU,
    *,
    vendor: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``saved``: what the slope of the activation is had from, None without one. ``vendor``: the products are torch's,
    from the GPU vendor's library, and only what comes before them is a kernel.
    """
    lead, N = grad_output.shape[:-1], grad_output.shape[-1]
    grad = grad_output.reshape(-1, N)
    saved = None if saved is None else saved.reshape(-1, N)
    matrix = None if input is None else input.reshape(-1, input.shape[-1])
    grad_input = grad_weight = None
    if vendor:
        masked, grad_bias = activation_backward(grad, saved, need_bias, activation)
        if weight is not None:
            grad_input = reshaped(torch.mm(masked, weight), (*lead, weight.shape[1]))
        if matrix is not None:
            grad_weight = torch.mm(masked.t(), matrix)
        return grad_input, grad_weight, grad_bias

    masked = grad if saved is None else grad.new_empty(grad.shape)
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    if weight is not None:
        grad_input = grad.new_empty((*lead, weight.shape[1]))
        products.append((masked, weight, grad_input))
    if matrix is not None:
        grad_weight = grad.new_empty((N, matrix.shape[1]))
        products.append((masked.t(), matrix, grad_weight))
    operands: list[Operands] = []
    for a, b, c in products:
        aligned = (a.data_ptr() | b.data_ptr() | c.data_ptr()) % 16 == 0
        operands.append(((a.shape[0], b.shape[1], a.shape[1]), (a.stride(), b.stride()), aligned))
    kind = grad.device, grad.dtype, input_precision(grad)
    through = NONE if saved is None else activation
    mask, plans = backward_plan(kind, grad.shape, grad.stride(), through, need_bias, tuple(operands))
    grad_bias = mask_and_sum(mask, grad, saved, masked)
    for plan, (a, b, c) in zip(plans, products, strict=True):
        multiply(plan, a, b, None, c)
    return grad_input, grad_weight, grad_bias


@planned
def backward_plan(
    kind: Kind,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    activation: Activation,
    need_bias: bool,
    operands: tuple[Operands, ...],
) -> tuple[MaskPlan, list[ProductPlan]]:
    """`linear_backward` of a gradient with this shape and these strides: the mask and sum, and each of the products."""
    return mask_plan(kind[:2], shape, strides, activation, need_bias), [product_plan(kind, *each) for each in operands]
