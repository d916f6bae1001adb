"""A small Llama of transformers under its Trainer, with and without the fused head: the same losses, no logits.

    python examples/train_causal_lm.py

Needs the extra frameworks, no network: the weights are random, the text is a module of Python's, a token is a byte.
"""

import argparse
import copy
import inspect
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastops

LENGTH = 64


class Text(Dataset[dict[str, Tensor]]):
    """Pieces of ``LENGTH`` bytes."""

    def __init__(self, text: str) -> None:
        tokens = torch.tensor(list(text.encode()))
        self.pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def train(model: LlamaForCausalLM, data: Text, steps: int) -> list[float]:
    """The loss of every tenth of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    data = Text(inspect.getsource(argparse)[:20_000])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    plain = LlamaForCausalLM(config)
    model = fastops.fuse_lm_head(copy.deepcopy(plain))
    assert model(**{name: value[None] for name, value in data[0].items()}).logits is None

    fused, expected = (train(each, data, args.steps) for each in (model, plain))
    print("fused head  logits")
    for pair in zip(fused, expected, strict=True):
        print("{:10.4f}  {:6.4f}".format(*pair))
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=0)
    assert fused[-1] < fused[0]


if __name__ == "__main__":
    main()
