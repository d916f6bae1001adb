"""The wheel and the sdist, what they install, what an import costs, and the promises of the project's own files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from forked import run_python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastops.accuracy
import fastops.distributed
import fastops.guard
import fastops.models
from fastops import tuning_cache

ROOT = Path(__file__).resolve().parent.parent
KERNEL_FILES = sorted((ROOT / "kernels").glob("*.py"))
# Modules whose public names are all that they have, and those of which it is what they define.
LISTED = (fastops, fastops.nn, fastops.models)
WRITTEN = (fastops.accuracy, fastops.compile, fastops.distributed, fastops.functional, fastops.guard)
MADE_UP = "fastops/kernels/measured/Made-up-GPU.json"

# A swapped model trains one step on plain torch tensors.
TRAIN_ONE_STEP = """
import torch
from torch import nn
import fastops

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
images, target = torch.randn(4, 7), torch.tensor([0, 2, 1, 1])
expected = torch.nn.functional.cross_entropy(model(images), target)
gradients = torch.autograd.grad(expected, list(model.parameters()))
loss = fastops.swap(nn.CrossEntropyLoss())(fastops.swap(model)(images), target)
loss.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close([p.grad for p in model.parameters()], list(gradients))
"""

# The name of the backend is known without an import, and it is fastops that answers to it.
COMPILE = """
import torch

model, x = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU()), torch.randn(4, 7)
expected = model(x)
compiled = torch.compile(model, backend="fastops", options={"compiler": "eager"})
torch.testing.assert_close(compiled(x), expected)
import fastops.compile
import fastops.distributed
assert len(fastops.compile.report().rows) == 2
"""

# As `python -m fastops` does.
HELP = """
import runpy, sys
print(fastops.__file__, fastops.__version__)
sys.argv[1:] = ["--help"]
runpy.run_module("fastops", run_name="__main__", alter_sys=True)
"""


def run(
    *words: str | Path,
    cwd: Path = ROOT,
    python_path: Path = ROOT,
    start: Callable[..., subprocess.CompletedProcess[str]] = run_python,
) -> str:
    """Standard output of a new process of Python, without the settings that the other tests run under."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTOPS_BACKEND")}
    done = start(words, cwd=cwd, env=environment | {"PYTHONPATH": str(python_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def without_torch(words: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, each built straight from a copy of the checkout."""
    source = tmp_path_factory.mktemp("build") / "source"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "_build")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    table = source / MADE_UP.replace("fastops/", "")  # as if a GPU had been measured
    table.parent.mkdir(exist_ok=True)
    table.write_text("{}")
    run("-m", "build", "--no-isolation", "--sdist", "--wheel", cwd=source, start=without_torch)
    (wheel,), (sdist,) = source.glob("dist/*.whl"), source.glob("dist/*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def wheel_files(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def sdist_files(sdist: Path) -> set[str]:
    """Names of the plain files, without the leading folder: a link would not count."""
    with tarfile.open(sdist) as archive:
        return {member.name.split("/", 1)[1] for member in archive if member.isfile()}


def wheel_metadata(wheel: Path) -> Message:
    (text,) = (text for name, text in wheel_files(wheel).items() if name.endswith(".dist-info/METADATA"))
    return message_from_string(text)


def package_files() -> set[str]:
    """Every file of the package that git would carry, and a made-up table; the link to the kernels is followed."""
    folders = [ROOT / "fastops", *(path for path in (ROOT / "fastops").iterdir() if path.is_dir())]
    return (
        {
            f"{folder.relative_to(ROOT)}/{path.name}"
            for folder in folders
            for path in folder.iterdir()
            if path.suffix == ".py" or path.name == "py.typed"
        }
        | {MADE_UP}
        | {f"fastops/kernels/measured/{path.name}" for path in (ROOT / "kernels" / "measured").glob("*.json")}
    )


def test_kernels_is_a_link() -> None:
    assert os.readlink(ROOT / "fastops" / "kernels") == os.path.join("..", "kernels")


def test_wheel_holds_the_package_and_nothing_else(distributions: dict[str, Path]) -> None:
    names = {name for name in wheel_files(distributions["wheel"]) if ".dist-info/" not in name}
    assert {"fastops/py.typed", "fastops/kernels/linear.py"} <= names
    assert names == package_files()


def test_sdist_holds_what_a_build_needs_and_nothing_else(distributions: dict[str, Path]) -> None:
    names = {name for name in sdist_files(distributions["sdist"]) if ".egg-info/" not in name}
    made = {"PKG-INFO", "setup.cfg"}
    assert names == package_files() | {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"} | made


def install(distribution: Path, site: Path) -> dict[str, bytes]:
    """What pip makes of it: the content of each file, but for where it came from."""
    site.mkdir()
    words = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", site, distribution)
    run("-m", "pip", "install", *words, cwd=site.parent, python_path=site, start=without_torch)
    left_out = ("RECORD", "direct_url.json")
    files = [path for path in site.rglob("*") if path.is_file() and path.name not in left_out]
    return {str(path.relative_to(site)): path.read_bytes() for path in files}


def test_installs_and_works_outside_the_checkout(distributions: dict[str, Path], tmp_path: Path) -> None:
    """The wheel; and what the sdist installs is the same to the last byte."""
    site = tmp_path / "site"
    installed = install(distributions["wheel"], site)
    assert install(distributions["sdist"], tmp_path / "other") == installed
    top = {name.partition("/")[0] for name in installed}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastops", "bin"}
    where, usage, *_ = run(
        "-W", "ignore", "-c", COMPILE + TRAIN_ONE_STEP + HELP, cwd=tmp_path, python_path=site
    ).splitlines()
    assert where == f"{site / 'fastops' / '__init__.py'} {fastops.__version__}"
    assert usage.startswith("usage: fastops")


def test_metadata(distributions: dict[str, Path]) -> None:
    metadata = wheel_metadata(distributions["wheel"])
    assert (metadata["Name"], metadata["Version"]) == ("torch-fastops", fastops.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    hard = {item.name for item in requirements if item.marker is None or "extra" not in str(item.marker)}
    assert hard == {"torch", "numpy", "filelock", "platformdirs", "rich"}


def test_every_direct_dependency_is_pinned(distributions: dict[str, Path]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    metadata = wheel_metadata(distributions["wheel"])
    direct = {canonicalize_name(Requirement(text).name) for text in metadata.get_all("Requires-Dist", [])}
    assert direct - {"torch-fastops"} == {canonicalize_name(pin.name) for pin in pins}


def test_import_leaves_out_what_takes_seconds() -> None:
    slow = {"triton", "torch._dynamo", "torch._inductor", "rich"}
    assert run("-c", f"import sys, fastops, fastops.nn; print({slow} & {{*sys.modules}})") == "set()\n"


@pytest.mark.parametrize("modules", [["triton"], ["filelock", "numpy", "platformdirs", "rich"]])
def test_works_without(modules: list[str]) -> None:
    """Also without all dependencies but torch."""
    program = f"import sys; sys.modules.update(dict.fromkeys({modules}))\n" + TRAIN_ONE_STEP
    run("-W", "ignore", "-c", program, start=without_torch)


def test_cache_folder_without_platformdirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTOPS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    found = tuning_cache.folder()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert tuning_cache.folder() == Path("/somewhere/fastops")
    assert found == Path("/somewhere/fastops") or sys.platform != "linux"


def test_pairs_of_versions() -> None:
    """From the oldest torch that is allowed to the one that is pinned."""
    pairs = re.findall(r'^  "([\d.]+) ([\d.]+) ([\d.]+) 3', (ROOT / ".ci" / "versions").read_text(), flags=re.MULTILINE)
    (oldest,) = re.findall(r"torch>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    pins = dict(
        re.findall(r"^(torch|triton|torchvision)==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    )
    assert pairs[0][0].startswith(f"{oldest}.")
    assert pairs[-1] == (pins["torch"], pins["triton"], pins["torchvision"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_named_make_targets_exist(page: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)(?:`|$| +#)", (ROOT / page).read_text(), flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_reference_names_every_public_function_and_class() -> None:
    directives = re.findall(r"^\.\. (\w+):: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    named, module = set(), ""
    for directive, name in directives:
        if directive == "currentmodule":
            module = name
        else:
            named.add(f"{module}.{name}")
    public = {
        f"{home.__name__}.{name}"
        for home in (*LISTED, *WRITTEN)
        for name, value in vars(home).items()
        if not name.startswith("_") and callable(value) and value.__module__.startswith("fastops")
        if home in LISTED or value.__module__ == home.__name__
    }
    assert named == public


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_launchers_are_typed(path: Path) -> None:
    """mypy cannot tell launchers from device code, which has no Python types; the decorator can."""
    untyped = []
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any(
            ast.unparse(decorator).startswith(("triton.jit", "triton.constexpr_function"))
            for decorator in function.decorator_list
        ):
            arguments = function.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            typed = all(one is None or one.annotation or one.arg in ("self", "cls") for one in every)
            if function.returns is None or not typed:
                untyped.append(function.name)
    assert untyped == []
