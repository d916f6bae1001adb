"""``fastops demo``: train FashionMLP on handwritten digits, eager and swapped from the same seed, and compare them."""

import argparse
from pathlib import Path
from statistics import median

import torch

import fastops
from fastops.cli.environment import backend_lines, check_file, make_folder, pick_device, positive_integer
from fastops.cli.tasks import TASKS
from fastops.cli.training import make_learner, print_comparison, save_curves, train

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
    print(f"cross-entropy, SGD with learning rate {LR}, batches of {BATCH_SIZE}, {args.epochs} epochs")
    print("\nwhat fastops.swap(model) changed:")
    print(fastops.report(swapped.model))
    print("\nwhich backend computes it:")
    print(*backend_lines(swapped.model, BATCH_SIZE, device), sep="\n")
    print()

    train([eager, swapped], data, device, range(args.epochs))
    print_comparison(eager, swapped, batches=len(data.train))
    ratio = median(swapped.seconds) / median(eager.seconds)
    print(
        f"median time of a training step: eager {1e3 * median(eager.seconds):.2f} ms, "
        f"swapped {1e3 * median(swapped.seconds):.2f} ms, ratio {ratio:.2f}"
    )
    save_curves([eager, swapped], args.output / "curves.png")
    print(f"curves: {args.output / 'curves.png'}")
    return 0
