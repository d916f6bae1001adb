"""docs/own-op.md works as written: its blocks, applied to a copy of the repository in their order, and its commands."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import run_python

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "own-op.md").read_text()
BLOCK = re.compile(r"^```\{code-block\} (\w+)\n(?::caption: (\S+)\n\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with every file and change that the page shows."""
    copy = tmp_path_factory.mktemp("own-op") / "clone"
    copy.mkdir()
    for name in ("fastops", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for language, file, text in BLOCK.findall(PAGE):
        path = copy / file
        if file and language == "diff":
            old, new = ("".join(line[1:] for line in text.splitlines(True) if line[0] in kind) for kind in (" -", " +"))
            content = path.read_text()
            assert content.count(old) == 1, f"{file} has {content.count(old)} places like\n{old}"
            path.write_text(content.replace(old, new))
        elif file:
            before = f"{path.read_text()}\n\n" if path.exists() else ""
            path.write_text(before + text)
    return copy


def commands() -> Iterator[list[str]]:
    for language, file, text in BLOCK.findall(PAGE):
        if language == "bash":
            yield from map(shlex.split, text.splitlines())
        elif not file:
            yield ["script", text]


def test_page_has_two_ops() -> None:
    files = {file for _, file, _ in BLOCK.findall(PAGE) if file.startswith("fastops/ops/")}
    assert len(files) == 2
    assert len(list(commands())) == 8
    assert len(BLOCK.findall(PAGE)) == PAGE.count("{code-block}")


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words[:5]).partition("\n")[0])
def test_command(clone: Path, words: list[str], tmp_path: Path) -> None:
    own = {"PYTHONPATH": str(clone), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own |= {"FASTOPS_CACHE_DIR": str(tmp_path), "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    if words[0] == "script":  # a file: swap reads the source
        (tmp_path / "script.py").write_text(words[1])
        words = ["python", "-W", "error", str(tmp_path / "script.py")]
    program = words[1:] if words[0] == "python" else [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = run_python(program, cwd=clone, env=kept | own)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[:2] == ["fastops", "verify"]:
        assert " 0 failed" in done.stdout and " on triton" in done.stdout
    elif words[:2] == ["python", "-W"]:
        assert "1 of 1 losses swapped\ntriton: " in done.stdout or "\nsoftplus_gate 3x4 3x4: triton: " in done.stdout
    elif words[:2] == ["fastops", "audit"]:
        assert words[-1].removesuffix("_loss") in done.stdout or "pair_loss" in done.stdout
    elif "pytest" in words:
        assert re.search(r"^\d\d+ passed", done.stdout, re.MULTILINE)
