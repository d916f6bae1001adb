"""The command line. Each command is one module, imported only when it is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import fastops

COMMANDS = {
    "demo": "train FashionMLP eager and swapped on handwritten digits, and compare",
    "train": "train one of the reference models",
    "verify": "check gradients and accuracy of every operation",
    "doctor": "show versions, devices and the backend of each operation",
    "bench": "time fastops against eager PyTorch",
    "audit": "compile every kernel for GPUs that need not be here, and inspect it",
}
EXTRAS = {"elftools": "audit"} | dict.fromkeys(("matplotlib", "mlxtend", "torchvision"), "demo")


class CommandError(Exception):
    """A mistake of the user: its one line is printed and the command exits with status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    ``arguments``: the words after ``fastops``; those of the process by default. A command module has
    ``add_arguments(parser)`` and ``run(args) -> int``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="fastops", description="Triton kernels for existing PyTorch models.")
    parser.add_argument("--version", action="version", version=f"fastops {fastops.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    try:
        for name, purpose in COMMANDS.items():
            command = commands.add_parser(name, help=purpose, description=purpose)
            if words[:1] == [name]:
                module = import_module(f"fastops.cli.{name}")
                module.add_arguments(command)
        args = parser.parse_args(words)
        status: int = module.run(args)
        return status
    except CommandError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f'this command needs {package}: pip install "torch-fastops[{EXTRAS[package]}]"')
    except BrokenPipeError:  # the reader of our output, head for instance, has seen enough
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        print("fastops: interrupted", file=sys.stderr)
        return 130


def _fail(line: str) -> int:
    print(f"fastops: error: {line}", file=sys.stderr)
    return 2
