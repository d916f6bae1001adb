"""The command line. Each command is one module, imported only when it is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import fastops

COMMANDS = {
    "demo": "train FashionMLP eager and swapped on handwritten digits, and compare",
    "train": "train one of the reference models",
    "verify": "check gradients and accuracy of every operation",
    "doctor": "show versions, devices and the backend of each operation",
    "bench": "time fastops against eager PyTorch and others, on its cases or your model",
    "qualify": "check and time all of fastops on the GPU that is here, and write a report",
    "audit": "compile every kernel for GPUs that need not be here, and inspect it",
}
# What `pip install torch-fastops` brings, alone and with an extra.
EXTRAS = (
    dict.fromkeys(("torch", "numpy", "filelock", "platformdirs", "rich"), "")
    | dict.fromkeys(("matplotlib", "mlxtend", "torchvision"), "[demo]")
    | {"elftools": "[audit]"}
)


class CommandError(Exception):
    """A mistake of the user: its one line is printed and the command exits with status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    ``arguments``: the words after ``fastops``; those of the process by default. A command module has
    ``add_arguments(parser)`` and ``run(args) -> int``.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # a full disk is an error of the command, not of the interpreter's last moments
    except (CommandError, ImportError, OSError, KeyboardInterrupt) as error:
        return _status(error)


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:  # argparse would not notice that its output cannot be written
        print(f"fastops {fastops.__version__}")
        return 0
    parser = argparse.ArgumentParser(prog="fastops", description="Triton kernels for existing PyTorch models.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if words[:1] == [name]:
            module = import_module(f"fastops.cli.{name}")
            module.add_arguments(command)
    args = parser.parse_args(words, argparse.Namespace(words=words))
    status: int = module.run(args)
    return status


def end_command(error: BaseException) -> None:
    """End the process as `main` would if it is the command line; else do nothing.

    For errors of ``import fastops`` itself, which comes before `main`.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)  # none yet while `python -m fastops` imports fastops
    module = sys.argv[:1] == ["-m"] and "-m fastops" in " ".join(sys.orig_argv)
    if module or (script is not None and Path(script).name in ("fastops", "fastops.exe")):
        raise SystemExit(_status(error))


def _status(error: BaseException) -> int:
    """Say in one line what ended a command; returns its exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("fastops: interrupted", file=sys.stderr)
        return 130
    line = str(error)
    if isinstance(error, OSError):
        if error.filename is None:  # of the output
            sys.stdout = None
            if isinstance(error, BrokenPipeError):  # its reader, head for instance, has seen enough
                return 1
        line = f"{error.filename or 'cannot write the output'}: {error.strerror}"
    elif isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise error
        line = f'this command needs {package}: pip install "torch-fastops{EXTRAS[package]}"'
    print(f"fastops: error: {line}", file=sys.stderr)
    return 2
