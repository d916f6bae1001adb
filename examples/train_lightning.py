"""FashionMLP with fastops under Lightning: the swapped model is a module like any other.

    python examples/train_lightning.py

Needs the extras frameworks and demo. Lightning's Trainer chooses device and precision as always.
"""

import argparse
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastops
from fastops.cli.data import digits
from fastops.models import FashionMLP


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = fastops.swap(FashionMLP())
        self.criterion = fastops.swap(nn.CrossEntropyLoss())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.criterion(self.model(images), labels)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="32-true", help="bf16-mixed and so on")
    args = parser.parse_args()

    lightning.seed_everything(0)
    images = digits()
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, DataLoader(images.train, 64, shuffle=True), DataLoader(images.test, 250))
    print(fastops.report(classifier.model))
    print(f"accuracy on the test images: {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
