"""What launches compile: the audit compiles the same, and a batch of another size compiles nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision.models import resnet18
from triton import knobs
from triton.compiler import make_backend
from triton.runtime.driver import driver

import fastops
from fastops import dispatch
from fastops.audit import launches
from fastops.audit.launches import AUDITED
from fastops.audit.machine_code import gpu_target, source
from fastops.ops.op import Explanation, Op


@pytest.mark.parametrize("target", ["sm90", "gfx1100"])
def test_an_audit_compiles_what_a_launch_would(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, constants, attributes and options, for the first arguments of each kernel's launcher."""
    asked: list[dict[str, Any]] = []
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    original = launches._request

    def launched(target: str, kernel: Any, values: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
        request = original(target, kernel, values, constants)
        if request["kernel"] not in found:
            launches.jit_function(kernel)[(1,)](*values, **constants)
            found[request["kernel"]] = request, asked[-1]
        return request

    def hook(compile: dict[str, Any], **_: Any) -> bool:
        asked.append(compile)
        return True  # nothing is compiled

    gpu = gpu_target(target)
    active = SimpleNamespace(
        get_current_target=lambda: gpu, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(launches, "_request", launched)
    launches.launches(target, list(AUDITED))
    assert len(found) > 15
    for request, compiled in found.values():
        words = {name: request.pop(name) for name in ("kernel", "architecture", "types", "constants", "attributes")}
        program = source(**words)
        assert program.signature == compiled["signature"], words["kernel"]
        assert program.constants == compiled["constants"], words["kernel"]
        (attributes,) = compiled["configs"]
        assert program.attrs == {place: each for place, each in attributes.items() if each}, words["kernel"]
        options = make_backend(gpu).parse_options(request)
        assert all(getattr(options, name) == compiled[name] for name in ("num_warps", "num_stages")), words["kernel"]


def test_a_batch_of_another_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of ResNet-18 with a batch of 31 after one of 32, and with smaller images.

    But for batch norms, whose tiles follow the number of positions, and for what brings NCHW to channels last, whose
    accesses are as wide as 7 x 7 or 6 x 6 positions allow.
    """

    def way(op: Op, arguments: tuple[Any, ...], _: object) -> Explanation:
        return dispatch._SELECTED_TRITON if op.accepts(*arguments) is None else dispatch._SELECTED_TORCH

    monkeypatch.setattr(dispatch, "_way", way)
    with torch.device("meta"):
        model, criterion = fastops.swap(resnet18()), fastops.swap(torch.nn.CrossEntropyLoss())

    def compilations(batch: int, size: int) -> dict[str, launches.Launch]:
        def step() -> None:
            images = torch.empty(batch, 3, size, size, device="meta")
            criterion(model(images), torch.empty(batch, dtype=torch.int64, device="meta")).backward()

        _, requests = launches.recorded("sm90", None, "ieee", step)
        return {repr(request): launches.Launch("", request, "") for request in requests}

    first = compilations(32, 224)
    assert len(first) > 40
    for batch, size in ((31, 224), (32, 192)):
        new = [launch for request, launch in compilations(batch, size).items() if request not in first]
        new = [
            launch for launch in new if not re.search(r"\.(batch_norm_device|channels_last):", launch.request["kernel"])
        ]
        assert not new, [f"{launch.kernel} {launch.config}" for launch in new]
