"""Every fastops function with its options, beside the torch function that it must equal: a table for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fastops
import fastops.functional as FF
from fastops import backport, dispatch
from fastops.ops.activations import FUNCTIONS


class Case(NamedTuple):
    """One function with its options: ``ours(*tensors)`` must equal ``torchs(*tensors)``."""

    op: str
    options: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[..., Tensor] = torch.randn

    @property
    def name(self) -> str:
        return f"{self.op}-{self.options}"

    def tensors(self, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> tuple[Tensor, ...]:
        """New arguments, the same in every dtype but for rounding."""
        generator = torch.Generator().manual_seed(7)
        made = (self.make(shape, dtype=torch.float64, generator=generator) for shape in self.shapes)
        return tuple(tensor.to(dtype).requires_grad_(requires_grad) for tensor in made)


class Logged(Tensor):
    """A subclass that logs which functions it meets."""

    met: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.met.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def torch_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def _linear_cases() -> Iterator[Case]:
    pairs = {"linear": (FF.linear, F.linear), "linear_relu": (FF.linear_relu, torch_linear_relu)}
    for op, (ours, torchs) in pairs.items():
        yield Case(op, "bias", ours, torchs, ((4, 3), (2, 3), (2,)))
        yield Case(op, "no_bias", ours, torchs, ((4, 3), (2, 3)))
        yield Case(op, "1d", ours, torchs, ((3,), (2, 3), (2,)))
        yield Case(op, "3d", ours, torchs, ((2, 3, 3), (2, 3), (2,)))


def torch_linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str, **parameters: float
) -> Tensor:
    return FUNCTIONS[activation](F.linear(input, weight, bias), **parameters)


def _linear_act_cases() -> Iterator[Case]:
    """Slopes from the input and from the output, and parameters."""
    for options in (
        {"activation": "gelu"},
        {"activation": "silu"},
        {"activation": "tanh"},
        {"activation": "leaky_relu", "negative_slope": -0.3},
        {"activation": "softplus", "beta": 2.0, "threshold": 1.0},
    ):
        ours, torchs = (functools.partial(function, **options) for function in (FF.linear_act, torch_linear_act))
        yield Case("linear_act", str(options["activation"]), ours, torchs, ((4, 3), (2, 3), (2,)))
    ours, torchs = (functools.partial(function, activation="mish") for function in (FF.linear_act, torch_linear_act))
    yield Case("linear_act", "no_bias", ours, torchs, ((2, 3, 3), (2, 3)))


def _conv_cases() -> Iterator[Case]:
    shapes: dict[str, tuple[int, tuple[tuple[int, ...], ...], dict[str, Any]]] = {
        "bias": (2, ((2, 2, 5, 4), (3, 2, 3, 2), (3,)), {"stride": (2, 1), "padding": (1, 0)}),
        "no_bias": (2, ((1, 3, 4, 4), (2, 3, 2, 2)), {"dilation": 2}),
        "same": (2, ((1, 2, 4, 3), (2, 2, 2, 3), (2,)), {"padding": "same"}),
        "groups": (2, ((1, 4, 4, 4), (2, 2, 2, 2), (2,)), {"groups": 2, "stride": 2}),
        "unbatched": (2, ((2, 4, 4), (2, 2, 3, 3), (2,)), {"padding": "valid"}),
        "pointwise": (2, ((2, 3, 2, 3), (2, 3, 1, 1), (2,)), {}),
        "1d": (1, ((2, 2, 6), (3, 2, 3), (3,)), {"stride": 2, "padding": 1}),
        "3d": (3, ((1, 2, 3, 4, 3), (2, 2, 2, 2, 1), (2,)), {"stride": (1, 2, 1)}),
    }
    for name, (dimensions, tensors, options) in shapes.items():
        torch_conv = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]

        def torch_conv_relu(*tensors: Tensor, torch_conv: Any = torch_conv, **options: Any) -> Tensor:
            return F.relu(torch_conv(*tensors, **options))

        for op, torchs in ((f"conv{dimensions}d", torch_conv), (f"conv_relu{dimensions}d", torch_conv_relu)):
            ours = functools.partial(getattr(FF, op), **options)
            yield Case(op, name, ours, functools.partial(torchs, **options), tensors)
        for activation in ACTIVATIONS_OF_CONVOLUTIONS.get(name, ()):

            def torch_conv_act(
                *tensors: Tensor, torch_conv: Any = torch_conv, activation: str = activation, **options: Any
            ) -> Tensor:
                return FUNCTIONS[activation](torch_conv(*tensors, **options))

            ours = functools.partial(getattr(FF, f"conv_act{dimensions}d"), activation=activation, **options)
            torchs = functools.partial(torch_conv_act, **options)
            options_name = activation if name == "bias" else f"{name}, {activation}"
            yield Case(f"conv_act{dimensions}d", options_name, ours, torchs, tensors)


# By the name of a case: slopes from the input and from the output.
ACTIVATIONS_OF_CONVOLUTIONS = {
    "bias": ("gelu", "tanh"),
    "pointwise": ("silu",),
    "unbatched": ("gelu",),
    "same": ("sigmoid",),
    "1d": ("mish",),
    "3d": ("gelu",),
}


def torch_add_relu(input: Tensor, other: Tensor) -> Tensor:
    return F.relu(input + other)


def _elementwise_cases() -> Iterator[Case]:
    losses: dict[str, dict[str, Any]] = {
        "mse_loss": {},
        "l1_loss": {},
        "smooth_l1_loss": {"beta": 0.3},
        "huber_loss": {"delta": 0.3},
    }
    for op, options in losses.items():
        ours, torchs = (functools.partial(getattr(of, op), **options) for of in (FF, F))
        for reduction in ("none", "mean", "sum"):
            reduced = (functools.partial(function, reduction=reduction) for function in (ours, torchs))
            yield Case(op, reduction, *reduced, ((4, 3), (4, 3)))
        yield Case(op, "0d", ours, torchs, ((), ()))
    smooth = (functools.partial(of.smooth_l1_loss, beta=0) for of in (FF, F))
    yield Case("smooth_l1_loss", "beta_0", *smooth, ((4, 3), (4, 3)))
    yield Case("add_relu", "pair", FF.add_relu, torch_add_relu, ((4, 3), (4, 3)))


def torch_batch_norm_relu(input: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return F.relu(F.batch_norm(input, *arguments, **options))


def torch_batch_norm_add_relu(input: Tensor, other: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return F.relu(F.batch_norm(input, *arguments, **options) + other)


def torch_batch_norm_act(input: Tensor, *arguments: Any, activation: str, **options: Any) -> Tensor:
    return FUNCTIONS[activation](F.batch_norm(input, *arguments, **options))


def torch_batch_norm_add_act(input: Tensor, other: Tensor, *arguments: Any, activation: str, **options: Any) -> Tensor:
    return FUNCTIONS[activation](F.batch_norm(input, *arguments, **options) + other)


def _normalized(
    function: Callable[..., Tensor], training: bool, input: Tensor, *parameters: Tensor, **activation: str
) -> Tensor:
    """In training, or with statistics that are no variables."""
    C = input.shape[1]
    known = None if training else torch.linspace(0.5, 1, C, dtype=input.dtype, device=input.device)
    return function(input, known, known, *parameters, training=training, **activation)


def _normalized_sum(
    function: Callable[..., Tensor], input: Tensor, other: Tensor, *parameters: Tensor, **activation: str
) -> Tensor:
    return function(input, other, None, None, *parameters, training=True, eps=0.1, **activation)


def _batch_norm_cases() -> Iterator[Case]:
    both = FF.batch_norm_relu, torch_batch_norm_relu
    for options, training, shapes in (
        ("bias", True, ((4, 3, 2), (3,), (3,))),
        ("2d", True, ((6, 2),)),
        ("evaluation", False, ((2, 3, 2, 2), (3,), (3,))),
    ):
        yield Case("batch_norm_relu", options, *(functools.partial(_normalized, f, training) for f in both), shapes)
    sums = (functools.partial(_normalized_sum, f) for f in (FF.batch_norm_add_relu, torch_batch_norm_add_relu))
    yield Case("batch_norm_add_relu", "pair", *sums, ((3, 2, 4, 2), (3, 2, 4, 2)))
    both = FF.batch_norm_act, torch_batch_norm_act
    for name, training, shapes in (("gelu", True, ((4, 3, 2), (3,), (3,))), ("tanh", False, ((2, 3, 2, 2), (3,)))):
        pair = (functools.partial(_normalized, f, training, activation=name) for f in both)
        yield Case("batch_norm_act", name, *pair, shapes)
    both = FF.batch_norm_add_act, torch_batch_norm_add_act
    for name, shapes in (("gelu", ((3, 2, 4, 2), (3, 2, 4, 2))), ("sigmoid", ((3, 2, 4), (3, 2, 4), (2,), (2,)))):
        yield Case(
            "batch_norm_add_act", name, *(functools.partial(_normalized_sum, f, activation=name) for f in both), shapes
        )


def torch_relu_max_pool2d(input: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return F.max_pool2d(F.relu(input), *arguments, **options)


def _max_pool_cases() -> Iterator[Case]:
    cases: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "2": ((2, 3, 4, 5), {"kernel_size": 2}),
        "overlapping": ((2, 2, 5, 4), {"kernel_size": 3, "stride": 2, "padding": 1}),
        "ceil_mode": ((1, 2, 5, 6), {"kernel_size": (2, 3), "stride": (2, 1), "ceil_mode": True, "dilation": (1, 2)}),
        "unbatched": ((2, 4, 4), {"kernel_size": 2, "stride": 1}),
    }
    for name, (shape, options) in cases.items():
        both = (functools.partial(function, **options) for function in (FF.relu_max_pool2d, torch_relu_max_pool2d))
        yield Case("relu_max_pool2d", name, *both, (shape,))


def _of_indices(function: Callable[..., Tensor], target: Tensor, options: dict[str, Any], input: Tensor) -> Tensor:
    weight = options.get("weight")
    return function(input, target, **{**options, "weight": None if weight is None else weight.to(input.dtype)})


def _of_probabilities(function: Callable[..., Tensor], options: dict[str, Any], input: Tensor, q: Tensor) -> Tensor:
    return _of_indices(function, q, options, input)


def _cross_entropy_cases() -> Iterator[Case]:
    weight = torch.tensor([0.5, 1.5, 0.25])
    with_indices: dict[str, tuple[tuple[int, ...], list[int], dict[str, Any]]] = {
        "mean": ((4, 3), [0, 2, 1, 0], {}),
        "sum": ((4, 3), [0, 2, 1, 0], {"reduction": "sum"}),
        "none_weight_ignore": ((4, 3), [0, 2, 1, 0], {"reduction": "none", "weight": weight, "ignore_index": 2}),
        "mean_weight_smooth": ((4, 3), [0, 2, 1, 0], {"weight": weight, "ignore_index": 1, "label_smoothing": 0.2}),
        "none_smooth": ((4, 3), [0, -100, 1, 0], {"reduction": "none", "label_smoothing": 0.2}),
        "unbatched": ((3,), [1], {"label_smoothing": 0.2}),
        "positions": ((2, 3, 2), [0, -7, 1, 2], {"ignore_index": -7}),
    }
    for name, (shape, classes, options) in with_indices.items():
        target = torch.tensor(classes).reshape(shape[:1] + shape[2:] if len(shape) > 1 else ())
        ours = functools.partial(_of_indices, FF.cross_entropy, target, options)
        torchs = functools.partial(_of_indices, F.cross_entropy, target, options)
        yield Case("cross_entropy", name, ours, torchs, (shape,))
    with_probabilities: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "probabilities_mean": ((4, 3), {}),
        "probabilities_none_weight": ((4, 3), {"reduction": "none", "weight": weight}),
        "probabilities_sum_weight_smooth": ((4, 3), {"reduction": "sum", "weight": weight, "label_smoothing": 0.2}),
        "probabilities_positions": ((2, 3, 2), {"label_smoothing": 0.2}),
    }
    for name, (shape, options) in with_probabilities.items():
        ours = functools.partial(_of_probabilities, FF.cross_entropy, options)
        torchs = functools.partial(_of_probabilities, F.cross_entropy, options)
        yield Case("cross_entropy", name, ours, torchs, (shape, shape), torch.rand)


def _bce_of(function: Callable[..., Tensor], options: dict[str, Any], input: Tensor, target: Tensor) -> Tensor:
    weights = {
        name: value.to(input.device, input.dtype) for name, value in options.items() if isinstance(value, Tensor)
    }
    return function(input, target, **{**options, **weights})


def _bce_cases() -> Iterator[Case]:
    weight, pos_weight = torch.tensor([0.5, 1.5, 0.25]), torch.tensor([2.0, 0.5, 1.0])
    cases: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "mean": ((4, 3), {}),
        "sum_weight": ((4, 3), {"reduction": "sum", "weight": weight}),
        "mean_pos_weight": ((4, 3), {"pos_weight": pos_weight}),
        "none_weights": ((4, 3), {"reduction": "none", "weight": weight[:1], "pos_weight": pos_weight}),
        "channels": ((2, 3, 2), {"weight": weight[:2, None, None], "pos_weight": pos_weight[:, None]}),
        "rows_and_columns": ((3, 2, 3), {"reduction": "none", "weight": weight[:, None, None] * pos_weight}),
        "0d": ((), {"pos_weight": pos_weight[0]}),
    }
    for name, (shape, options) in cases.items():
        ours = functools.partial(_bce_of, FF.binary_cross_entropy_with_logits, options)
        torchs = functools.partial(_bce_of, F.binary_cross_entropy_with_logits, options)
        yield Case("binary_cross_entropy_with_logits", name, ours, torchs, (shape, shape))


def _head_of(
    function: Callable[..., Tensor],
    target: Tensor | None,
    options: dict[str, Any],
    input: Tensor,
    linear_weight: Tensor,
    *others: Tensor,
) -> Tensor:
    """``others``: the bias, and the class probabilities if there is no ``target``."""
    others, target = (others, target) if target is not None else (others[:-1], others[-1])
    options = {name: v.to(input.device, input.dtype) if isinstance(v, Tensor) else v for name, v in options.items()}
    bias = others[0] if others else None
    return function(input, linear_weight, target.to(input.device), linear_bias=bias, **options)


def _linear_cross_entropy_cases() -> Iterator[Case]:
    weight = torch.tensor([0.5, 1.5, 0.25])
    x, w, b = (4, 2), (3, 2), (3,)
    cases: dict[str, tuple[tuple[tuple[int, ...], ...], list[Any] | None, dict[str, Any]]] = {
        "mean": ((x, w), [0, 2, 1, 0], {}),
        "mean_weight_smooth": ((x, w, b), [0, 2, 1, 0], {"weight": weight, "ignore_index": 1, "label_smoothing": 0.2}),
        "none_weight": ((x, w, b), [0, -100, 1, 2], {"reduction": "none", "weight": weight}),
        "sum_smooth": ((x, w), [0, -100, 1, 2], {"reduction": "sum", "label_smoothing": 0.2}),
        "unbatched": (((2,), w, b), 1, {"reduction": "none"}),
        "positions": ((x, (3, 2, 2), (3, 2)), [[0, 1], [2, -1], [1, 1], [0, 2]], {"ignore_index": -1}),
        "probabilities_mean": ((x, w, (4, 3)), None, {}),
        "probabilities_none_weight": ((x, w, b, (4, 3)), None, {"reduction": "none", "weight": weight}),
        "probabilities_positions": ((x, (3, 2, 2), (4, 3, 2)), None, {"label_smoothing": 0.2, "reduction": "sum"}),
    }
    for name, (shapes, classes, options) in cases.items():
        target = None if classes is None else torch.tensor(classes)
        ours = functools.partial(_head_of, FF.linear_cross_entropy, target, options)
        torchs = functools.partial(_head_of, backport.linear_cross_entropy, target, options)
        yield Case("linear_cross_entropy", name, ours, torchs, shapes)


CASES = [
    *_linear_cases(),
    *_linear_act_cases(),
    *_conv_cases(),
    *_elementwise_cases(),
    *_batch_norm_cases(),
    *_max_pool_cases(),
    *_cross_entropy_cases(),
    *_bce_cases(),
    *_linear_cross_entropy_cases(),
]
BACKENDS = ("triton", "onednn", "torch")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
_ONE_OF_EACH = {"bias", "pair", "gelu", "overlapping", "mean", "mean_weight_smooth"}
_ONE_OF_EACH |= {"probabilities_mean", "mean_pos_weight"}
ONE_CASE_PER_OP = [case for case in CASES if case.options in _ONE_OF_EACH]
one_case_per_op = pytest.mark.parametrize("case", ONE_CASE_PER_OP, ids=lambda case: case.name)


def onednn_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send float64 through the oneDNN way too (what they compute is ATen's then): for gradcheck."""

    monkeypatch.setattr(dispatch, "ONEDNN_DTYPES", (torch.float32, torch.float64))


def gradients(function: Callable[..., Tensor], *tensors: Tensor, grad_output: Tensor | None = None) -> list[Tensor]:
    """``[result, gradient of each tensor that requires one]``; the result's gradient is ones or ``grad_output``."""
    result = function(*tensors)
    variables = [tensor for tensor in tensors if tensor.requires_grad]
    ones = torch.ones_like(result) if grad_output is None else grad_output
    return [result, *torch.autograd.grad(result, variables, ones)]


def tangent(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The forward-mode derivative of ``function`` along ``tangents``."""
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(a.detach(), t) for a, t in zip(tensors, tangents, strict=True))
        result = forward_ad.unpack_dual(function(*duals)).tangent
    assert result is not None
    return result


no_fallback = pytest.mark.filterwarnings(f"error::{fastops.FallbackWarning.__module__}.FallbackWarning")
