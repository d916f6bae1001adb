"""`torch.compile(model, backend="fastops")` of a head and its loss, as causal language models write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import no_fallback
from interpreter.accuracy import Run, assert_as_accurate_as_torch
from torch import Tensor, nn

import fastops

pytestmark = no_fallback
CLASSES = 13


@pytest.fixture(autouse=True)
def small_budget(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastops.kernels.chunked_logits.BUDGET", 100)


def as_transformers(logits: Tensor, labels: Tensor, items: int | None = None) -> Tensor:
    """ForCausalLMLoss."""
    logits = logits.float()
    labels = F.pad(labels, (0, 1), value=-100)
    shifted = labels[..., 1:].contiguous().view(-1).to(logits.device)
    loss = F.cross_entropy(logits.view(-1, CLASSES), shifted, ignore_index=-100, reduction="sum" if items else "mean")
    return loss / items if items else loss


def shifted_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers wrote it before."""
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, CLASSES), labels[..., 1:].contiguous().view(-1))


def kept_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, 1:].reshape(-1, CLASSES).float(), labels[:, 1:].flatten(), label_smoothing=0.1)


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    return as_transformers(30 * torch.tanh(logits / 30), labels)


def with_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return as_transformers(logits, labels) + logits.sum()


def labels_changed(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.clone()
    rows = logits.view(-1, CLASSES)
    labels[0] = -100
    return F.cross_entropy(rows, labels.view(-1))


def classes_cut(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[..., 1:].reshape(-1, CLASSES - 1), labels.view(-1).clamp(max=CLASSES - 2))


def other_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(CLASSES, -1).float(), labels.view(-1)[:CLASSES])


def chosen(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, [0, 2]].reshape(-1, CLASSES), labels[:, [0, 2]].reshape(-1))


def by_position(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[0], labels[0])


def no_grad_between(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)) + 0 * logits.sum()


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, str]] = {
    "transformers": (as_transformers, ""),
    "number of items": (lambda logits, labels: as_transformers(logits, labels, 7), ""),
    "shifted logits": (shifted_logits, ""),
    "smoothed": (kept_labels, ""),
    "capped": (capped, "truediv changes its output"),
    "logits used": (with_logits, "the output of 0 is used elsewhere too"),
    "labels changed": (labels_changed, "a tensor changes between rows and it"),
    "classes cut": (classes_cut, "clamp runs between 0 and it"),
    "other rows": (other_rows, "its input is not a row of logits for each target"),
    "chosen": (chosen, "its input is not a row of logits for each target"),
    "one of the batch": (by_position, "its input is not a row of logits for each target"),
    "no_grad": (no_grad_between, "used elsewhere too"),
}


class Model(nn.Sequential):
    def __init__(self, loss: Loss, bias: bool = True) -> None:
        super().__init__(nn.Linear(6, CLASSES, bias))
        self.loss = loss

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self[0](hidden), labels)


def gradients(model: nn.Module, hidden: Tensor, labels: Tensor) -> list[Tensor]:
    hidden = hidden.detach().requires_grad_()
    loss = model(hidden, labels)
    variables = [hidden, *model.parameters()]
    return [loss.detach(), *(torch.autograd.grad(loss, variables) if loss.requires_grad else ())]


def draw(rows: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(2, rows, 6), torch.randint(CLASSES, (2, rows))


# Each compiler and each way once: they know nothing of each other.
@pytest.mark.parametrize(("compiler", "way"), [("aot_eager", "triton"), ("eager", "onednn")])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_fused_and_why_not(name: str, compiler: str, way: str) -> None:
    loss, reason = LOSSES[name]
    model = Model(loss)
    with fastops.backend(way):
        ours = torch.compile(copy.deepcopy(model), backend="fastops", options={"compiler": compiler}, fullgraph=True)
        for rows in (7, 9, 8):  # from the second on a symbolic size
            batch = draw(rows)
            torch.testing.assert_close(gradients(ours, *batch), gradients(model, *batch))
    outcomes = [row.outcome for row in fastops.compile.report().rows if row.layer == "cross_entropy"]
    if reason:
        assert outcomes and all("; not fused with 0: " in outcome and reason in outcome for outcome in outcomes)
    else:
        assert set(outcomes) == {"fused with 0"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_upcast_logits(dtype: torch.dtype) -> None:
    """torch rounds 16-bit logits before it upcasts them; the kernels do not."""
    model = Model(as_transformers).to(dtype)

    def reference(hidden: Tensor, *rest: Tensor) -> list[Tensor]:
        *parameters, labels = rest
        variables = [tensor.detach().requires_grad_() for tensor in (hidden, *parameters)]
        logits = F.linear(*variables)
        loss = exact(logits, labels) if hidden.dtype is torch.float64 else as_transformers(logits, labels)
        return [t.to(hidden.dtype) for t in (loss.detach(), *torch.autograd.grad(loss, variables))]

    def run() -> Run:
        hidden, labels = draw()
        hidden = hidden.to(dtype)
        with fastops.backend("triton"):
            found = gradients(ours, hidden, labels)
        assert found[0].dtype is torch.float32
        return [t.to(dtype) for t in found], (hidden, *model.parameters(), labels)

    ours = torch.compile(model, backend="fastops", options={"compiler": "aot_eager"}, fullgraph=True)
    runs = [run() for _ in range(4)]
    assert {row.outcome for row in fastops.compile.report().rows if row.layer == "cross_entropy"} == {"fused with 0"}
    if dtype is not torch.float64:  # whose loss is in float32
        assert_as_accurate_as_torch(reference, *runs)


def exact(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model, batch = Model(as_transformers), draw()
    with fastops.backend("triton"), torch.autocast("cpu", dtype):
        ours = torch.compile(copy.deepcopy(model), backend="fastops", options={"compiler": "aot_eager"})
        found, expected = gradients(ours, *batch), gradients(model, *batch)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for result, torchs in zip(found, expected, strict=True):
        assert (result - torchs).norm() <= 8 * torch.finfo(dtype).eps * torchs.norm()
    assert {row.outcome for row in fastops.compile.report().rows if row.layer == "cross_entropy"} == {"fused with 0"}


def test_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastops.kernels.chunked_logits.BUDGET", 1 << 20)
    with fastops.backend("triton"):
        torch.compile(Model(as_transformers), backend="fastops", options={"compiler": "eager"})(*draw())
    (row,) = (row for row in fastops.compile.report().rows if row.layer == "cross_entropy")
    assert row.outcome.endswith("(triton); not fused with 0: all logits fit into the memory budget at once")


def test_language_model() -> None:
    """The loss alone leaves the compiled function: what it returns cannot be fused away."""
    transformers = pytest.importorskip("transformers", reason="the extra frameworks is not installed")
    options: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=CLASSES, num_attention_heads=2, **options)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(CLASSES, (2, 7))

    def loss(input: Tensor) -> Tensor:
        result: Tensor = model(input_ids=input, labels=input, use_cache=False).loss
        return result

    with fastops.backend("triton"):
        compiled = torch.compile(loss, backend="fastops", options={"compiler": "aot_eager"}, fullgraph=True)
        found, expected = (torch.autograd.grad(f(tokens), list(model.parameters())) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)
    assert [row.outcome for row in fastops.compile.report().rows if row.layer == "cross_entropy"] == [
        "fused with lm_head"
    ]
