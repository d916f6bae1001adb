"""The training loop of the commands, as a tutorial writes it, for one model or several side by side."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastops
from fastops.bench.counting import Cost
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


def save_curves(learners: Sequence[Learner], path: Path, costs: Mapping[str, Cost] | None = None) -> None:
    """Write a PNG of the loss of every step and, where there is one, the test accuracy of every epoch.

    Of two learners also how the second differs from the first, and how long their steps take; with ``costs``, by name,
    what a step of theirs moves and launches.
    """
    compared = len(learners) == 2
    with_accuracy = bool(learners[0].accuracies)
    columns = 1 + with_accuracy + compared
    heights = [3, 1] if compared else [1]
    figure = Figure(figsize=(5.5 * columns, 5.5 if compared else 4), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    axes[0, 0].set(title="training loss", ylabel="loss", yscale="log")
    _draw_both(axes[:, 0], "step", [(learner.name, learner.losses) for learner in learners], "loss")
    if with_accuracy:
        axes[0, 1].set(title="test accuracy", ylabel="percent")
        _draw_both(axes[:, 1], "epoch", [(learner.name, learner.accuracies) for learner in learners], "points", "o")
    if compared:
        _draw_times(axes[0, -1], learners)
        _draw_costs(axes[1, -1], costs or {})
    with writing(path) as file:
        figure.savefig(file, dpi=150)


def _draw_both(axes: Any, unit: str, curves: Sequence[tuple[str, Sequence[float]]], what: str, mark: str = "") -> None:
    """Curves over each other, the second one thin and dashed, and below them how the second differs from the first."""
    count = range(1, 1 + len(curves[0][1]))
    for (name, values), (style, width) in zip(curves, (("-", 4), ("--", 1.5)), strict=False):
        axes[0].plot(count, values, style + mark, linewidth=width, color="C0" if width == 4 else "black", label=name)
    axes[0].lines[0].set_alpha(0.5)
    axes[0].legend()
    axes[-1].set(xlabel=unit)
    for each in axes:
        each.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) == 2:
        (first, left), (second, right) = curves
        difference = [b - a for a, b in zip(left, right, strict=True)]
        axes[1].plot(count, difference, "-" + mark, color="black", linewidth=1)
        least = f"largest {max(map(abs, difference)):.1e}" if any(difference) else "none in any bit"
        axes[1].set(title=f"{second} less {first}, in {what}: {least}")


def _draw_times(axes: Any, learners: Sequence[Learner]) -> None:
    """How often a step took how long, the slowest two in a hundred left out, with the medians."""
    times = [[1e3 * each for each in learner.seconds] for learner in learners]
    longest = max(sorted(each)[int(0.98 * (len(each) - 1))] for each in times)
    shown = (0.9 * min(map(min, times)), 1.05 * longest)
    for learner, each, color in zip(learners, times, ("C0", "black"), strict=True):
        label = f"{learner.name}: median {median(each):.2f} ms"
        axes.hist(each, 60, range=shown, histtype="step", color=color, linewidth=1.5, label=label)
        axes.axvline(median(each), color=color, linestyle=":")
    ratio = median(times[1]) / median(times[0])
    axes.set(title=f"step times: {ratio:.2f} of {learners[0].name}'s", xlabel="milliseconds", ylabel="steps")
    axes.legend()


def _draw_costs(axes: Any, costs: Mapping[str, Cost]) -> None:
    """Bytes and launches of a step, where they can be told."""
    axes.set_axis_off()
    lines = [f"{name}: {cost_in_words(cost)}" for name, cost in costs.items()]
    axes.text(
        0.5,
        0.5,
        "\n".join(["one training step, with the optimizer's", *lines]),
        ha="center",
        va="center",
        linespacing=1.6,
    )


def cost_in_words(cost: Cost) -> str:
    """Bytes moved and launches, and why what cannot be told is left out."""
    found = [] if cost.bytes is None else [f"{cost.bytes / 1e6:.2f} MB moved"]
    found += [] if cost.launches is None else [f"{cost.launches} launches"]
    return ", ".join(found) or "; ".join(dict.fromkeys(cost.unknown.values()))
