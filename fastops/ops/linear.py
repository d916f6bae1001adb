"""The linear layer, and with ReLU: ``kernels/linear.py``.

With input x, weight w, bias b, output y, its gradient gy::

    y  = relu(x w^T + b)
    gz = gy where not y <= 0, else 0        (gz = gy without ReLU)
    gx = gz w,   gw = gz^T x,   gb = sum of gz over rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import onednn, private
from ..kernels.activation import NONE, RELU, Activation
from ..kernels.launch import is_exact
from . import flops
from .accepts import Tensors, mismatch
from .examples import Audit, Example, Named, Sizes, transposed
from .op import ATEN_IS_FASTER, EXACT, Explanation, Op, masked, passes


def _accepts(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    unfit = mismatch(input, weight) if bias is None else mismatch(input, weight, bias)
    if unfit is not None:
        return unfit
    size = weight.shape
    if len(size) != 2 or input.dim() == 0 or input.shape[-1] != size[1]:
        return "input and weight shapes do not make a linear layer"
    if bias is not None and (len(bias_size := bias.shape) != 1 or bias_size[0] != size[0]):
        return "bias does not have one element per output feature"
    return None


_ONEDNN_PAYS: Final = Explanation("onednn", "oneDNN's product is faster than MKL's on this processor at this size")
_BARE: Final = Explanation("torch", "a product alone fuses nothing: the vendor's library computes it")
_EPILOGUE: Final = Explanation(
    "triton",
    "bias and ReLU run in the epilogue of the product",
    "vendor",
    "one kernel masks and sums the gradient; two products alone fuse nothing, and the vendor's library computes them",
)
onednn_from = onednn.FASTER_FROM


def _gpu(relu: bool, input: Tensor, *_: Any) -> Explanation:
    if not relu:
        return _BARE
    return EXACT if is_exact(input.dtype) else _EPILOGUE


def _saved_bytes(input: Any, weight: Any, *_: Any) -> float:
    """Two passes over the output."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.shape[1]:
        return 0
    return 2 * input.numel() * input.element_size() * weight.shape[0] / weight.shape[1]


# By name: a lookup through modules at each call adds up.
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_tracing_state: Final = private.tracing_state


def _cpu(input: Tensor, weight: Tensor, *_: Any) -> Explanation:
    if onednn_from is None or not isinstance(weight, Tensor) or weight.numel() < onednn_from.weight:
        return ATEN_IS_FASTER
    product, least = input.numel() * weight.shape[:1].numel(), onednn_from.multiply_adds
    pays = private.surely(product >= least)
    if pays and onednn_from.each_thread:
        # What AOT and export trace with is of a class of its own.
        compiling = _is_dynamo_compiling() or type(input) is not Tensor
        pays = private.surely(product >= least * (2 if compiling else 1) * private.threads())
    return _ONEDNN_PAYS if pays else ATEN_IS_FASTER


def _linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = F.linear(input, weight, bias)
    # In place, autograd would have a history to rewrite, which costs more than memory does. jit.trace runs a function
    # twice, with gradients and without, and compares what it saw.
    if output.requires_grad or (not _is_dynamo_compiling() and _tracing_state() is not None):
        return output.relu()
    return output.relu_()


def rows(tensor: Tensor) -> Tensor:
    """[..., K] -> [M, K]. (``flatten(0, -2)`` has no batching rule and is wrong for one dimension.)"""
    return tensor.reshape(-1, tensor.shape[-1])


def _gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, output: Tensor | None, *needs: bool
) -> Tensors:
    gz = masked(grad_output, output)
    return (
        None if weight is None else gz @ weight,
        None if input is None else rows(gz).t() @ rows(input),
        rows(gz).sum(0) if needs[2] else None,
    )


def _without_two_needs(backward: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """Of the gradients of input and weight the tensors say themselves whether they are needed."""

    def call(
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        output: Tensor | None,
        *needs: bool,
        **options: Any,
    ) -> Tensors:
        return backward(grad_output, input, weight, output, needs[2], **options)

    return call


def load(activation: Activation, before: Tensor | None = None) -> tuple[Callable[..., Tensor], Callable[..., Tensors]]:
    """The launchers of a linear layer with this activation; the backward pass takes it as a keyword."""
    from ..kernels import linear

    return partial(linear.linear, activation=activation, before=before), _without_two_needs(linear.linear_backward)


def _save(needs: tuple[bool, ...], op: Op, arguments: tuple[Any, ...], output: Tensor) -> tuple[Tensors, tuple[()]]:
    input, weight, _ = arguments
    saved = (input if needs[1] else None, weight if needs[0] else None, output if op.fuses else None)
    return saved, ()


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, way: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _fake_backward(grad_output: Tensor, input: Tensor | None, weight: Tensor | None, *rest: Any) -> list[Tensor]:
    N, need_bias = grad_output.shape[-1], rest[-2]
    return [
        grad_output.new_empty(0 if weight is None else (*grad_output.shape[:-1], weight.shape[1])),
        grad_output.new_empty(0 if input is None else (N, input.shape[-1])),
        grad_output.new_empty(N if need_bias else 0),
    ]


def _examples() -> Iterator[Example]:
    def example(
        name: str, leading: Callable[[Sizes], tuple[int, ...]], bias: bool = True, other_order: bool = False
    ) -> Example:
        def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
            variables = {
                "input": torch.randn(*leading(sizes), sizes.features, generator=generator),
                "weight": torch.randn(sizes.outputs, sizes.features, generator=generator),
            }
            if other_order:
                variables = {name: transposed(tensor) for name, tensor in variables.items()}
            if bias:
                variables["bias"] = torch.randn(sizes.outputs, generator=generator)
            return variables, {}

        return Example(name, draw)

    yield example("matrix", lambda sizes: (sizes.rows,))
    yield example("matrix, no bias", lambda sizes: (sizes.rows,), bias=False)
    yield example("vector", lambda sizes: ())
    yield example("three dimensions", lambda sizes: (2, sizes.rows))
    yield example("transposed input and weight", lambda sizes: (sizes.rows,), other_order=True)


def timed(rows: int, features: int, outputs: int, bias: bool = True) -> Example:
    """A layer as torch initializes it, on so many rows."""

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Named, Named]:
        layer = torch.nn.Linear(features, outputs, bias=bias)
        parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        return {"input": torch.randn(rows, features, generator=generator), **parameters}, {}

    return Example(f"{rows}x{features}-{outputs}", draw)


def _audit(audit: Audit) -> Iterator[Any]:
    """Every tile of the tables and what is taken for odd sizes; of one 16-bit dtype also all backward, rows that are
    multiples of 8, 4 and 2 elements alone, few tiles with a long sum, and float32 results."""
    from ..kernels import linear, matmul

    aligned, odd, deep = (512, 784, 512), (509, 783, 511), (64, 8192, 128)
    eighths, narrow = (512, 1000, 1000), ((512, 1004, 1000), (512, 1002, 1000))
    half = audit.half_dtypes[0]
    for dtype, precision, tiles, persistent in audit.tables():
        first = (tiles[0], *persistent[:1])
        others: list[tuple[Any, tuple[int, ...]]] = [(None, odd)]
        if dtype is half:
            others += [(tiles[0], eighths), *((None, shape) for shape in (*narrow, deep))]
        for tile, shape in [*((tile, aligned) for tile in (*tiles, *persistent)), *others]:
            M, K, N = shape
            x, w, b, y = (audit.empty(*sizes, dtype=dtype) for sizes in ((M, K), (N, K), (N,), (M, N)))
            launches = partial(audit.launches, f"{M}x{K}x{N}", tile, precision)
            found = launches(linear.linear, x, w, b, RELU)[1]
            if shape != deep and (dtype is half or tile in first):
                found += launches(linear.linear_backward, y, x, w, y, True)[1]
            if tile in first and shape == aligned:  # activations with long code, and a second result
                found += launches(linear.linear, x, w, b, ("tanh",), y)[1]
                # GELU in float64 spills up to 9 scalar registers on AMD, in the error function (docs/audit.md).
                longest = "mish" if dtype is torch.float64 else "gelu"
                found += launches(linear.linear_backward, y, x, w, y, True, (longest,))[1]
            if dtype is half and tile in persistent[:1]:
                exact = audit.empty(M, N, dtype=torch.float32)
                found += launches(matmul.matmul, x, w.t(), None, NONE, None, exact)[1]
            for launch in found:
                leading = tile in first and shape == aligned and dtype.itemsize == 2
                yield launch._replace(wide=shape not in (odd, *narrow), leading=leading)


def _make(relu: bool) -> Op:
    bare = [timed(64, 512, 10), timed(64, 100, 10, bias=False), timed(256, 1024, 1000)]
    fused = [
        timed(64, 784, 512),  # FashionMLP
        timed(64, 512, 512),
        timed(64, 1000, 100, bias=False),  # TwoLayerNet
        timed(512, 784, 512),
        timed(256, 1024, 4096),
    ]
    return Op(
        name="linear_relu" if relu else "linear",
        replaces=() if relu else (F.linear,),
        module=None if relu else torch.nn.Linear,
        fuses=("linear", "relu") if relu else None,
        accepts=_accepts,
        cpu=_cpu,
        gpu=partial(_gpu, relu),
        saved_bytes=_saved_bytes if relu else passes(0),
        onednn=True,
        autocast="lower",
        expression=_linear_relu if relu else F.linear,
        gradients=_gradients,
        load=partial(load, RELU if relu else NONE),
        plain=partial(onednn.linear, relu=relu),
        plain_backward=_without_two_needs(onednn.linear_backward),
        schema="Tensor input, Tensor weight, Tensor? bias -> Tensor",
        backward_schema="Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, bool need_input,"
        " bool need_weight, bool need_bias -> (Tensor, Tensor, Tensor)",
        fake=_fake,
        fake_backward=_fake_backward,
        tensors=3,
        variables=3,
        flops=(flops.product, flops.product_backward),
        save=_save,
        examples=tuple(_examples()),
        timed=fused if relu else bare,
        audit=None if relu else _audit,
    )


LINEAR: Final = _make(relu=False)
LINEAR_RELU: Final = _make(relu=True)
