"""Convolution and convolution + ReLU in one, two and three dimensions.

With input x, weight w, bias b, output y, its gradient gy, and * for the convolution with all its options
(``kernels/conv.py`` has the kernels)::

    y  = relu(x * w + b)
    gz = gy where not y <= 0, else 0        (gz = gy without ReLU)
    gx = I(gz, w)    the transposed convolution
    gw = W(gz, x)    the correlation of x with gz
    gb = sum of gz over samples and positions

The Functions take the options as single numbers: where vmap derives a rule for a Function, it takes no tuples.

x * w, I and W are bilinear, and the mask does not depend on anything smoothly. So each derivative of one of them is
another one of them: d(x * w) for gz is I and W; dI for h is h * w and W(gz, h); dW for k is x * k and I(gz, k).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import conv as ops
from ..ops.conv import is_channels_last
from .function import Function, add, gradients, saved_for


class _Options(NamedTuple):
    """A convolution's geometry, and its three products as differentiable torch expressions."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, numbers: tuple[int, ...], groups: int) -> _Options:
        """From the numbers of all fields but the last, one after the other."""
        n = len(numbers) // 5  # 5 n + 4 numbers: two shapes of n + 2, three options of n
        sizes = (n + 2, n + 2, n, n, n)
        ends = itertools.accumulate(sizes)
        shapes_and_options = (numbers[end - size : end] for end, size in zip(ends, sizes, strict=True))
        return cls._make((*shapes_and_options, groups))

    @property
    def numbers(self) -> tuple[int, ...]:
        """What `of` takes."""
        return tuple(itertools.chain(*self[:-1]))

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """``x * w``"""
        zeros = (0,) * len(self.stride)
        return torch.ops.aten.convolution(
            input, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups
        )

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``I(gz, w)``"""
        # Positions at the end that no tap meets: a strided convolution gives the same output without them.
        sizes = zip(self.input_shape[2:], self.weight_shape[2:], self.stride, self.padding, self.dilation, strict=True)
        rest = [(n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in sizes]
        return torch.ops.aten.convolution(
            grad, weight, None, self.stride, self.padding, self.dilation, True, rest, self.groups
        )

    def grad_weight(self, grad: Tensor, input: Tensor) -> Tensor:
        """``W(gz, x)``"""
        shape_of_weight = grad.new_zeros(()).expand(self.weight_shape)
        zeros, mask = (0,) * len(self.stride), (False, True, False)
        options = (self.stride, self.padding, self.dilation, False, zeros, self.groups, mask)
        return torch.ops.aten.convolution_backward(grad, input, shape_of_weight, None, *options)[1]

    @staticmethod
    def grad_bias(grad: Tensor) -> Tensor:
        """Sum over everything but the channels."""
        return grad.sum((0, *range(2, grad.dim())))

    def along_channels(self, bias: Tensor) -> Tensor:
        """[O] -> [O, 1, ...], to be added to an output."""
        return bias.reshape(-1, *(1,) * len(self.stride))


def _mask(grad: Tensor, output: Tensor | None) -> Tensor:
    return grad if output is None else torch.where(output <= 0, 0, grad)


@torch.compiler.allow_in_graph
class ConvBackward(Function):
    """``(gx, gw, gb)`` as differentiable functions of ``(gy, x, w)``; what is not needed is an empty tensor."""

    raw = ops.conv_backward

    @staticmethod
    def raw_arguments(
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        output: Tensor | None,
        need_bias: bool,
        channels_last: bool,
        backend: str,
        groups: int,
        *numbers: int,
    ) -> tuple[Any, ...]:
        options = _Options.of(numbers, groups)
        return grad_output, input, weight, output, *options, need_bias, channels_last, backend

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.set_materialize_grads(False)
        ctx.need_bias = inputs[4]
        ctx.options = _Options.of(inputs[8:], inputs[7])

    @staticmethod
    def backward(ctx: Any, gg_input: Tensor | None, gg_weight: Tensor | None, gg_bias: Tensor | None) -> Any:
        grad_output, input, weight, output = ctx.saved_tensors
        options = ctx.options
        gz = _mask(grad_output, output)
        grad_gz = add(
            None if gg_input is None else options.output(gg_input, weight),
            None if gg_weight is None else options.output(input, gg_weight),
            None if gg_bias is None else options.along_channels(gg_bias),
        )
        return (
            None if grad_gz is None else _mask(grad_gz.expand_as(gz), output),
            None if gg_weight is None else options.grad_input(gz, gg_weight),
            None if gg_input is None else options.grad_weight(gz, gg_input),
            *(None,) * (5 + len(options.numbers)),
        )

    @staticmethod
    def jvp(
        ctx: Any, t_grad_output: Tensor | None, t_input: Tensor | None, t_weight: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_output, input, weight, output = ctx.saved_tensors
        options = ctx.options
        gz = _mask(grad_output, output)
        t_gz = torch.zeros_like(gz) if t_grad_output is None else _mask(t_grad_output, output)
        absent = gz.new_zeros(0)
        t_grad_input = t_grad_weight = absent
        if weight is not None:
            t_grad_input = options.grad_input(t_gz, weight)
            if t_weight is not None:
                t_grad_input = t_grad_input + options.grad_input(gz, t_weight)
        if input is not None:
            t_grad_weight = options.grad_weight(t_gz, input)
            if t_input is not None:
                t_grad_weight = t_grad_weight + options.grad_weight(gz, t_input)
        return t_grad_input, t_grad_weight, options.grad_bias(t_gz) if ctx.need_bias else absent


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    tensors = (grad_output, input if needs[1] else None, weight if needs[0] else None, output)
    options = (needs[2], ctx.channels_last, ctx.backend, ctx.options.groups, *ctx.options.numbers)
    return (*gradients(ConvBackward, needs, *tensors, *options), *(None,) * ctx.constants)


def _jvp(ctx: Any, t_input: Tensor | None, t_weight: Tensor | None, t_bias: Tensor | None, *_: Any) -> Tensor:
    input, weight, output = ctx.saved_tensors
    options = ctx.options
    tangent = add(
        None if t_input is None else options.output(t_input, weight),
        None if t_weight is None else options.output(input, t_weight),
        None if t_bias is None else options.along_channels(t_bias),
    )
    assert tangent is not None
    return _mask(tangent.expand(ctx.output_shape), output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor, saved_output: Tensor | None) -> None:
    input, weight, _, ctx.backend, groups, *numbers = inputs
    ctx.options = _Options.of((*input.shape, *weight.shape, *numbers), groups)
    ctx.constants = len(inputs) - 3
    ctx.channels_last = is_channels_last(input, weight)
    ctx.output_shape = output.shape
    needs_input, needs_weight = saved_for(ctx)
    ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, saved_output)
    ctx.save_for_forward(input, weight, saved_output)


def _by_option(numbers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Stride, padding, dilation."""
    n = len(numbers) // 3
    return numbers[:n], numbers[n : 2 * n], numbers[2 * n :]


@torch.compiler.allow_in_graph
class Conv(Function):
    """``x * w + b``: [N, C, ...], [O, C / groups, ...], [O] -> [N, O, ...].

    ``numbers``: stride, padding and dilation, each for all dimensions.
    """

    raw = ops.conv

    @staticmethod
    def raw_arguments(
        input: Tensor, weight: Tensor, bias: Tensor | None, backend: str, groups: int, *numbers: int
    ) -> tuple[Any, ...]:
        return input, weight, bias, *_by_option(numbers), groups, False, backend

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output, None)

    backward = staticmethod(_backward)
    jvp = staticmethod(_jvp)


@torch.compiler.allow_in_graph
class ConvReLU(Function):
    """``relu(x * w + b)``: see `Conv`."""

    raw = ops.conv

    @staticmethod
    def raw_arguments(
        input: Tensor, weight: Tensor, bias: Tensor | None, backend: str, groups: int, *numbers: int
    ) -> tuple[Any, ...]:
        return input, weight, bias, *_by_option(numbers), groups, True, backend

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output, output)

    backward = staticmethod(_backward)
    jvp = staticmethod(_jvp)
