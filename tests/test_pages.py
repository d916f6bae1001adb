"""What docs/command-line.md lists is what there is."""

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest

from fastops.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "command-line.md").read_text()


def test_environment_variables() -> None:
    sources = [path.read_text() for folder in ("fastops", "kernels") for path in (ROOT / folder).rglob("*.py")]
    used = {name for source in sources for name in re.findall(r"\bFASTOPS_[A-Z_]+\b", source)}
    assert used and set(re.findall(r"^\| `(FASTOPS_[A-Z_]+)` \|", PAGE, re.MULTILINE)) == used


def test_every_command_is_there() -> None:
    assert re.findall(r"^\| \[`(\w+)`\]\(#\1\) \|", PAGE, re.MULTILINE) == [*COMMANDS]
    assert re.findall(r"^## ([a-z]+)$", PAGE, re.MULTILINE) == [*COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_listed(command: str) -> None:
    """And an example that `tests/test_readme.py` runs."""
    parser = argparse.ArgumentParser(add_help=False)
    import_module(f"fastops.cli.{command}").add_arguments(parser)
    section = PAGE.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    assert (f"```{{options}} {command}\n" in section) == bool(parser._actions)
    assert re.search(rf"^```bash\nfastops {command}\b", section, re.MULTILINE)
