"""Strategies that draw calls of every public op, and say which kinds are kept out for what reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fuzz_calls import DTYPES, LAYOUTS, VALUES, Call, Given
from hypothesis import strategies as st

from fastops.kernels.activation import PARAMETERS

Draw = Callable[[st.SearchStrategy[Any]], Any]
Named = dict[str, tuple[int, ...]]
# 0, 1, primes, multiples of 8 that are none of 16, sizes around the interpreter's tiles of 16 to 64, several tiles.
SIZES = st.sampled_from([3, 1, 2, 0, 5, 7, 8, 13, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65])
FEW = st.sampled_from([3, 1, 2, 0, 5, 7, 8])
ELEMENTS = 5000  # of a tensor, or an example would take seconds
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])


def _bounded(*sizes: int) -> tuple[int, ...]:
    """The sizes, the later ones cut where ``ELEMENTS`` are reached."""
    room, bounded = ELEMENTS, []
    for size in sizes:
        bounded.append(min(size, room))
        room //= max(1, bounded[-1])
    return tuple(bounded)


def _product(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    features, outputs = draw(SIZES), draw(SIZES)
    lead = [draw(SIZES)] if draw(st.booleans()) else draw(st.lists(FEW, max_size=3))
    features, *lead = _bounded(features, *lead)
    shapes = {"input": (*lead, features), "weight": (outputs, features)}
    return shapes | _bias(draw, outputs), _activation(draw, op)


def _bias(draw: Draw, outputs: int) -> Named:
    return {"bias": (outputs,)} if draw(st.booleans()) else {}


def _activation(draw: Draw, op: str) -> dict[str, Any]:
    if "act" not in op.split("_")[-1]:
        return {}
    name = draw(st.sampled_from(sorted(PARAMETERS)))
    given = {p: draw(st.sampled_from([0.5, 1.0, 2.0])) for p in PARAMETERS[name] if draw(st.booleans())}
    return {"activation": name, **given}


def _conv(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    dimensions = int(re.findall(r"\d", op)[0])
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = draw(st.sampled_from([1, 2, 3, 8, 0])), draw(st.sampled_from([1, 2, 5, 8]))

    def each(values: Sequence[Any]) -> Any:
        if draw(st.booleans()):
            return draw(st.sampled_from(values))
        return tuple(draw(st.sampled_from(values)) for _ in range(dimensions))

    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dimensions))
    # Few positions: the interpreter adds them up one after the other, which in the long run errs more than torch does.
    size = tuple(draw(st.integers(1, (24, 7, 4)[dimensions - 1])) for _ in range(dimensions))
    options = {"stride": each([1, 2, 3]), "padding": each([0, 1, 2]), "dilation": each([1, 2]), "groups": groups}
    if draw(st.integers(0, 7)) == 0:
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
    options = {name: value for name, value in options.items() if draw(st.booleans())} | {"groups": groups}
    lead = (draw(st.sampled_from([2, 1, 3, 0])),) if draw(st.integers(0, 5)) else ()
    shapes = {"input": (*lead, channels * groups, *size), "weight": (outputs * groups, channels, *kernel)}
    return shapes | _bias(draw, outputs * groups), options | _activation(draw, op)


def _shape(draw: Draw) -> tuple[int, ...]:
    """Up to four dimensions, the last one of any size, a thousand elements and more if there are fewer dimensions."""
    sizes = [draw(FEW) for _ in range(draw(st.integers(0, 3)))]
    if draw(st.booleans()):
        sizes.append(draw(SIZES))
    return (draw(st.sampled_from([1024, 1025, 2500])),) if not sizes and draw(st.booleans()) else _bounded(*sizes)


def _pair(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    shape = _shape(draw)
    if op == "add_relu":
        return {"input": shape, "other": shape}, {}
    options = {"reduction": draw(REDUCTIONS)}
    bound = {"smooth_l1_loss": "beta", "huber_loss": "delta"}.get(op)
    if bound and draw(st.booleans()):
        options[bound] = draw(st.sampled_from([0.5, 1.0, 2.0] + ([0.0] if bound == "beta" else [])))
    weights = {"weight": shape} if op != "smooth_l1_loss" and draw(st.integers(0, 3)) == 0 else {}
    return {"input": shape, "target": shape} | weights, options


def _bce(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    shape = _shape(draw)

    def weight() -> tuple[int, ...]:
        kept = shape[draw(st.integers(0, len(shape))) :]
        return tuple(draw(st.sampled_from([size, 1])) for size in kept)

    weights = {name: weight() for name in ("weight", "pos_weight") if draw(st.booleans())}
    return {"input": shape, "target": shape} | weights, {"reduction": draw(REDUCTIONS)}


def _entropy_options(draw: Draw, probabilities: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"reduction": draw(REDUCTIONS)}
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.1, 1.0, 0.0]))
    if not probabilities and draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([0, 1, -1, 7]))
    return options


def _cross_entropy(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    classes = draw(st.sampled_from([3, 1, 2, 5, 17, 65, 130, 1100]))
    lead = [draw(SIZES)] if draw(st.integers(0, 7)) else []
    _, *sizes = _bounded(classes, *lead, *(draw(st.lists(FEW, max_size=2)) if lead else []))
    lead, positions = tuple(sizes[: len(lead)]), tuple(sizes[len(lead) :])
    probabilities = draw(st.integers(0, 2)) == 0
    shape = (*lead, classes, *positions)
    shapes: Named = {"input": shape, "target": shape if probabilities else (*lead, *positions)}
    weights = {"weight": (classes,)} if draw(st.booleans()) else {}
    return shapes | weights, _entropy_options(draw, probabilities)


def _linear_cross_entropy(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    classes, features = draw(st.sampled_from([3, 1, 2, 17, 65])), draw(SIZES)
    lead = (draw(SIZES),) if draw(st.integers(0, 7)) else ()
    positions = tuple(draw(st.lists(st.sampled_from([2, 1, 3]), max_size=2))) if lead else ()
    _, features, *lead = _bounded(classes * int(np.prod(positions)), features, *lead)
    probabilities = draw(st.integers(0, 2)) == 0
    logits = (*lead, classes, *positions)
    shapes: Named = {
        "input": (*lead, features),
        "linear_weight": (classes, *positions, features),
        "target": logits if probabilities else (*lead, *positions),
    }
    biases = {"linear_bias": (classes, *positions)} if draw(st.booleans()) else {}
    weights = {"weight": (classes,)} if draw(st.booleans()) else {}
    return shapes | biases | weights, _entropy_options(draw, probabilities)


def _batch_norm(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    channels, training = draw(SIZES), draw(st.booleans())
    channels, samples, *positions = _bounded(
        channels, draw(SIZES), *draw(st.lists(st.sampled_from([3, 1, 2, 7, 8, 17]), max_size=3))
    )
    shape = (samples, channels, *positions)
    shapes: Named = {"input": shape} | ({"other": shape} if "add" in op else {})
    options: dict[str, Any] = {"training": training}
    if not training or draw(st.booleans()):
        shapes |= {"running_mean": (channels,), "running_var": (channels,)}
    else:
        options |= {"running_mean": None, "running_var": None}
    shapes |= {name: (channels,) for name in ("weight", "bias") if draw(st.booleans())}
    if draw(st.booleans()):
        options["eps"] = draw(st.sampled_from([0.1, 1e-3]))
    if draw(st.booleans()):
        options["momentum"] = draw(st.sampled_from([0.5, 1.0, 0.0]))
    return shapes, options | _activation(draw, op)


def _max_pool(draw: Draw, op: str) -> tuple[Named, dict[str, Any]]:
    """Windows that lie wholly in the padding are torch's: its own second derivative fails there."""
    size = tuple(draw(st.integers(3, 12)) for _ in range(2))
    lead = (draw(st.sampled_from([2, 1, 3])),) if draw(st.integers(0, 5)) else ()
    options = {
        "kernel_size": draw(st.sampled_from([2, 3, (2, 3), 1])),
        "stride": draw(st.sampled_from([None, 1, 2, (1, 2), 3])),
        "ceil_mode": draw(st.booleans()),
    }
    if options["kernel_size"] != 1 and draw(st.booleans()):
        options["padding"] = 1
    return {"input": (*lead, draw(st.sampled_from([3, 1, 8, 16, 17])), *size)}, options


FAMILIES: dict[str, Callable[[Draw, str], tuple[Named, dict[str, Any]]]] = {
    r"linear(_relu|_act)?": _product,
    r"conv(_relu|_act)?[123]d": _conv,
    r"add_relu|(mse|l1|smooth_l1|huber)_loss": _pair,
    r"binary_cross_entropy_with_logits": _bce,
    r"cross_entropy": _cross_entropy,
    r"linear_cross_entropy": _linear_cross_entropy,
    r"batch_norm(_add)?_(relu|act)": _batch_norm,
    r"relu_max_pool2d": _max_pool,
}


@st.composite
def calls(draw: Draw, op: str) -> Call:
    """Calls of a public op, one in six of them with something wrong about it."""
    family = next(family for pattern, family in FAMILIES.items() if re.fullmatch(pattern, op))
    shapes, options = family(draw, op)
    dtype, values = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(VALUES))
    if "batch_norm" in op and (dtype, values) == ("float64", "equal"):
        values = "normal"  # torch adds float32 up in float64: without rounded inputs it has no error to compare with
    if values == "special" and (options.get("activation") in ("relu6", "hardswish", "elu") or "conv_act" in op):
        values = "normal"  # torch's slope at NaN depends on where that lies; in convolutions it meets the padding
    if op == "linear_cross_entropy" and values == "subnormal":
        values = "normal"  # README: in chunks, what is subnormal loses digits before it is scaled
    if options.get("activation") == "gelu_tanh" and values == "large":
        values = "normal"  # in its tails torch gives 0, in float64 too, where kernels give the 1e-34 that it is
    parameters_in_float32 = "batch_norm" in op and dtype in ("bfloat16", "float16") and draw(st.booleans())
    if parameters_in_float32:  # torch adds few 16-bit numbers up without an error: the running mean would have none
        options |= {"momentum": 0.5} if options.get("momentum") == 1.0 else {}
        values = "normal" if values == "subnormal" else values
    tensors: dict[str, Given] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        layout = draw(st.sampled_from(LAYOUTS))
        own_dtype, own_values = dtype, values
        if "batch_norm" in op and name not in ("input", "other"):
            layout = "contiguous"  # torch reads beyond a parameter that is expanded
            own_dtype = "float32" if parameters_in_float32 else dtype
        if name == "target" and "cross_entropy" in op:
            own_values = "probabilities"
        elif name == "running_var" or (name in ("weight", "pos_weight") and not _is_factor(op)):
            own_values = "positive"
        elif name == "running_mean" and not options["training"]:
            own_values = "small"  # where it equals the input, torch's result is rounding, and so is what its ReLU does
        elif values == "special" and "batch_norm" in op and name not in ("input", "other"):
            own_values = "normal"  # where a factor is infinite torch's result depends on the layout
        elif values == "special" and "batch_norm" in op and "running_mean" in shapes and options["training"]:
            own_values = "finite or NaN"  # README: the running mean of infinite values is NaN
        elif values == "special" and "conv" in op and name == "weight":
            own_values = "normal"  # README: NaN and infinity meet the zeros of the padding
        tensors[name] = Given(shape, own_dtype, layout, own_values, seed=number)
    if re.fullmatch("(linear_)?cross_entropy", op) and (target := tensors["target"]).shape != _logits(tensors):
        classes = max(1, _logits(tensors)[min(1, len(_logits(tensors)) - 1)])
        low, high = draw(st.sampled_from([(0, classes), (0, classes), (-1, classes), (0, classes + 1)]))
        tensors["target"] = replace(target, dtype="int64", values="normal", low=low, high=high)
    variables = [n for n in tensors if tensors[n].dtype != "int64" and not n.startswith("running")]
    call = Call(
        op,
        tensors,
        options,
        tuple(name for name in variables if draw(st.integers(0, 3))),
        (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(VALUES[:2]))),
        draw(st.sampled_from(("triton", "triton", "triton", "triton", "onednn", "torch"))),
        draw(st.booleans()),
        draw(st.sampled_from(("forward", "forward", "reverse", "shuffled"))),
    )
    return _spoilt(draw, call) if draw(st.integers(0, 5)) == 5 else call


def _is_factor(op: str) -> bool:
    """Whether ``weight`` is a factor that may have any sign, and no weight of a loss."""
    return re.match(r"linear(_relu|_act)?$|conv|batch_norm", op) is not None


def _logits(tensors: dict[str, Given]) -> tuple[int, ...]:
    if "linear_weight" not in tensors:
        return tensors["input"].shape
    return (*tensors["input"].shape[:-1], *tensors["linear_weight"].shape[:-1])


def _spoilt(draw: Draw, call: Call) -> Call:
    """The call with one thing changed that may be wrong."""
    name = draw(st.sampled_from(sorted(call.tensors)))
    given = call.tensors[name]
    how = draw(st.sampled_from(("drop", "grow", "more", "dtype", "option", "int")))
    if how == "option" and call.options:
        option = draw(st.sampled_from(sorted(call.options)))
        return replace(call, options=call.options | {option: draw(st.sampled_from((None, -1, 0, 2.5, "bad", (1, 2))))})
    if how == "drop" and given.shape:
        changed = replace(given, shape=given.shape[1:])
    elif how == "grow" and given.shape:
        axis = draw(st.integers(0, len(given.shape) - 1))
        changed = replace(given, shape=tuple(size + (i == axis) for i, size in enumerate(given.shape)))
    elif how == "more":
        changed = replace(given, shape=(1, *given.shape))
    elif how == "int":
        changed = replace(given, dtype="int32", high=2)
    else:
        changed = replace(given, dtype=draw(st.sampled_from(DTYPES)))
    needs = tuple(n for n in call.needs if n != name or "int" not in changed.dtype)
    return replace(call, tensors=call.tensors | {name: changed}, needs=needs)
