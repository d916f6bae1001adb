"""Batch norm with ReLU or any activation, maybe after a sum: ``kernels/batch_norm_device.py`` has the formulas.

A call is ``(input, other, running_mean, running_var, weight, bias, training, momentum, eps)``, ``other`` being the
second summand or None, and the activation unless that is ReLU. Of a raw op the statistics to use come apart from those
to change: of these there are none in evaluation, so that a compiler knows what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import private
from ..kernels.activation import RELU, Activation, needs_input
from ..kernels.geometry import CHANNELS_LAST, Columns, memory_format_of
from . import activations
from .accepts import Tensors, mismatch
from .examples import Audit, Example, Named, Sizes
from .op import Op, passes, wanted

PASSES: Final = 12  # that kernels save, as an H100 took so much less time than by ATen's

# By name: a lookup through modules at each call adds up.
_is_grad_enabled: Final = torch.is_grad_enabled
_transforms_active: Final = private.transforms_active


def _accepts(
    input: Tensor,
    other: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation = RELU,
) -> str | None:
    if (unfit := mismatch(input) if other is None else mismatch(input, other)) is not None:
        return unfit
    if not all(isinstance(parameter, (int, float)) for parameter in activation[1:]):
        return "a parameter of the activation is no number"
    if input.dim() < 2:
        return "input has no channels"
    per_channel = [each for each in (running_mean, running_var, weight, bias) if each is not None]
    if per_channel:
        if (unfit := mismatch(*per_channel)) is not None:
            return unfit
        dtype = per_channel[0].dtype
        if per_channel[0].device != input.device:
            return "tensors are on different devices"
        if dtype is not input.dtype and (dtype is not torch.float32 or input.dtype.itemsize != 2):
            return "parameters and statistics have neither the input's dtype nor, beside 16 bits, float32"
        for each in per_channel:
            if each.shape != input.shape[1:2]:
                return "a parameter or a statistic does not have one element per channel"
            if not each.is_contiguous():
                return "a parameter or a statistic is not contiguous"
    if not (type(training) is bool and isinstance(momentum, (int, float)) and isinstance(eps, (int, float))):
        return "training, momentum or eps is of a wrong type"
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return "a running statistic is missing"
    if running_mean is not None and running_var is not None:
        if running_mean.requires_grad or running_var.requires_grad:
            return "a running statistic requires a gradient"
        if training and running_mean is running_var:
            return "the running statistics are one tensor"
    if eps < 0 or (training and (eps == 0 or input.shape[1] == input.numel())):
        return "eps is not positive, or there is one value per channel"
    if other is not None:
        if other.shape != input.shape:
            return "the shapes differ"
        if not other.is_contiguous(memory_format=memory_format_of(input)):
            return "the memory formats differ"
    return None


# Computation ----------------------------------------------------------------------------------------------------------


def _expression(
    input: Tensor,
    other: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation = RELU,
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if other is not None:
        same = other.dtype is output.dtype and other.stride() == output.stride() and other.shape == output.shape
        # A transform may batch the one and not the other.
        output = output.add_(other) if same and not _transforms_active() else output + other
    return output.relu_() if activation == RELU else activations.applied(activation, output)


def _raw_arguments(
    way: str,
    input: Tensor,
    other: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation = RELU,
) -> tuple[Any, ...]:
    save_bits = other is not None and _is_grad_enabled() and activation == RELU
    if save_bits:
        last = memory_format_of(input) is not torch.contiguous_format
        save_bits = Columns.of(input.shape, last, training, input.dtype).row() % 8 == 0
    if save_bits:
        save_bits = any(each is not None and each.requires_grad for each in (input, other, weight, bias))
    statistics = (None, None, running_mean, running_var) if training else (running_mean, running_var, None, None)
    name, *parameters = activation
    return input, other, weight, bias, *statistics, float(momentum), float(eps), name, parameters, save_bits


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the kernels' statistics: float64, float32 beside 16 bits."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _plain(
    input: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    name: str,
    parameters: list[float],
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = _exact(input.dtype)
    training = mean is None
    statistics = (running_mean, running_var) if training else (mean, var)
    output = _expression(input, other, *statistics, weight, bias, training, momentum, eps, (name, *parameters))
    bits = _packed(~(output <= 0)) if save_bits else input.new_empty(0, dtype=torch.uint8)
    if not training:
        return output, input.new_empty(0, dtype=exact), input.new_empty(0, dtype=exact), bits
    dimensions = [dim for dim in range(input.dim()) if dim != 1]
    variance, mean = torch.var_mean(input.to(exact), dimensions, correction=0)
    return output, mean, (variance + eps).rsqrt(), bits


def _packed(flags: Tensor) -> Tensor:
    """A bit for each element of a dense tensor, in the order that they have in memory."""
    values = 1 << torch.arange(8, device=flags.device)
    return (flags.as_strided((flags.numel() // 8, 8), (8, 1)) * values).sum(1).to(torch.uint8)


def _save(
    needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Tensors, tuple[Any, ...]]:
    input, other, weight, bias, mean, var, _, _, _, eps, name, parameters, _ = arguments
    output, own_mean, spread, bits = results
    training, last = mean is None, memory_format_of(input) is not torch.contiguous_format
    statistics = (own_mean, spread) if training else (mean, var)
    # For the slope. Kernels need the output seldom; kept, it is an error to change it, as of torch's ReLU.
    kept = (other, None) if needs_input((name, *parameters)) else (None, output)
    saved = input, kept[0], weight, bias, *statistics, kept[1], bits
    return saved, (training, eps, other is not None, last, name, parameters)


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    output: Tensor | None,
    bits: Tensor,
    training: bool,
    eps: float,
    residual: bool,
    channels_last: bool,
    name: str,
    parameters: list[float],
    *needs: bool,
) -> Tensors:
    exact, activation = _exact(input.dtype), (name, *parameters)
    x, mean, spread = (tensor.to(exact) for tensor in (input, mean, spread))
    w, b = (None if parameter is None else parameter.to(exact) for parameter in (weight, bias))
    running, saved = ((None, None), (mean, spread)) if training else ((mean, spread), (None, None))
    if needs_input(activation):
        z = F.batch_norm(x, running[0], running[1], w, b, training, 0.0, eps)
        z = z if other is None else z + other.to(exact)
        gz = activations.before(activation, grad_output.to(exact), z).to(input.dtype)
    else:
        assert output is not None
        gz = activations.before(activation, grad_output, output)
    for_input, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
        gz.to(exact), x, w, *running, *saved, training, eps, [needs[0], needs[2], needs[3]]
    )
    of_vectors = (
        None if found is None or like is None else found.to(like.dtype)
        for found, like in ((for_weight, weight), (for_bias, bias))
    )
    return wanted(for_input.to(input.dtype) if needs[0] else None, gz, *of_vectors, needs=needs)


def _load() -> tuple[Callable[..., Any], Callable[..., Tensors]]:
    from ..kernels import batch_norm

    return batch_norm.batch_norm_act, batch_norm.batch_norm_act_backward


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean, save_bits = rest[3], rest[-2]
    statistics = (input.new_empty(0 if mean is not None else input.shape[1], dtype=_exact(input.dtype)) for _ in "ms")
    bits = input.new_empty(input.numel() // 8 if save_bits else 0, dtype=torch.uint8)
    return torch.empty_like(input, memory_format=memory_format_of(input)), *statistics, bits


def _fake_backward(grad_output: Tensor, input: Tensor, other: Any, weight: Any, bias: Any, *rest: Any) -> list[Tensor]:
    channels_last, _, _, need_input, need_other, need_weight, need_bias, _ = rest[-8:]
    memory_format = CHANNELS_LAST[input.dim()] if channels_last else torch.contiguous_format
    large = [
        torch.empty_like(input, memory_format=memory_format) if need else input.new_empty(0)
        for need in (need_input, need_other)
    ]
    vectors = ((need_weight, weight), (need_bias, bias))
    return large + [each.new_empty(each.shape) if need else input.new_empty(0) for need, each in vectors]


# Examples -------------------------------------------------------------------------------------------------------------


def _examples(residual: bool) -> Iterator[Example]:
    def example(
        name: str,
        training: bool = True,
        affine: bool = True,
        channels_last: bool = False,
        positions: tuple[int, ...] = (2, 3),
    ) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            rows, _, channels = sizes
            names = ("input", "other") if residual else ("input",)
            variables = {name: torch.randn(rows, channels, *positions, generator=generator) for name in names}
            if channels_last:
                variables = {n: t.to(memory_format=torch.channels_last) for n, t in variables.items()}
            constants: Named = {}
            if affine:
                variables |= {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")}
            if not training:
                constants["running_mean"] = torch.randn(channels, generator=generator)
                constants["running_var"] = torch.rand(channels, generator=generator) + 0.5
            return variables, constants

        none = {} if not training else {"running_mean": None, "running_var": None}
        return Example(name, draw, {"training": training, **none})

    if residual:  # the first one with nothing but what has a row for each sample
        yield example("training, not affine", affine=False)
        yield example("training", positions=(4, 2))
    else:
        yield example("training")
        yield example("training, not affine, one dimension", affine=False, positions=(4,))
    yield example("training, channels_last", channels_last=True)
    yield example("evaluation", training=False)


def timed(residual: bool, batch: int, channels: int, size: int, channels_last: bool = False) -> Example:
    """In training, of images of this size."""

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        names = ("input", "other") if residual else ("input",)
        variables = {name: torch.randn(batch, channels, size, size, generator=generator) for name in names}
        if channels_last:
            variables = {n: t.to(memory_format=torch.channels_last) for n, t in variables.items()}
        return variables | {"weight": torch.rand(channels, generator=generator), "bias": torch.zeros(channels)}, {}

    name = f"{batch}x{channels}x{size}x{size}" + ("-channels_last" if channels_last else "")
    return Example(name, draw, {"running_mean": None, "running_var": None, "training": True})


def _audit(audit: Audit) -> Iterator[Any]:
    """Both layouts, in training and evaluation, and Mish; of one 16-bit dtype also residuals, odd sizes and few
    positions, so few that one launch does all in float64 too."""
    forward, backward = _load()
    half = audit.half_dtypes[0]
    body, few, odd, least = (32, 256, 28, 28), (64, 64, 7, 7), (13, 67, 13, 13), (8, 64, 16, 16)
    kinds = [(dtype, body, last, False, "relu") for dtype in audit.dtypes for last in (False, True)]
    kinds += [(dtype, body, last, True, "mish") for dtype in audit.dtypes for last in (False, True)]
    kinds += [(half, body, last, True, "relu") for last in (False, True)]
    kinds += [(half, few, False, True, "relu"), (half, odd, False, True, "relu"), (half, odd, True, True, "relu")]
    alone = [(half, "relu"), (half, "mish"), (torch.float64, "mish")]
    kinds += [(dtype, least, last, True, name) for dtype, name in alone for last in (False, True)]
    kinds += [(half, (5, 67, 13, 13), False, True, "relu")]
    for dtype, shape, last, residual, activation in kinds:
        x = audit.empty(*shape, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        parameters = audit.empty(shape[1], dtype=torch.float32 if dtype.itemsize == 2 else dtype)
        exact = audit.empty(shape[1], dtype=_exact(dtype))
        name = f"{'x'.join(map(str, shape))}{' channels_last' if last else ''}{' + residual' if residual else ''}"
        name += "" if activation == "relu" else f" {activation}"
        streams = partial(audit.launches, name, None, "ieee")
        for training in (True, False) if shape is body and not residual else (True,):
            if shape is body and not residual:
                streams = partial(audit.streams, name, True, 1 if training else 2)
            statistics = (None, None, parameters, parameters) if training else (parameters, parameters, None, None)
            bits = residual and activation == "relu" and Columns.of(shape, last, training, dtype).row() % 8 == 0
            call = x, x if residual else None, parameters, parameters, *statistics, 0.1, 1e-5, activation, [], bits
            (output, _, _, mask), found = streams(forward, *call)
            yield from found
            saved = (exact, exact) if training else (parameters, parameters)
            options: tuple[Any, ...] = training, 1e-5, residual, last, activation, []
            common = (
                output,
                x,
                x if activation == "mish" else None,
                parameters,
                parameters,
                *saved,
                output,
                mask,
                *options,
            )
            if shape is body and not residual:
                streams = partial(audit.streams, name, True, 2 if training else 3)
            yield from streams(backward, *common, True, residual, training, training)[1]


# Records --------------------------------------------------------------------------------------------------------------


def _make(residual: bool, act: bool) -> Op:
    examples = list(_examples(residual))
    sizes = [timed(residual, 8, 64, 56), timed(residual, 8, 64, 56, True), timed(residual, 8, 512, 7)]
    if act:
        first, *_ = examples
        examples = [example._replace(options={**example.options, "activation": "gelu"}) for example in examples]
        for name in ("hardswish", "leaky_relu", "tanh"):
            examples.append(first._replace(name=name, options={**first.options, "activation": name}))
        sizes = [example._replace(options={**example.options, "activation": "silu"}) for example in sizes]
    return Op(
        name=f"batch_norm_{'add_' if residual else ''}{'act' if act else 'relu'}",
        fuses=None if act else ("batch_norm", "add", "relu") if residual else ("batch_norm", "relu"),
        accepts=_accepts,
        saved_bytes=passes(PASSES),
        expression=_expression,
        gradients=_gradients,
        load=_load,
        plain=_plain,
        schema="Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, str activation,"
        " float[] parameters, bool save_bits"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        backward_schema="Tensor grad_output, Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor mean,"
        " Tensor spread, Tensor? output, Tensor bits, bool training, float eps, bool residual, bool channels_last,"
        " str activation, float[] parameters, bool need_input, bool need_other, bool need_weight, bool need_bias"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        tensors=8,
        variables=4,
        raw_arguments=_raw_arguments,
        save=_save,
        examples=examples,
        timed=sizes,
        audit=None if residual or act else _audit,
    )


BATCH_NORM_RELU: Final = _make(residual=False, act=False)
BATCH_NORM_ADD_RELU: Final = _make(residual=True, act=False)
BATCH_NORM_ACT: Final = _make(residual=False, act=True)
BATCH_NORM_ADD_ACT: Final = _make(residual=True, act=True)
