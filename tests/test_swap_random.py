"""Random modules of a user's, swapped and not: the same values, gradients, buffers, errors and effects, step by step.

What fails is printed as the whole source of a file: ``compare(source)`` fails again.
"""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
from cases import onednn_in_float64
from hypothesis import given, note, settings
from random_modules import load, sources, unload
from swap_models import count_fused, words
from torch import Tensor, nn

import fastops
from fastops.recognition import LEFT_ALONE

pytestmark = pytest.mark.usefixtures("no_interpreter")

ROWS = 3
seed = (
    torch.default_generator.manual_seed
)  # `torch.manual_seed` does it for devices too, which takes longer than a model


def flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def outcome(model: nn.Module, module: Any, step: str) -> dict[str, Any]:
    """All that can be seen of one call, with its backward pass in "train" and "eval"; or the error."""
    seed(1)
    rows = int(step.split()[-1]) if step[-1].isdigit() else ROWS
    x = torch.randn(rows, *module.SHAPE, dtype=module.DTYPE)
    module.SEEN.clear()
    model.zero_grad()
    x.requires_grad_(not step.startswith("infer"))
    error, outputs = "", []
    try:
        with torch.set_grad_enabled(not step.startswith("infer")):
            outputs = flat(model(x))
        loss = sum(output.double().square().sum() for output in outputs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
    except Exception as raised:
        error = words(raised)
    return {
        "error": error,
        "outputs": [output.detach() for output in outputs],
        "requires_grad": [output.requires_grad for output in outputs],
        "gradients": [] if error else [x.grad, *(p.grad for p in model.parameters())],
        "state": list(model.state_dict().items()),
        "seen": list(module.SEEN),
        "random state": torch.get_rng_state(),
    }


def same(found: Any, expected: Any, exact: bool) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype is not expected.dtype:
            return False
        if exact or not expected.is_floating_point():
            return torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        scale = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
        return torch.allclose(found, expected, rtol=1e-9, atol=1e-10 * (1 + scale), equal_nan=True)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key], exact) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected, [exact] * len(expected)))
    return bool(found == expected)


def assert_same(found: dict[str, Any], expected: dict[str, Any], exact: bool, where: str) -> None:
    for key, value in expected.items():
        assert same(found[key], value, exact), f"{where}: {key} differs\n{found[key]}\nbut eager\n{value}"


def shape_of(model: nn.Module) -> list[Any]:
    """What `swap` may not touch: names, attributes, hooks and modes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (
            path,
            [name for name in vars(m) if name != LEFT_ALONE],
            m.training,
            [len(getattr(m, name)) for name in hooks],
            type(m).__name__,
        )
        for path, m in model.named_modules()
    ]


def classes_of(model: nn.Module) -> list[Any]:
    return [[(c.__module__, c.__qualname__) for c in type(m).__mro__] for m in model.modules()]


def both(action: Any, *models: nn.Module) -> tuple[list[Any], str]:
    """What ``action`` makes of each, and the error, which is the same."""
    results, errors = [], []
    for model in models:
        seed(2)
        try:
            results.append(action(model))
            errors.append("")
        except Exception as error:
            results.append(None)
            errors.append(words(error))
    assert len(set(errors)) == 1, errors
    return results, errors[0]


_IN_PLACE = "modified by an inplace operation"
COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def swap(model: nn.Module, draw: random.Random | None) -> nn.Module:
    """Swap it, with a choice that is drawn among its modules."""
    known = [part for path, module in model.named_modules() for part in (path, type(module))]
    options = () if draw is None else draw.sample(("include", "exclude"), draw.randrange(3))
    choice: dict[str, Any] = {option: draw.choices(known, k=draw.randrange(4)) for option in options if draw}
    return fastops.swap(model, **choice)


def compare(source: str, choose: bool = False) -> int:
    """Make the model of this file twice, swap one of them, and do with both what the file says.

    Returns how many activations the swap fused, by its report.
    """
    module = load(source, "random_module")
    try:
        with fastops.backend(module.WAY), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compare(module, random.Random(source) if choose else None)
    finally:
        unload(module)


def _compare(module: Any, draw: random.Random | None) -> int:
    models = []
    for _ in range(2):
        seed(0)
        models.append(module.make().to(module.DTYPE))
        module.prepare(models[-1])
    eager, swapped = models
    assert swap(swapped, draw) is swapped
    report = fastops.report(swapped)
    assert not any("its source" in row.outcome for row in report.rows), report
    for number, step in enumerate([*module.STEPS, "unswap", "train"]):
        where = f"step {number}, {step if isinstance(step, str) else step.__name__}"
        if not isinstance(step, str):
            both(step, eager, swapped)
        elif step in COPIES:
            (one, other), error = both(COPIES[step], eager, swapped)
            if not error:
                eager, swapped = one, other
        elif step == "swap":
            swap(swapped, draw)
        elif step == "report":
            str(fastops.report(swapped))
        elif step == "unswap":
            fastops.unswap(swapped)
            assert classes_of(swapped) == classes_of(eager), where
        else:
            for model in (eager, swapped):
                if not step.startswith("call"):
                    model.train(step.startswith("train"))
            found, expected = (outcome(model, module, step) for model in (swapped, eager))
            # Kernels save other tensors for the gradient than torch does: what may not be changed in place differs.
            refused = [_IN_PLACE in one["error"] for one in (found, expected)]
            if module.WAY != "onednn" or not any(refused):
                assert_same(found, expected, module.WAY == "torch", where)
        assert shape_of(swapped) == shape_of(eager), where
    return report.fused


@settings(max_examples=8 * settings.default.max_examples)  # type: ignore[union-attr]
@given(sources())
def check(source: str) -> None:
    note(source)
    compare(source)


@settings(max_examples=2 * settings.default.max_examples)  # type: ignore[union-attr]
@given(sources())
def check_choices(source: str) -> None:
    note(source)
    fused_by_choice.append(compare(source, choose=True))


fused_by_choice: list[int] = []


def test_random_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    fused_by_choice.clear()
    check_choices()
    assert sum(fused_by_choice) > 20, "too little was fused for this to say anything"


def test_random_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_in_float64(monkeypatch)
    fused = count_fused(monkeypatch)
    check()
    assert len(fused) > 100, "too little was fused for this to say anything"
