"""`torch.compile(model, backend="fastops")`: modules of a model that run as one op with what stands beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from compiling import Recorder, compiled, leaves
from torch import Tensor, nn

import fastops
from fastops.compile import compile_graph

pytestmark = [
    no_fallback,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


# A head and its loss --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A linear layer and the cross-entropy of its logits; ``variant`` says what happens to and between them."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant, self.layer = variant, nn.Linear(6, 9)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        target = target.clone()
        logits = self.layer(x)
        if self.variant == "target changed between":
            target[0] = -100
        if self.variant == "view between":
            target = target.reshape(-1)
        options = {"label_smoothing": 0.1, "ignore_index": 3} if self.variant == "options" else {}
        loss = F.cross_entropy(logits, target, **options)
        return loss + logits.sum() if self.variant == "logits used elsewhere" else loss


@pytest.mark.parametrize("backend", ["triton", "onednn"])
@pytest.mark.parametrize(
    "variant", ["plain", "options", "view between", "target changed between", "logits used elsewhere", "small"]
)
def test_head_is_fused_with_its_loss(variant: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant != "small":
        monkeypatch.setattr("fastops.kernels.chunked_logits.BUDGET", 100)
    model, recorder = Head(variant), Recorder()
    x, target = torch.randn(5, 6, requires_grad=True), torch.tensor([0, 3, 8, 1, 3])
    expected = model(x, target)
    with fastops.backend(backend):
        twin = compiled(model, recorder)
        found = twin(x, target)
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found, [x, *twin.parameters()])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, *model.parameters()]))
    assert ("linear_cross_entropy" in recorder.calls) == (variant in ("plain", "options", "view between"))


# Batch norms with a sum -----------------------------------------------------------------------------------------------


class BlockEnd(nn.Module):
    """The end of a residual block; ``variant`` says how the two summands come together."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.shortcut, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        if self.variant == "shared batch norm":
            return F.relu(self.norm(self.conv(x)) + self.norm(self.shortcut(x)))
        out = self.norm(self.conv(x))
        if self.variant == "used elsewhere":
            return F.relu(out + x), out
        if self.variant == "sum used elsewhere":
            out = out + x
            return F.relu(out), out
        if self.variant == "changed between":
            x = x * 1
            y = F.relu(out + x.mul_(2))
            return y
        if self.variant == "into what others see":
            y = x * 1
            z = y.view(-1)
            y += out
            return F.relu(y), z
        if self.variant == "mode between":
            out = out + x
            with torch.no_grad():
                return F.relu(out)
        if self.variant == "other order":
            return torch.relu(torch.add(x, out))
        if self.variant == "broadcast":
            return F.relu(out + x[:, :1])
        if self.variant == "two batch norms":
            out += self.other(self.shortcut(x))
        else:
            out += x
        return F.relu(out, inplace=True)


BLOCK_ENDS = {
    "plain": 1,
    "two batch norms": 1,
    "shared batch norm": 1,
    "other order": 1,
    "used elsewhere": 0,
    "sum used elsewhere": 0,
    "changed between": 0,
    "into what others see": 0,
    "mode between": 0,
    "broadcast": 0,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", BLOCK_ENDS)
def test_batch_norm_with_a_sum_and_relu(variant: str, training: bool) -> None:
    model, recorder = BlockEnd(variant).double().train(training), Recorder()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    twin = copy.deepcopy(model)
    with fastops.backend("triton"):
        ours = torch.compile(twin, backend=compile_graph, options={"compiler": recorder}, fullgraph=True)
        found = [leaf for _ in range(2) for leaf in leaves(ours(x))]
    expected = [leaf for _ in range(2) for leaf in leaves(model(x))]
    torch.testing.assert_close([*found, *twin.buffers()], [*expected, *model.buffers()])
    if variant != "mode between":
        for outputs in (found, expected):
            sum(output.square().sum() for output in outputs if output.requires_grad).backward()
        gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (twin, model)]
        torch.testing.assert_close(*gradients)
    assert recorder.calls.count("batch_norm_add_relu") == BLOCK_ENDS[variant]
    rows = [row.outcome for row in fastops.compile.report().rows if row.layer == "relu"]
    norm = {"two batch norms": "other"}.get(variant, "norm")
    assert (rows == [f"fused with {norm} and the sum"]) == bool(BLOCK_ENDS[variant])


class Pooled(nn.Module):
    """``after`` is what follows the group norm."""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.after = nn.GroupNorm(2, 4), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.norm(x))


def pooled_view(x: Tensor) -> Tensor:
    """Nothing says that a view is not changed in place before the backward pass."""
    y = x.flatten(0, 1)
    result = F.max_pool2d(F.relu(y), 2)
    x.add_(1)
    return result


POOLED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "modules": (nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), 1),
    "functions": (lambda x: F.max_pool2d(x.relu(), kernel_size=2, stride=1), 1),
    "function of torch": (lambda x: torch.max_pool2d(torch.relu(x), 2), 1),
    "indices": (lambda x: F.max_pool2d(F.relu(x), 2, return_indices=True), 0),
    "ReLU seen elsewhere": (lambda x: [r := F.relu(x), F.max_pool2d(r, 2)], 0),
    "norm seen elsewhere": (lambda x: [x.sum(), F.max_pool2d(F.relu(x), 2)], 0),
    "a view": (pooled_view, 0),
    "another activation": (lambda x: F.max_pool2d(F.gelu(x), 2), 0),
}


@pytest.mark.parametrize("name", POOLED)
def test_pooling_behind_a_relu_that_has_no_layer(name: str) -> None:
    after, fused = POOLED[name]
    model, recorder = Pooled(after), Recorder()
    x = torch.randn(2, 4, 7, 9)
    found = []
    with fastops.backend("triton"):
        for each in (compiled(model, recorder, fullgraph=True), model):
            leaf = x.clone().requires_grad_()
            outputs = leaves(each(leaf))
            sum(output.sum() for output in outputs if output.is_floating_point()).backward()
            found.append([*outputs, leaf.grad])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert recorder.calls.count("relu_max_pool2d") == fused == fastops.compile.report().fused


def test_a_layer_keeps_its_relu_before_a_pooling() -> None:
    recorder = Recorder()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    with fastops.backend("triton"):
        compiled(model, recorder, fullgraph=True)(torch.randn(2, 3, 7, 9))
    assert "conv_relu2d" in recorder.calls and "relu_max_pool2d" not in recorder.calls
