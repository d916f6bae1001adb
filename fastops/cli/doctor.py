"""``fastops doctor``: versions, devices, and the backend that each operation takes on this machine."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.utils.collect_env import get_nvidia_driver_version, get_os
from torch.utils.collect_env import run as run_command

import fastops
from fastops import measured, tuning_cache
from fastops.cli.examples import draw_timed
from fastops.kernels import private
from fastops.ops import OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fastops doctor`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    print(*(f"{name}: {fact}" for name, fact in report().items()), sep="\n")
    for device in _devices():
        known = tuning_cache.anything() and tuning_cache.path(device).exists()
        tuned = f"tuned: {tuning_cache.path(device)}" if known else "not tuned"
        print(f"\nbackend of each operation on {device}, {tuned}")
        try:
            for line in choices(device):
                print(f"  {line}")
        except RuntimeError as error:  # the backend that FASTOPS_BACKEND asks for cannot run here
            print(f"  {error}")
    return 0


def report() -> dict[str, str | int]:
    """Versions, devices and settings."""
    try:
        cache = str(tuning_cache.folder())
    except RuntimeError as error:
        cache = f"none: {error}"
    return facts() | {
        "oneDNN": _yes(torch.backends.mkldnn.is_available()),
        "MKL": _yes(torch.backends.mkl.is_available()),
        "accelerators": "; ".join(_accelerators()) or "none",
        "GPU driver": get_nvidia_driver_version(run_command) or "none of NVIDIA",
        "HIP": torch.version.hip or "none",
        **{name: os.environ.get(name, "not set") for name in ("TRITON_INTERPRET", "FASTOPS_BACKEND")},
        "Triton interpreter": "on" if interpreting() else "off (TRITON_INTERPRET=1 turns it on)",
        "cache folder": cache,
        "private interfaces that torch lacks": ", ".join(private.missing) or "none that fastops uses",
        "ways measured on": ", ".join(sorted(file.stem for file in measured.FOLDER.glob("*.json"))) or "no kind of GPU",
    }


def facts() -> dict[str, str | int]:
    """What speed depends on, besides the code and the accelerator."""
    return {
        "system": f"{get_os(run_command)}, {platform.platform()}",
        "processor": tuning_cache.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "fastops": fastops.__version__,
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy")},
    }


def interpreting() -> bool:
    """Whether Triton's interpreter is on: CPU tensors reach a kernel only through it."""
    one = torch.zeros(1, 1)
    with fastops.backend("auto"):
        return fastops.explain("linear", one, one).backend == "triton"


def _yes(available: bool) -> str:
    return "yes" if available else "no"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


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


def choices(device: torch.device) -> Iterator[str]:
    """A line for each of the first two timed calls of every operation, or else for its first example."""
    for op in OPS.values():
        for example in (op.timed or op.examples[:1])[:2]:
            variables, constants = draw_timed(example, device)
            explanation = fastops.explain(op.name, **variables, **constants, **example.options)
            yield f"{op.name} {example.name}: {explanation}"
