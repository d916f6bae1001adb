"""FashionMLP with fastops under the Trainer of Hugging Face's transformers.

    python examples/train_transformers.py

Needs the extras frameworks and demo. The Trainer wants a model that returns a dictionary with its loss.
"""

import argparse
import tempfile

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

import fastops
from fastops.cli.data import digits
from fastops.models import FashionMLP


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = FashionMLP()
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss": self.criterion(logits, labels), "logits": logits}


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def train(
    model: nn.Module, training: Dataset[tuple[Tensor, ...]], test: Dataset[tuple[Tensor, ...]], epochs: int
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=250,
            optim="sgd",
            learning_rate=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, collate, training, test, compute_metrics=accuracy)
        trainer.train()
        return float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(0)
    images = digits()
    model = fastops.swap(Classifier())
    result = train(model, images.train, images.test, args.epochs)
    print(fastops.report(model))
    print(f"accuracy on the test images: {result:.3f}")


if __name__ == "__main__":
    main()
