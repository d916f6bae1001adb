"""What may happen to a language model whose head is fused: changes, threads, compilers, Trainer, FSDP2."""

from __future__ import annotations

import copy
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import no_fallback
from language_models import VOCABULARY, batch, make, step, with_own_loss
from torch import Tensor, nn

import fastops

transformers = pytest.importorskip("transformers", reason="the extra frameworks is not installed")

pytestmark = [no_fallback, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def later_scaled(model: Any) -> None:
    model.config.final_logit_softcapping = 0.1


def later_lora(model: Any) -> None:
    """As peft does: the head inside another module, which adds a product of two small matrices."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(16, 2), nn.Linear(2, VOCABULARY)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    torch.manual_seed(3)
    model.lm_head = Adapter(model.lm_head)


def later_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output / 3)


def later_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 5)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def later_parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def later_frozen(model: Any) -> None:
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()


LATER: dict[str, tuple[Callable[[Any], object], bool]] = {
    "scaled": (later_scaled, False),
    "adapter": (later_lora, False),
    "hook": (later_hook, False),
    "loss": (with_own_loss, False),
    "weight": (later_weight, True),
    "parametrized": (later_parametrized, True),
    "frozen": (later_frozen, True),
    "resized": (lambda model: model.resize_token_embeddings(VOCABULARY + 8), True),
    "tied": (lambda model: setattr(model.lm_head, "weight", model.get_input_embeddings().weight), True),
    "checkpointing": (lambda model: model.gradient_checkpointing_enable(), True),
    "reentrant": (lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}), True),
    "float64": (lambda model: model.double(), True),
}


@pytest.mark.parametrize("change", LATER)
def test_changed_after_it_was_fused(change: str) -> None:
    apply, fuses = LATER[change]
    plain = make("Gemma2ForCausalLM").eval()
    plain.train()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    torch.manual_seed(2)
    apply(plain)
    torch.manual_seed(2)
    apply(model)
    assert (model(**batch()).logits is None) == fuses
    with fastops.backend("triton"):
        torch.testing.assert_close(step(model, **batch()), step(plain, **batch()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_lower_dtypes(dtype: torch.dtype, autocast: bool) -> None:
    plain = make("GPTJForCausalLM").eval()
    if not autocast:
        plain.to(dtype)
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    with fastops.backend("triton"), torch.autocast("cpu", dtype, enabled=autocast):
        found, expected = step(model, **batch()), step(plain, **batch())
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for ours, torchs in zip(found, expected, strict=True):
        assert (ours - torchs).norm() <= 8 * torch.finfo(dtype).eps * torchs.norm()


def test_with_swap() -> None:
    """In either order; each takes out what it put in."""
    plain = make()
    expected = step(plain, **batch())
    for first, second in ((fastops.swap, fastops.fuse_lm_head), (fastops.fuse_lm_head, fastops.swap)):
        model = second(first(copy.deepcopy(plain)))
        assert model(**batch()).logits is None and type(model.lm_head) is fastops.nn.Linear
        torch.testing.assert_close(step(model, **batch()), expected)
        twin = copy.deepcopy(model)
        assert fastops.unswap(model)(**batch()).logits is None and type(model.lm_head) is nn.Linear
        assert type(fastops.unfuse_lm_head(model)) is type(plain)
        assert fastops.unfuse_lm_head(twin)(**batch()).logits is not None
        assert type(twin.lm_head) is fastops.nn.Linear and type(fastops.unswap(twin)) is type(plain)


def test_threads_share_nothing() -> None:
    """One trains while another asks for logits."""
    model = fastops.fuse_lm_head(make().eval())
    tokens, labels = batch().values()
    right: list[bool] = []

    def work(labelled: bool) -> None:
        with fastops.backend("torch"):
            for _ in range(30):
                output = model(tokens, labels=labels if labelled else None)
                right.append((output.logits is None) == labelled != (output.loss is None))

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 120


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "fastops"])
def test_compiled(compiler: str) -> None:
    torch._dynamo.reset()
    plain = make()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    options = {"options": {"compiler": "aot_eager"}} if compiler == "fastops" else {}
    with fastops.backend("triton"):
        compiled = torch.compile(model, backend=compiler, fullgraph=True, **options)
        assert compiled(**batch()).logits is None
        torch.testing.assert_close(step(compiled, **batch()), step(plain, **batch()))
        torch.testing.assert_close(compiled(batch()["input_ids"]).logits, plain(batch()["input_ids"]).logits)
    torch._dynamo.reset()


# Under Trainer, accelerate and FSDP2 ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """It keeps the precision of the last Trainer."""
    yield
    accelerate = pytest.importorskip("accelerate", reason="the extra frameworks is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def trained(model: Any, folder: Path, **options: Any) -> list[float]:
    """The loss of each step under the Trainer, and of an evaluation."""
    generator = torch.Generator().manual_seed(5)
    lengths = [4, 9, 6, 9, 3, 8, 9, 5]
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    data = [
        {
            "input_ids": F.pad(text, (0, 9 - len(text))),
            "labels": F.pad(text, (0, 9 - len(text)), value=-100),
        }
        for text in texts
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
@pytest.mark.usefixtures("fresh_accelerator")
def test_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    plain = make("GPTNeoXForCausalLM").eval()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    fused: list[bool] = []
    loss = fastops.functional.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastops.functional.linear_cross_entropy", lambda *a, **k: (fused.append(True), loss(*a, **k))[1])
        found = trained(model, tmp_path, **options)
    assert len(fused) == (0 if "label_smoothing_factor" in options else 16 + 1)  # each batch, and the evaluation's
    expected = trained(plain, tmp_path, **options)
    assert len(found) == 5 and found == pytest.approx(expected, rel=0.02 if "bf16" in options else 1e-4)


@pytest.mark.usefixtures("fresh_accelerator")
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="the extra frameworks is not installed")
    plain = make()
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert prepared(**batch()).logits is None
    accelerator.backward(prepared(**batch()).loss)
    found = [p.grad for p in accelerator.unwrap_model(prepared).parameters()]
    torch.testing.assert_close(found, step(plain, **batch())[1:])


def shared(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    tokens = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    expected = step(make(), input_ids=tokens, labels=tokens)[1:]
    own = tokens.chunk(2)[rank]
    for kind in ("ddp", "fsdp", "fsdp, head alone"):
        model = fastops.fuse_lm_head(make())
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in (*model.model.layers, *([model.lm_head] if "alone" in kind else [])):
                fully_shard(layer)
            fully_shard(model)
        output = model(input_ids=own, labels=own)
        assert (output.logits is None) == ("alone" not in kind), kind
        output.loss.backward()
        found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        torch.testing.assert_close(found, expected)
        if kind == "fsdp":
            with pytest.raises(ValueError, match="its weights are sharded: fuse it before"):
                fastops.fuse_lm_head(model)
            assert fastops.unfuse_lm_head(model)(input_ids=own, labels=own).logits is not None


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = ""
    try:
        with fastops.backend("triton"):
            shared(rank)
    except Exception:  # a failing rank must still meet the other at the barrier; what it found is reported
        found = traceback.format_exc()
    dist.barrier()
    (Path(folder) / f"{rank}.txt").write_text(found)
    dist.destroy_process_group()
    os._exit(0)  # what is left of FSDP's mesh keeps gloo's threads, which may abort a process that shuts down


def test_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]
