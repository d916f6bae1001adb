"""``fastops doctor``: versions, devices, and the backend that each operation takes on this machine."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastops
from fastops import tuning_cache
from fastops.cli.examples import draw_timed
from fastops.ops import OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fastops doctor`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    print("versions")
    _print_pairs({"python": platform.python_version(), "fastops": fastops.__version__} | _versions())
    print("\nprocessor")
    _print_pairs(
        {
            "model": tuning_cache.processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
            "oneDNN": _yes(torch.backends.mkldnn.is_available()),
            "MKL": _yes(torch.backends.mkl.is_available()),
        }
    )
    print("\naccelerators")
    for line in _accelerators() or ["none"]:
        print(f"  {line}")
    for name in ("TRITON_INTERPRET", "FASTOPS_BACKEND"):
        print(f"\n{name}: {os.environ.get(name, 'not set')}", end="")
    print(f"\nTriton interpreter: {'on' if _interpreting() else 'off (TRITON_INTERPRET=1 turns it on)'}")
    for device in _devices():
        tuned = tuning_cache.path(device)
        print(f"\nbackend of each operation on {device}, {f'tuned: {tuned}' if tuned.exists() else 'not tuned'}")
        try:
            for line in _choices(device):
                print(f"  {line}")
        except RuntimeError as error:  # the backend that FASTOPS_BACKEND asks for cannot run here
            print(f"  {error}")
    return 0


def _interpreting() -> bool:
    """CPU tensors reach a Triton kernel only through the interpreter."""
    one = torch.zeros(1, 1)
    with fastops.backend("auto"):
        return fastops.explain("linear", one, one).backend == "triton"


def _print_pairs(pairs: dict[str, str]) -> None:
    for name, value in pairs.items():
        print(f"  {name:<11} {value}")


def _yes(available: bool) -> str:
    return "yes" if available else "no"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device("cpu")] + ([accelerator] if accelerator else [])


def _accelerators() -> list[str]:
    if not torch.cuda.is_available():
        return [f"{device}: {torch.accelerator.device_count()}" for device in _devices()[1:]]
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index} {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return lines


def _choices(device: torch.device) -> list[str]:
    """One line for each of the first two timed calls of every operation, or else for its first example."""
    lines = []
    for op in OPS.values():
        for example in (op.timed or op.examples[:1])[:2]:
            variables, constants = draw_timed(example, device)
            lines.append(
                f"{op.name} {example.name}: {fastops.explain(op.name, **variables, **constants, **example.options)}"
            )
    return lines
