"""The training loop of the commands, as a tutorial writes it, for one model or several side by side."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastops
from fastops.cli import CommandError
from fastops.cli.environment import writing
from fastops.cli.table import Table
from fastops.cli.tasks import Batches, Data, Task
from fastops.progress import tracked

PRINT_EVERY = 100  # batches


@dataclass
class Learner:
    """A model in training and what was measured of it so far.

    ``losses`` and ``seconds`` have one entry per step; ``test_losses`` and ``accuracies`` (percent) one per epoch,
    and stay empty where there is no test set.
    """

    name: str
    model: nn.Module
    loss_function: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step of training on a batch; returns its loss."""
        loss: Tensor = self.loss_function(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def test(self, batches: Batches, device: torch.device) -> None:
        """Append the average loss and the accuracy over the test batches."""
        self.model.eval()
        loss, correct, count = 0.0, 0, 0
        with torch.no_grad():
            for inputs, targets in batches:
                inputs, targets = inputs.to(device), targets.to(device)
                logits = self.model(inputs)
                loss += self.loss_function(logits, targets).item()
                correct += int((logits.argmax(1) == targets).sum())
                count += len(targets)
        self.model.train()
        self.test_losses.append(loss / len(batches))
        self.accuracies.append(100 * correct / count)


def make_learner(name: str, task: Task, lr: float, seed: int, device: torch.device) -> Learner:
    """A new model of the task with weights drawn from ``seed``; one called "swapped" has its layers swapped."""
    torch.manual_seed(seed)
    model = task.model().to(device)
    loss_function = task.loss_function()
    if name == "swapped":
        fastops.swap(model)
        fastops.swap(loss_function)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=task.momentum)
    return Learner(name, model, loss_function, optimizer)


def train(
    learners: Sequence[Learner],
    data: Data,
    device: torch.device,
    epochs: range,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train all learners on the same batches, taking turns in who goes first.

    ``epochs``: the epochs to run, counted from 0. ``after_epoch`` is called with the number of finished epochs.
    ``CommandError`` as soon as a loss, or at the end of an epoch a weight, is NaN or infinite.
    """

    def describe(batch: list[Tensor]) -> str:
        return f"epoch {epoch + 1} of {epochs.stop}"

    for epoch in epochs:
        for batch, (inputs, targets) in enumerate(tracked(data.train, len(data.train), describe), start=1):
            inputs, targets = inputs.to(device), targets.to(device)
            for learner in learners if batch % 2 else reversed(learners):
                start = _now(device)
                loss = learner.step(inputs, targets)
                learner.seconds.append(_now(device) - start)
                learner.losses.append(loss.item())
                if not math.isfinite(learner.losses[-1]):
                    raise _diverged(learner, f"loss is {learner.losses[-1]}", f"{epoch + 1}, batch {batch}")
            if batch % PRINT_EVERY == 0:
                latest = ", ".join(f"{learner.name} {learner.losses[-1]:.6g}" for learner in learners)
                print(f"epoch {epoch + 1}, batch {batch} of {len(data.train)}: loss {latest}")
        for learner in learners:
            if not all(parameter.isfinite().all() for parameter in learner.model.parameters()):
                raise _diverged(learner, "weights are no longer finite", f"{epoch + 1}")
            if data.test is not None:
                learner.test(data.test, device)
                line = f"epoch {epoch + 1}: {learner.name} test accuracy {learner.accuracies[-1]:.1f} %"
                print(f"{line}, average test loss {learner.test_losses[-1]:.6f}")
        after_epoch(epoch + 1)


def _diverged(learner: Learner, what: str, epoch: str) -> CommandError:
    return CommandError(
        f"training stopped: the {learner.name} model's {what} in epoch {epoch}; a smaller learning rate may help"
    )


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def epoch_losses(learner: Learner, batches: int) -> list[float]:
    """The mean training loss of each epoch of ``batches`` steps."""
    losses = learner.losses
    return [sum(losses[start : start + batches]) / batches for start in range(0, len(losses), batches)]


def print_comparison(eager: Learner, swapped: Learner, batches: int) -> None:
    """Mean training loss and test accuracy of each epoch, side by side, how the swapped one differs, and where most."""
    print("\neager and swapped, epoch by epoch")
    columns = {"epoch": -5, "eager loss": -11, "swapped loss": -11, "change": -8}
    if eager.accuracies:
        columns |= {"eager accuracy": -8, "swapped accuracy": -8, "gain": -5}
    table = Table(columns)
    pairs = zip(epoch_losses(eager, batches), epoch_losses(swapped, batches), strict=True)
    for epoch, (left, right) in enumerate(pairs):
        row = [str(epoch + 1), f"{left:.6g}", f"{right:.6g}", f"{right - left:+.1e}"]
        if eager.accuracies:
            left, right = eager.accuracies[epoch], swapped.accuracies[epoch]
            row += [f"{left:.1f} %", f"{right:.1f} %", f"{right - left:+.1f}"]
        table.row(row)
    differences = [abs(right - left) for left, right in zip(eager.losses, swapped.losses, strict=True)]
    largest = max(differences)
    step = differences.index(largest)
    if largest == 0:
        print(f"the losses of all {len(differences)} steps are equal to the last bit")
    else:
        print(f"largest difference of a step's loss: {largest:.2e} at step {step + 1} (eager {eager.losses[step]:.6g})")


def save_curves(learners: Sequence[Learner], path: Path) -> None:
    """Write a PNG with the loss of every step and, where there is one, the test accuracy of every epoch."""
    with_accuracy = bool(learners[0].accuracies)
    figure = Figure(figsize=(11 if with_accuracy else 6, 4), layout="constrained")
    loss_axes = figure.add_subplot(1, 1 + with_accuracy, 1)
    loss_axes.set(title="training loss", xlabel="step", ylabel="loss", yscale="log")
    for learner, style in zip(learners, ("-", "--"), strict=False):
        loss_axes.plot(range(1, len(learner.losses) + 1), learner.losses, style, label=learner.name)
    loss_axes.legend()
    if with_accuracy:
        accuracy_axes = figure.add_subplot(1, 2, 2)
        accuracy_axes.set(title="test accuracy", xlabel="epoch", ylabel="percent")
        for learner, style in zip(learners, ("-o", "--x"), strict=False):
            accuracy_axes.plot(range(1, len(learner.accuracies) + 1), learner.accuracies, style, label=learner.name)
        accuracy_axes.legend()
    with writing(path) as file:
        figure.savefig(file, dpi=150)
