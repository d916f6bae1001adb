"""Linear layers, heads and convolutions on the CPU: through oneDNN's own primitives where they apply, else ATen.

``torch.ops.mkldnn._linear_pointwise`` is what Inductor calls for ``linear`` on a CPU; it takes transposed views as they
are. ATen sends float32 products to MKL instead, which on some processors reaches half the speed. It is a private op, so
its presence is probed and every other case goes through ATen. It could fuse the ReLU too, but its ReLU turns NaN into
0; torch's keeps NaN, so that one is applied in place. Convolutions in float32 are oneDNN's in ATen already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import private
from .chunked_logits import Statistics, Target, accumulated_gradients, losses, reference, slices, tile_shape
from .launch import accumulator_dtype, reshaped


def _cpu_field(name: str) -> str:
    """What the kernel of Linux says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: no entry of the table applies
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.split("\t")[0] == name), "")


class Gain(NamedTuple):
    """From how many multiply-adds and elements of the weight on a product gains from oneDNN.

    ``each_thread``: as many for each thread, and in compiled code twice as many. The bound is then where a product
    saves what a Python Function costs: with more threads it saves less, and compiled code costs less where there is
    none.
    ``products``: whether products of any shape do, so that a head's go there too.
    """

    multiply_adds: int
    weight: int = 0
    each_thread: bool = False
    products: bool = True


# By vendor, family and vector instructions. On AMD MKL uses vectors of 256 bits: the full rate of Zen 4 (family 25),
# where oneDNN is ahead with large weights alone, and half the rate of Zen 5 (26), where it is behind only for small
# products, for which a Python Function costs more than it saves. Intel and AMD with AVX2: MKL is about as fast.
GAINS: Final = {
    ("AuthenticAMD", "25", "AVX512"): Gain(8_000_000, 2_000_000, products=False),
    ("AuthenticAMD", "26", "AVX512"): Gain(5_000_000, each_thread=True),
}
FASTER_FROM: Final = GAINS.get(
    (_cpu_field("vendor_id"), _cpu_field("cpu family"), torch.backends.cpu.get_cpu_capability())
)


_LEAST_PART: Final = 1024  # rows or columns of a product: fewer are not worth one of their own


def available() -> bool:
    """Whether this build of torch has the oneDNN product and oneDNN is not switched off."""
    return torch.backends.mkldnn.is_available() and private.linear_pointwise is not None


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """``relu(input @ weight.T + bias)``: [M, K], [N, K], [N] -> [M, N], any strides, any device and dtype."""
    if input.is_cpu and input.dtype is torch.float32 and available():
        dense_bias = None if bias is None else bias.contiguous()  # the primitive does not look at its stride
        output: Tensor = private.linear_pointwise(input, weight, dense_bias, "none", [], "")
    else:
        output = torch.nn.functional.linear(input, weight, bias)
    return output.relu_() if relu else output


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``relu(input @ weight.T + bias)``: [..., K], [N, K], [N] -> [..., N]."""
    output = product(input.reshape(-1, input.shape[-1]), weight, bias, relu)
    return reshaped(output, (*input.shape[:-1], weight.shape[0]))


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``output`` is the forward's result if it had a ReLU, else None. Formulas: see the Triton twin in ``linear.py``.
    """
    grad = grad_output
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad_output, output, 0)
    grad = grad.reshape(-1, grad.shape[-1])
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = reshaped(product(grad, weight.t()), (*grad_output.shape[:-1], weight.shape[1]))
    if input is not None:
        grad_weight = product(grad.t(), input.reshape(-1, input.shape[-1]).t())
    return grad_input, grad_weight, grad.sum(0) if need_bias else None


def linear_cross_entropy(input: Tensor, weight: Tensor, bias: Tensor | None, target: Target, budget: int) -> Statistics:
    """`Statistics` [N] of the logits of input [N, K], weight [C, K] and bias [C], of which a tile exists at a time."""
    rows, classes = input.shape[0], weight.shape[0]
    exact = accumulator_dtype(input.dtype)
    block, width = tile_shape(rows, classes, input.element_size(), budget)
    blocks = []
    for own_rows in slices(rows, block):
        parts = []
        for own in slices(classes, width):
            z = product(input[own_rows], weight[own], None if bias is None else bias[own]).to(exact)
            parts.append(_exponentiate(z, target, own_rows, own))
            del z
        blocks.append(Statistics(*(torch.stack(part) for part in zip(*parts, strict=True))).merged())
    return Statistics(*(torch.cat(part) for part in zip(*blocks, strict=True)))


def linear_cross_entropy_backward(
    scale: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    maximum: Tensor,
    exponentials: Tensor,
    mass: Tensor,
    needs: tuple[bool, bool, bool, bool],
    budget: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for input, weight, bias and class probabilities, those that are needed.

    ``scale``, and ``maximum``, ``exponentials`` and ``mass`` from `chunked_logits.losses`, are [N], in the
    accumulators' dtype. ``scale`` is the gradient of each row's loss, 0 for an ignored row. Formulas: see
    ``linear_cross_entropy.py``.
    """
    exact = scale.dtype
    grad_target = torch.empty_like(target.target) if needs[3] else None

    def logit_gradients(rows: slice, own: slice) -> Tensor:
        z = product(input[rows], weight[own], None if bias is None else bias[own]).to(exact)
        z.sub_(maximum[rows, None])
        if grad_target is not None:
            slope = 1 - target.label_smoothing
            factor = slope if target.weight is None else target.weight[own].to(exact) * slope
            grad_target[rows, own] = (exponentials[rows, None].log() - z) * factor * scale[rows, None]
        _differentiate(z.exp_(), scale[rows], exponentials[rows], mass[rows], target, rows, own)
        return z.to(input.dtype)

    def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        result = product(a, b.t())
        _ = out.add_(result) if add else out.copy_(result)

    gradients = accumulated_gradients(input, weight, logit_gradients, multiply, needs[:3], budget)
    return (*gradients, grad_target)


def linear_cross_entropy_with_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    scale: Tensor,
    needs: tuple[bool, bool, bool],
    budget: int,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """`chunked_logits.losses` [N], and gradients of their sum weighted by ``scale`` [N] for input, weight and bias.

    All classes of a block of rows exist at a time, in one buffer: each logit is computed once, not twice. float32 or
    float64.
    """
    rows, classes = input.shape[0], weight.shape[0]
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if needs[0] else None
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    grad_bias = input.new_zeros(classes) if needs[2] else None
    block = min(rows, budget // (classes * input.element_size()))
    tile, everything = input.new_empty((block, classes)), slice(0, classes)
    results = []
    for own in slices(rows, block):
        x = input[own]
        z = tile[: len(x)]
        _product_into(z, x, weight, bias)
        statistics = _exponentiate(z, target, own, everything)
        results.append(losses(statistics, target._replace(target=target.target[own])))
        _, _, exponentials, mass = results[-1]
        _differentiate(z, scale[own], exponentials, mass, target, own, everything)
        if grad_input is not None:
            _product_into(grad_input[own], z, weight.t())
        if grad_weight is not None:
            _product_into(grad_weight, z.t(), x.t(), grad_weight)
        if grad_bias is not None:
            grad_bias += z.sum(0)
    loss, maximum, exponentials, mass = (torch.cat(parts) for parts in zip(*results, strict=True))
    return (loss, maximum, exponentials, mass), (grad_input, grad_weight, grad_bias)


def _product_into(out: Tensor, a: Tensor, b: Tensor, plus: Tensor | None = None) -> None:
    """``out`` becomes ``a @ b.T + plus``: [M, K], [N, K], and [N] or ``out`` itself -> [M, N]."""
    if FASTER_FROM is None or not FASTER_FROM.products or not available() or out.dtype is not torch.float32:
        if plus is None:
            torch.mm(a, b.t(), out=out)
        else:
            torch.addmm(plus, a, b.t(), out=out)
        return
    # oneDNN's results are memory of their own: an eighth at a time, to be copied
    for part in slices(max(out.shape), max(_LEAST_PART, -(-max(out.shape) // 8))):
        rows, columns = (part, slice(None)) if len(a) > len(b) else (slice(None), part)
        if plus is out:
            out[rows, columns] += product(a[rows], b[columns])
        else:
            out[rows, columns] = product(a[rows], b[columns], None if plus is None else plus[columns])


def _exponentiate(z: Tensor, target: Target, rows: slice, classes: slice) -> Statistics:
    """The `Statistics` of a tile of logits, which become ``exp(z - maximum)``."""
    maximum = z.amax(1)
    products = mass = target_logit = torch.zeros_like(maximum)
    if not target.probabilities:
        index, inside = _index(target, rows, classes)
        target_logit = z.gather(1, index)[:, 0].where(inside, 0)
    z.sub_(reference(maximum)[:, None])
    if target.dense:
        t = target.distribution(rows, classes, z.dtype)
        mass, products = t.sum(-1).expand_as(maximum), t.mul_(z).sum(1) if t.dim() == 2 else z @ t
    return Statistics(maximum, z.exp_().sum(1), products, mass, target_logit)


def _differentiate(
    z: Tensor, scale: Tensor, exponentials: Tensor, mass: Tensor, target: Target, rows: slice, classes: slice
) -> None:
    """A tile of ``exp(z - maximum)`` becomes the gradient of its logits."""
    z.mul_((scale * mass / exponentials)[:, None])
    if target.probabilities:
        # Without a fused multiply-add what is equal cancels: of one class nothing is left.
        z.sub_(target.distribution(rows, classes, z.dtype).mul_(scale[:, None]))
    elif target.dense:
        z.addcmul_(target.distribution(rows, classes, z.dtype).expand_as(z), scale[:, None], value=-1)
    if not target.probabilities:
        index, inside = _index(target, rows, classes)
        own = target._replace(target=target.target[rows]).own_weight(z.dtype)
        share = scale * own * (1 - target.label_smoothing)
        z.scatter_add_(1, index, -share.where(inside, 0)[:, None])


def _index(target: Target, rows: slice, classes: slice) -> tuple[Tensor, Tensor]:
    """[rows, 1]: where in a tile each row's class is, and [rows]: whether it is there at all."""
    index = target.target[rows] - classes.start
    inside = (index >= 0) & (index < classes.stop - classes.start)
    return index.where(inside, 0)[:, None], inside


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    memory_format: torch.memory_format,
) -> Tensor:
    """``relu(conv(input, weight) + bias)``: [N, C, ...], [O, C / groups, ...], [O] -> [N, O, ...]."""
    no_padding = (0,) * len(stride)
    output = torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, False, no_padding, groups
    ).contiguous(memory_format=memory_format)
    return output.relu_() if relu else output


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_bias: bool,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv` for input (needs ``weight``), weight (needs ``input``) and bias.

    ``output`` is the forward's result if it had a ReLU, else None. Formulas: see the Triton twin in ``conv.py``.
    """
    grad = grad_output if output is None else torch.ops.aten.threshold_backward(grad_output, output, 0)
    shapes, options = (input_shape, weight_shape), (stride, padding, dilation, groups)
    return convolution_backward(grad, input, weight, shapes, options, need_bias, memory_format)


def convolution_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    shapes: tuple[Sequence[int], Sequence[int]],
    options: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    need_bias: bool,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`conv_backward` without ReLU, by torch on any device.

    ``shapes`` are those of input and weight, ``options`` stride, padding, dilation and groups.
    """
    new: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "memory_format": memory_format}
    needs = weight is not None, input is not None, need_bias
    # In the place of an operand that is not needed: torch reads its shape and strides alone.
    input = torch.empty(tuple(shapes[0]), **new) if input is None else input
    weight = torch.empty(tuple(shapes[1]), **new) if weight is None else weight
    *each, groups = options
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, input, weight, shapes[1][:1], *each, False, (0,) * len(each[0]), groups, needs
    )
    # Some of torch's ways compute the weight's gradient with the bias's.
    return (
        grad_input.contiguous(memory_format=memory_format) if needs[0] else None,
        grad_weight.contiguous(memory_format=memory_format) if needs[1] else None,
        grad_bias,
    )
