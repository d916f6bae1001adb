"""``fastops demo``: train FashionMLP on handwritten digits, eager and swapped from the same seed, and compare them."""

import argparse
import copy
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import fastops
from fastops.bench.counting import Cost, cost_of, operations
from fastops.cli.environment import backend_lines, check_file, make_folder, pick_device, positive_integer
from fastops.cli.tasks import TASKS
from fastops.cli.training import Learner, cost_in_words, make_learner, print_comparison, save_curves, train

BATCH_SIZE = 64
LR = 0.1  # A hundred times the tutorial's: the digits are few, and a demonstration has to end soon.
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastops demo``."""
    parser.add_argument("--epochs", type=positive_integer, default=10, metavar="N", help="default 10")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path(), help="folder for curves.png; default .")


def run(args: argparse.Namespace) -> int:
    """Train both models on the same batches and print where they differ and how long their steps take."""
    make_folder(args.output)
    check_file(args.output / "curves.png")
    device = pick_device(None)
    task = TASKS["fashion-mlp"]
    data = task.load(None, BATCH_SIZE, torch.Generator().manual_seed(SEED))
    eager, swapped = (make_learner(name, task, LR, SEED, device) for name in ("eager", "swapped"))

    print(f"FashionMLP on {device}, {data.name}: 4 000 images to train on, 1 000 to test on")
    epochs = f"{args.epochs} epoch{'s' * (args.epochs > 1)}"
    print(f"cross-entropy, SGD with learning rate {LR}, batches of {BATCH_SIZE}, {epochs}")
    print("\nwhat fastops.swap(model) changed:")
    print(fastops.report(swapped.model))
    print("\nwhich backend computes it:")
    print(*backend_lines(swapped.model, BATCH_SIZE, device), sep="\n")
    print()

    costs = {learner.name: _cost_of_a_step(learner, next(iter(data.train)), device) for learner in (eager, swapped)}
    data.generator.manual_seed(SEED)
    train([eager, swapped], data, device, range(args.epochs))
    print_comparison(eager, swapped, batches=len(data.train))
    ratio = median(swapped.seconds) / median(eager.seconds)
    print(
        f"median time of a training step: eager {1e3 * median(eager.seconds):.2f} ms, "
        f"swapped {1e3 * median(swapped.seconds):.2f} ms, ratio {ratio:.2f}"
    )
    for name, cost in costs.items():
        print(f"one training step and its optimizer's, {name}: {cost_in_words(cost)}")
    save_curves([eager, swapped], args.output / "curves.png", costs)
    print(f"curves: {args.output / 'curves.png'}")
    return 0


def _cost_of_a_step(learner: Learner, batch: list[Tensor], device: torch.device) -> Cost:
    """What a step of training moves and launches, of a copy that has made one before."""
    trial = copy.deepcopy(learner)
    inputs, targets = (each.to(device) for each in batch)

    def step() -> Tensor:
        return trial.step(inputs, targets)

    step()
    return cost_of(step, operations(step), device)
