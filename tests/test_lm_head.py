"""`fastops.fuse_lm_head`: the loss of causal language models of transformers without their logits."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import no_fallback
from interpreter.accuracy import Run, assert_as_accurate_as_torch
from language_models import FUSED, GEMMA, LLAMA, VOCABULARY, Config, batch, exact_loss, make, step, with_own_loss
from torch import Tensor, nn

import fastops

transformers = pytest.importorskip("transformers", reason="the extra frameworks is not installed")

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

REFUSED: dict[str, tuple[Config, str]] = {
    "CohereForCausalLM": (
        ("CohereConfig", LLAMA),
        r"scales or caps the logits before the loss: {'logit_scale': 0.0625}",
    ),
    "Gemma2ForCausalLM": (
        ("Gemma2Config", GEMMA),
        "scales or caps the logits before the loss: {'final_logit_softcapping': 30.0",
    ),
    "GraniteForCausalLM": (
        ("GraniteConfig", LLAMA),
        "scales or caps the logits before the loss: {'logits_scaling': 1.0}",
    ),
    "XLNetLMHeadModel": (("XLNetConfig", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}), "its loss: view"),
    "BertLMHeadModel": (
        ("BertConfig", {**LLAMA, "is_decoder": True}),
        "its head cls.predictions.decoder is not",
    ),
    "LlamaModel": (("LlamaConfig", LLAMA), r"it has no head \(get_output_embeddings\(\) is None\)"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in FUSED),
        *((name, torch.bfloat16) for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM")),
    ],
)
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    """In dropout's absence; through the kernels."""
    plain = make(name).eval().to(dtype)
    models = {kind: copy.deepcopy(plain).to(kind) for kind in (dtype, torch.float64)}
    models[torch.float64].loss_function = exact_loss
    names = [name for name, _ in plain.named_parameters()]

    def reference(*parameters: Tensor) -> list[Tensor]:
        own = [p.detach().requires_grad_() for p in parameters]
        model = models[own[0].dtype]
        loss = torch.func.functional_call(model, dict(zip(names, own, strict=True)), (), batch()).loss
        return [loss.detach().to(own[0].dtype), *torch.autograd.grad(loss, own)]

    def run(scale: float) -> Run:
        model = copy.deepcopy(plain)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        with fastops.backend("triton"):
            fastops.fuse_lm_head(model)
            output = model(**batch())
            gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        assert output.logits is None and output.loss.dtype is torch.float32
        return [output.loss.detach().to(dtype), *gradients], list(model.parameters())

    assert_as_accurate_as_torch(reference, run(1), run(1.5))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config, reason = REFUSED[name]
    model = make(name, config)
    kind, names = type(model), dict(vars(model))
    with pytest.raises(ValueError, match=f"the head of {name} cannot be fused with its loss: .*{reason}"):
        fastops.fuse_lm_head(model)
    assert type(model) is kind and vars(model) == names


def with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def with_forward(model: Any) -> None:
    model.forward = model.forward


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (with_hook, "its head lm_head has hooks"),
    "another head": (
        lambda model: model.set_output_embeddings(nn.Sequential(model.lm_head)),
        "no linear layer, but Seq",
    ),
    "a head of its own": (lambda model: model.set_output_embeddings(Scaled(16, VOCABULARY)), "something of its own"),
    "another loss": (with_own_loss, "its loss_function is <function exact_loss"),
    "replaced forward": (with_forward, "its forward was replaced on the object"),
    "meta": (lambda model: model.to("meta"), "its weights are on the meta device"),
    "fails": (lambda model: model.set_input_embeddings(nn.Embedding(9, 16)), "its forward fails on eight tokens"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_refused_as_it_is(change: str) -> None:
    model = make()
    apply, reason = CHANGES[change]
    apply(model)
    with pytest.raises(ValueError, match=reason):
        fastops.fuse_lm_head(model)
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("state", ["float64", "bfloat16", "frozen", "inference mode", "autocast", "NaN"])
def test_fused_as_it_is(state: str) -> None:
    model = make()
    model.requires_grad_(state != "frozen")
    model.to({"float64": torch.float64, "bfloat16": torch.bfloat16}.get(state))
    if state == "NaN":
        model.lm_head.weight.detach()[3] = torch.nan
    with torch.inference_mode(state == "inference mode"), torch.autocast("cpu", enabled=state == "autocast"):
        output = fastops.fuse_lm_head(model)(**batch())
    assert output.logits is None and output.loss.isnan() == (state == "NaN") and output.loss.dtype is torch.float32


def test_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="it is no language model of transformers"):
        fastops.fuse_lm_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"its head model\.lm_head is not its own child"):
        wrapped = nn.Module()
        wrapped.model = make()
        wrapped.get_output_embeddings = wrapped.model.get_output_embeddings
        fastops.fuse_lm_head(wrapped)
    for function in (fastops.fuse_lm_head, fastops.unfuse_lm_head):
        with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, not str"):
            function("model")


def test_another_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the fused loss, in its value or in a gradient alone, is a reason to refuse."""
    original = fastops.functional.linear_cross_entropy
    for wrong in (lambda loss: 1.01 * loss, lambda loss: loss + 0.01 * (loss - loss.detach())):
        monkeypatch.setattr("fastops.functional.linear_cross_entropy", lambda *a, f=wrong, **k: f(original(*a, **k)))
        with pytest.raises(ValueError, match="would be another one"):
            fastops.fuse_lm_head(make())


# What a fused model is ------------------------------------------------------------------------------------------------


def test_check_leaves_no_trace() -> None:
    model = make("GPT2LMHeadModel")  # with dropout
    model.gradient_checkpointing_enable()
    model.transformer.register_buffer("count", torch.zeros(3))
    forward = type(model.transformer).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        self.count = self.count.clone()
        return forward(self, *args, **kwargs)

    step(model, **batch())
    gradients = [p.grad.clone() for p in model.parameters()]
    flags, buffers = [[getattr(m, "gradient_checkpointing", 0), m.training] for m in model.modules()], model._buffers
    count, random = model.transformer.count, torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.transformer), "forward", counting)
        fastops.fuse_lm_head(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.transformer.count is count and not count.any() and model._buffers is buffers
    assert [[getattr(m, "gradient_checkpointing", 0), m.training] for m in model.modules()] == flags
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert not model.lm_head._forward_pre_hooks


def test_same_object_and_class() -> None:
    plain, model = make(), make()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert fastops.fuse_lm_head(model) is model and fastops.fuse_lm_head(model) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    kind = type(model)
    assert (
        issubclass(kind, type(plain)) and kind.__name__ == type(plain).__name__ and kind.__mro__[3] is not type(plain)
    )
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert fastops.unfuse_lm_head(model) is model
    assert type(model) is type(plain) and fastops.unfuse_lm_head(model) is model
    assert model(**batch()).logits is not None


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = fastops.fuse_lm_head(make())
    expected = model(**batch()).loss
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and twin(**batch()).logits is None
    with torch.no_grad():
        twin.lm_head.weight.zero_()  # its own
    assert twin(**batch()).loss != expected
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is transformers.LlamaForCausalLM
    torch.testing.assert_close(loaded(**batch()).loss, expected)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    for saved in (transformers.AutoModelForCausalLM.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        torch.testing.assert_close(saved.train()(**batch()).loss, expected)


CALLS: dict[str, dict[str, Any]] = {
    "no labels": {"labels": None},
    "last logits": {"labels": None, "logits_to_keep": 2},
    "labels of last logits": {"logits_to_keep": 4, "labels": batch()["labels"][:, -4:]},
    "positions": {"logits_to_keep": torch.tensor([0, 3, 5]), "labels": batch()["labels"][:, [0, 3, 5]]},
    "tuple": {"return_dict": False},
    "tuple without labels": {"return_dict": False, "labels": None},
    "number of items": {"num_items_in_batch": 7},
    "tensor of items": {"num_items_in_batch": torch.tensor(7)},
    "shifted": {"shift_labels": batch()["input_ids"].roll(1, 1)},
    "other index": {"ignore_index": 7, "labels": batch()["labels"].clamp(min=7)},
    "nothing counts": {"labels": torch.full((2, 9), -100)},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.ones(2, 9, 16)},
    "hidden states": {"output_hidden_states": True, "use_cache": False},
}


@pytest.mark.parametrize("way", ["torch", "onednn", "triton"])
@pytest.mark.parametrize("call", CALLS)
def test_calls(call: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastops.kernels.chunked_logits.BUDGET", 1000)
    plain = make()
    keywords = {**batch(), **CALLS[call]}
    with fastops.backend(way):
        model = fastops.fuse_lm_head(copy.deepcopy(plain))
        found, expected = model(**keywords), plain(**keywords)
        assert type(found) is type(expected)
        if keywords["labels"] is not None:
            if isinstance(expected, tuple):
                expected = (expected[0], *expected[2:])
            else:
                expected = type(expected)(**{**expected, "logits": None})
                assert list(found) == list(expected) and found.logits is None
        assert len(found) == len(expected)
        torch.testing.assert_close(leaves(found), leaves(expected), equal_nan=True)
        if keywords["labels"] is not None:
            found[0].backward(), expected[0].backward()
            gradients = ([p.grad for p in each.parameters()] for each in (model, plain))
            torch.testing.assert_close(*gradients, equal_nan=True)


def leaves(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple) else output.values()
    return [x for value in values for x in (value if isinstance(value, tuple) else [value]) if isinstance(x, Tensor)]


def test_no_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positional labels too; without gradients too."""
    model = fastops.fuse_lm_head(make())
    place = list(inspect.signature(model.forward).parameters).index("labels")
    tokens, labels = batch().values()
    seen: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            seen.extend(t.shape for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
            return result

    def made() -> bool:
        """Whether there were logits of more than the four rows of the memory budget."""
        return any(shape[-1:] == (VOCABULARY,) and shape[:-1].numel() > 4 for shape in seen)

    monkeypatch.setattr("fastops.kernels.chunked_logits.BUDGET", 4 * VOCABULARY * 4)
    for context in (torch.enable_grad(), torch.no_grad()):
        seen.clear()
        with fastops.backend("onednn"), context, Watch():
            assert model(tokens, *[None] * (place - 1), labels).logits is None
        assert not made()
    with Watch():
        assert model(tokens).logits is not None and made()


@pytest.mark.parametrize("rows", [4, 9])
def test_errors_are_those_of_transformers(rows: int) -> None:
    plain = make()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    tokens = batch()["input_ids"]
    wrong = {"labels": tokens[:, :rows] if rows == 4 else tokens + VOCABULARY}
    messages = []
    for each in (plain, model):
        with pytest.raises((ValueError, IndexError)) as raised:
            each(input_ids=tokens, **wrong)
        messages.append((type(raised.value), str(raised.value)))
    assert messages[0] == messages[1]


def test_evaluation_may_keep_its_logits() -> None:
    model = fastops.fuse_lm_head(make(), evaluation=False)
    assert model(**batch()).logits is None
    assert model.eval()(**batch()).logits is not None
    assert fastops.fuse_lm_head(model)(**batch()).logits is None


def test_generate() -> None:
    plain = make().eval()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    tokens = batch()["input_ids"]
    assert model.can_generate()
    for options in ({"do_sample": False}, {"num_beams": 2}):
        words = {"max_new_tokens": 5, **options}
        assert torch.equal(model.generate(tokens, **words), plain.generate(tokens, **words))


def test_subclass_that_calls_super() -> None:
    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, weight: float = 2.0) -> Any:
            assert isinstance(self, Own)
            output = super().forward(input_ids=input_ids, labels=labels)
            output.loss = weight * output.loss
            return output

    plain = Own(make().config).train()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    assert model(**batch()).logits is None
    torch.testing.assert_close(step(model, **batch(), weight=3.0), step(plain, **batch(), weight=3.0))


def test_a_base_before_the_model() -> None:
    class Own(abc.ABC, transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    plain = Own(make().config).train()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    assert model(**batch()).logits is None
    torch.testing.assert_close(step(model, **batch()), step(plain, **batch()))
    assert type(fastops.unfuse_lm_head(model)) is Own


class Loss(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return super().forward(input_ids=input_ids, labels=labels).loss


class Deep(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels)
        return {"loss": output.loss, "more": {"logits": [output.logits]}}


class Keeps(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels)
        self.last = output.logits
        return output


def test_logits_in_other_places() -> None:
    """A forward may return the loss alone, or put the logits deeper; one that keeps them wants them: refused."""
    for kind in (Loss, Deep):
        plain = kind(make().config).train()
        model = fastops.fuse_lm_head(copy.deepcopy(plain))
        output, expected = model(**batch()), plain(**batch())
        if kind is Deep:
            assert output["more"] == {"logits": [None]}
            output, expected = output["loss"], expected["loss"]
        torch.testing.assert_close(output, expected)
    with pytest.raises(ValueError, match="does more with the logits than hand them to its loss: attribute last"):
        fastops.fuse_lm_head(Keeps(make().config))
