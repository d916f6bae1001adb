"""Activations, once: what a kernel applies to a result before it is stored, and the slope for the way back.

::

    y = f(z)          forward:   `activated`, in the epilogue of the kernel that computes z
    gz = gy f'(z)     backward:  `slope`, of y where f' can be had from it without loss, else of z, saved beside y

Values and slopes are torch's at NaN, infinities and zeros of both signs, except where torch's own differ from one dtype
to the next. ``expm1`` and ``log1p`` are written out: subtracting 1 from an exponential would lose what is small.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exponential_less_one(x):
    """exp(x) - 1, small results as exact as large ones."""
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    series = tl.full(x.shape, 1.0, x.dtype)  # of exp(x) - 1 over x
    for n in tl.static_range(TERMS, 1, -1):
        series = 1.0 + x * series / n
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def _logarithm_of_one_and(x):
    """log(1 + x) for x from 0 on: 2 artanh(x / (2 + x)) where that is small."""
    TERMS: tl.constexpr = 12 if x.dtype == tl.float64 else 6
    s = x / (2.0 + x)
    series = tl.zeros(x.shape, x.dtype)
    for n in tl.static_range(TERMS, 0, -1):
        series = s * s * (series + 1.0 / (2 * n + 1))
    return tl.where(x < 0.35, 2.0 * s * (1.0 + series), tl.log(1.0 + x))


@triton.jit
def _tanh(x):
    """Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) up to 1, as what it takes off from x."""
    DEPTH: tl.constexpr = 10 if x.dtype == tl.float64 else 5
    size = tl.abs(x)
    square = tl.where(size < 1.0, x * x, 0.0)
    fraction = tl.full(x.shape, 2 * DEPTH + 1, x.dtype)
    for n in tl.static_range(DEPTH, 1, -1):
        fraction = (2 * n - 1) + square / fraction
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    small = tl.where(x == 0, x, x - x * square / (fraction + square))  # a zero keeps its sign
    return tl.where(size < 1.0, small, tl.where(x < 0, -large, large))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _bell(x):
    """The standard normal distribution, and x times its density."""
    HALF_ROOT: tl.constexpr = 0.7071067811865476  # of 2
    DENSITY: tl.constexpr = 0.3989422804014327  # at 0
    below = 0.5 * (1.0 + tl.erf(x * tl.full((), HALF_ROOT, x.dtype)))
    return below, x * tl.exp(-0.5 * x * x) * tl.full((), DENSITY, x.dtype)


@triton.jit
def _shares_of_gelu(x):
    """Half of 1 plus the hyperbolic tangent in GELU's approximation, half of 1 less it, and twice the slope of what it
    is of."""
    FACTOR: tl.constexpr = 1.5957691216057308  # twice the root of 2 over pi
    CUBE: tl.constexpr = 0.044715
    factor, cube = tl.full((), FACTOR, x.dtype), tl.full((), CUBE, x.dtype)
    exponential = tl.exp(-factor * (x + cube * x * x * x))
    share = 1.0 / (1.0 + exponential)
    rest = tl.where(share == 0, 1.0, exponential * share)  # 1 - share would lose what is small
    return share, rest, factor * (1.0 + 3.0 * cube * x * x)


@triton.jit
def _fractions_of_mish(x):
    """tanh(log(1 + e^x)) without either, n / (n + 2) with n = e^x (e^x + 2), and what it lacks to 1: 2 / (n + 2)."""
    exponential = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    n = exponential * (exponential + 2.0)
    return n / (n + 2.0), tl.where(x > 20.0, 0.0, 2.0 / (n + 2.0))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of ``z``, which has the dtype that is computed in; without a name, ``z``."""
    NAME: tl.constexpr = ACTIVATION[0]
    if NAME == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif NAME == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif NAME == "leaky_relu":
        return tl.where(z > 0, z, z * tl.full((), ACTIVATION[1], z.dtype))
    elif NAME == "gelu":
        below, _unused = _bell(z)
        return z * below
    elif NAME == "gelu_tanh":
        share, _rest, _inner = _shares_of_gelu(z)
        return z * share
    elif NAME == "silu":
        return z / (1.0 + tl.exp(-z))
    elif NAME == "sigmoid":
        return _sigmoid(z)
    elif NAME == "tanh":
        return _tanh(z)
    elif NAME == "hardswish":
        return z * tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) / 6.0
    elif NAME == "hardsigmoid":
        return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) / 6.0
    elif NAME == "elu":
        return tl.where(z < 0, _exponential_less_one(z) * tl.full((), ACTIVATION[1], z.dtype), z)
    elif NAME == "softplus":
        beta = tl.full((), ACTIVATION[1], z.dtype)
        linear = z * beta > tl.full((), ACTIVATION[2], z.dtype)
        exponential = tl.exp(tl.where(linear, 0.0, z * beta))
        return tl.where(linear, z, _logarithm_of_one_and(exponential) / beta)
    elif NAME == "mish":
        tanh, rest = _fractions_of_mish(z)
        near_z = tl.where(z > 20.0, z, z - z * rest)  # more exact where rest is small
        return tl.where(z > 0, near_z, z * tanh)
    else:
        tl.static_assert(NAME == "")
        return z


@triton.jit
def slope(saved, ACTIVATION: tl.constexpr):
    """The slope of the activation, from its input or its output, as `needs_input` says (kernels/activation.py)."""
    NAME: tl.constexpr = ACTIVATION[0]
    if NAME == "relu":
        return tl.where(saved <= 0, 0.0, 1.0)  # and not ``saved > 0``: torch lets the gradient of NaN through
    elif NAME == "relu6":
        return tl.where((saved <= 0) | (saved >= 6.0), 0.0, 1.0)
    elif NAME == "leaky_relu":
        return tl.where(saved > 0, 1.0, tl.full((), ACTIVATION[1], saved.dtype))
    elif NAME == "gelu":
        below, density = _bell(saved)
        return below + density
    elif NAME == "gelu_tanh":
        share, rest, inner = _shares_of_gelu(saved)
        return share + saved * share * rest * inner
    elif NAME == "silu":
        share = _sigmoid(saved)
        return share * (1.0 + saved * (1.0 - share))
    elif NAME == "sigmoid":
        return saved * (1.0 - saved)
    elif NAME == "tanh":
        return 1.0 - saved * saved
    elif NAME == "hardswish":
        return tl.where(saved <= -3.0, 0.0, tl.where(saved < 3.0, saved / 3.0 + 0.5, 1.0))
    elif NAME == "hardsigmoid":
        return tl.where((saved > -3.0) & (saved < 3.0), 1.0 / 6.0, 0.0)
    elif NAME == "elu":
        return tl.where(saved <= 0, tl.exp(saved) * tl.full((), ACTIVATION[1], saved.dtype), 1.0)
    elif NAME == "softplus":
        scaled = saved * tl.full((), ACTIVATION[1], saved.dtype)
        return tl.where(scaled > tl.full((), ACTIVATION[2], saved.dtype), 1.0, _sigmoid(scaled))
    else:
        tl.static_assert(NAME == "mish")
        tanh, rest = _fractions_of_mish(saved)
        return tanh + saved * rest * (1.0 + tanh) * _sigmoid(saved)


@triton.jit
def gradient_before(grad, saved, ACTIVATION: tl.constexpr):
    """The gradient before the activation. Where torch chooses, an infinite gradient times 0 is 0, else it is NaN."""
    NAME: tl.constexpr = ACTIVATION[0]
    if NAME == "relu":
        return tl.where(saved <= 0, 0.0, grad)
    rise = slope(saved, ACTIVATION)
    if NAME == "relu6" or NAME == "hardswish" or NAME == "hardsigmoid":
        return tl.where(rise == 0, 0.0, grad * rise)
    else:
        return grad * rise
