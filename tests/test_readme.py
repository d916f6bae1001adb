"""What the pages tell a reader to type works as written: every Python block and every command of a bash block."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from forked import run_python
from triton.runtime.interpreter import GridExecutor

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """``(page, text)`` of every fenced block in that language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in fence.findall(page.read_text())]


TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2"]
EXAMPLES = [
    ["python", "resnet18.py"],
    ["python", "own_kernel.py"],
    [*TORCHRUN, "train_distributed.py", "--strategy", "ddp"],
    [*TORCHRUN, "train_distributed.py", "--strategy", "fsdp"],
    ["python", "train_lightning.py", "--epochs", "1"],
    ["python", "train_transformers.py", "--epochs", "1"],
    ["python", "train_causal_lm.py", "--steps", "20"],
]
EXTRAS = {
    "train_lightning.py": "pytorch_lightning",
    "train_transformers.py": "transformers",
    "train_causal_lm.py": "transformers",
}
COMMANDS = list(
    dict.fromkeys(
        shlex.join(words)
        for _, text in blocks("bash")
        for line in text.splitlines()
        if (words := shlex.split(line, comments=True))
    )
)


def environment() -> dict[str, str]:
    """The reader's: no interpreter, and the commands of this Python's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MAKEFLAGS")}
    return kept | {"PATH": path}


def test_pages_have_both_kinds() -> None:
    assert len(blocks("python")) >= 3
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=lambda value: value[:20] if "." in value else "")
def test_python_block(page: str, block: str, tmp_path: Path) -> None:
    own = environment() | {"FASTOPS_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "script.py"  # a file, because swap and Triton read the source
    script.write_text(block)
    done = run_python(["-W", "error", script], cwd=tmp_path, env=own)
    assert done.returncode == 0, f"{page}: {done.stderr}"


def test_gradcheck_on_the_page_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward. Here `TRITON_INTERPRET` is set already; `test_python_block` runs it where it is not."""
    launched, call = Counter[str](), GridExecutor.__call__

    def counted(executor: GridExecutor, *words: Any, **options: Any) -> None:
        launched[executor.fn.__name__] += 1
        call(executor, *words, **options)

    (block,) = (text for page, text in blocks("python") if page == "README.md" and "gradcheck(" in text)
    monkeypatch.setattr(GridExecutor, "__call__", counted)
    exec(block.partition("model = ")[0], {})
    assert launched.keys() == {"matmul_kernel", "activation_backward_kernel"} and min(launched.values()) > 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the repository. Sphinx sees the links inside of the site alone."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s#:]+\.\w+)", text)
    built = "_build/"  # where the pictures of kernels are drawn
    assert not [link for link in links if built not in link and not (page.parent / link).exists()]


def test_every_example_is_run() -> None:
    assert {script for words in EXAMPLES for script in words if script.endswith(".py")} == {
        path.name for path in (ROOT / "examples").glob("*.py")
    }


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_example(words: list[str], tmp_path: Path) -> None:
    script = next(word for word in words if word.endswith(".py"))
    if script in EXTRAS and find_spec(EXTRAS[script]) is None:
        pytest.skip("the extra frameworks is not installed")
    words = [str(ROOT / "examples" / word) if word == script else word for word in words]
    if words[0] == "python":
        done = run_python(words[1:], cwd=tmp_path, env=environment())
    else:
        done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[0] == "make":  # running it would run these tests again: see that it would
        done = subprocess.run([*words, "--dry-run"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    else:
        done = run_python([Path(sys.executable).with_name(words[0]), *words[1:]], cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
