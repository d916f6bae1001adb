"""Products with any activation behind them, each made of the record of the product: `linear_act` and `conv_act2d`.

A call is the product's with the activation at its end. What it was before the activation is a second result of the raw
op if the slope is had from that alone and a gradient may be wanted, else empty. With z the product and gy the gradient
of the output, ``gz = gy f'(z)`` is what the backward pass of the product gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.activation import NONE, RELU, Activation, needs_input
from . import activations
from .accepts import Tensors
from .examples import Example
from .op import Op

Launchers = tuple[Callable[..., Tensor], Callable[..., Tensors]]


class _Backward(NamedTuple):
    """What a backward pass is called with: ``again`` are the arguments of the product, ``rest`` what comes last in its
    own backward pass. Without ``saved``, which is empty then, a graph was captured where no gradient was wanted."""

    activation: Activation
    again: tuple[Any, ...]
    grad_output: Tensor
    operands: Tensors
    saved: Tensor
    rest: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor,
        *rest: Any,
    ) -> _Backward:
        *options, name, parameters, need_input, need_weight, need_bias = rest
        again = input, weight, bias, *options[2:]  # of a convolution without the shapes
        operands = input if need_weight else None, weight if need_input else None
        needs = need_input, need_weight, need_bias
        return cls((name, *parameters), again, grad_output, operands, saved, (*options, *needs))


def with_activation(
    name: str,
    product: Op,
    with_relu: Op,
    *,
    load: Callable[..., Launchers],
    differentiable: Callable[..., Tensor],
    shape: Callable[..., tuple[int, ...]],
    channels: int,
    names: Sequence[str],
    timed: Sequence[Example] = (),
) -> Op:
    """The record of ``product`` with an activation.

    Args:
        name: its own.
        product, with_relu: the records of the product alone, and with ReLU.
        load: the launchers of both passes: of the forward pass of an activation, and maybe of ``before`` to write to;
            the backward pass takes ``activation`` as a keyword.
        differentiable: the product as a differentiable function of the raw arguments.
        shape: of its result, of the raw arguments, the channels last: so it lies in memory before the activation.
        channels: which dimension of the result they are.
        names: of activations, examples beside GELU.
        timed: its examples to time.
    """

    def raw_arguments(way: str, *call: Any) -> tuple[Any, ...]:
        *call_of_product, (kind, *parameters) = call
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:3])
        raw = call_of_product if product.raw_arguments is None else product.raw_arguments(way, *call_of_product)
        return *raw, kind, parameters, wanted and needs_input((kind, *parameters))

    def accepts(*call: Any) -> str | None:
        if not all(isinstance(parameter, (int, float)) for parameter in call[-1][1:]):
            return "a parameter of the activation is no number"
        return product.accepts(*call[:-1])

    def expression(*call: Any) -> Tensor:
        *call_of_product, activation = call
        if activation == RELU:
            return with_relu.expression(*call_of_product)
        return activations.applied(activation, product.expression(*call_of_product))

    def empty_before(save: bool, input: Tensor, *raw: Any) -> Tensor:
        return input.new_empty(shape(input, *raw)).movedim(-1, channels) if save else input.new_empty(0)

    def load_both() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
        def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
            *raw, kind, parameters, save = arguments
            before = empty_before(save, *raw)
            launch, _ = load((kind, *parameters), before=before if save else None)
            return launch(*raw), before

        def backward(*arguments: Any, **vendor: bool) -> Tensors:
            activation, again, grad_output, operands, saved, rest = _Backward.of(*arguments)
            launch, launch_backward = load(NONE)
            if not saved.numel():
                saved = launch(*again)
            return launch_backward(grad_output, *operands, saved, *rest, activation=activation, **vendor)

        return forward, backward

    def plain(*arguments: Any) -> tuple[Tensor, Tensor]:
        *raw, kind, parameters, save = arguments
        z = product.plain(*raw)
        before = z.movedim(channels, -1).contiguous().movedim(-1, channels) if save else z.new_empty(0)
        return activations.applied((kind, *parameters), z), before

    def plain_backward(*arguments: Any) -> Tensors:
        activation, again, grad_output, operands, saved, rest = _Backward.of(*arguments)
        gz = activations.before(activation, grad_output, saved if saved.numel() else product.plain(*again))
        return (product.plain_backward or product.gradients)(gz, *operands, None, *rest)

    def gradients(*arguments: Any) -> Tensors:
        activation, again, grad_output, operands, saved, rest = _Backward.of(*arguments)
        if needs_input(activation):  # what was saved has no derivatives
            saved = differentiable(*again)
        return product.gradients(activations.before(activation, grad_output, saved), *operands, None, *rest)

    def save(needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], results: Any) -> tuple[Tensors, Any]:
        *raw, kind, parameters, _ = arguments
        output, before = results
        (input, weight, _), options = product.save(needs, product, tuple(raw), output)
        options = *options, kind, parameters
        if needs_input((kind, *parameters)):  # all that a second derivative wants
            return (*raw[:3], before), options
        return (input, weight, None, output), options

    def fake(*arguments: Any) -> tuple[Tensor, Tensor]:
        *raw, _, _, save, way = arguments
        return product.fake(*raw, way), empty_before(save, *raw)

    def fake_backward(*arguments: Any) -> Tensor | Sequence[Tensor]:
        _, _, grad_output, operands, _, rest = _Backward.of(*arguments[:-1])
        return product.fake_backward(grad_output, *operands, None, *rest, arguments[-1])

    def flops(*arguments: Any, out_val: Any) -> int:
        return product.flops[0](*arguments, out_val=out_val[0])

    def flops_backward(*arguments: Any, out_val: Any) -> int:
        _, _, grad_output, operands, _, rest = _Backward.of(*arguments[:-1])
        return product.flops[1](grad_output, *operands, None, *rest, arguments[-1], out_val=out_val)

    def examples() -> Iterator[Example]:
        for example in product.examples:
            yield example._replace(options={**example.options, "activation": "gelu"})
        for other in names:
            first = product.examples[0]
            yield first._replace(name=other, options={**first.options, "activation": other})

    return Op(
        name=name,
        accepts=accepts,
        cpu=with_relu.cpu,
        gpu=lambda *call: with_relu.gpu(*call[:-1]),
        saved_bytes=lambda *call: with_relu.saved_bytes(*call[:-1]),
        onednn=True,
        autocast=product.autocast,
        expression=expression,
        gradients=gradients,
        load=load_both,
        plain=plain,
        plain_backward=plain_backward,
        schema=product.schema.replace(
            " -> Tensor", ", str activation, float[] parameters, bool save_before -> (Tensor, Tensor)"
        ),
        backward_schema=product.backward_schema.replace("Tensor? output", "Tensor? bias, Tensor saved").replace(
            "bool need_input", "str activation, float[] parameters, bool need_input"
        ),
        fake=fake,
        fake_backward=fake_backward,
        tensors=3,
        variables=3,
        raw_arguments=raw_arguments,
        finish=product.finish,
        flops=(flops, flops_backward),
        save=save,
        examples=tuple(examples()),
        timed=[example._replace(options={**example.options, "activation": "gelu"}) for example in timed],
    )
