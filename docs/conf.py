"""Sphinx configuration: the pages are Markdown, the reference comes from the docstrings."""

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fastops import __version__
from fastops.qualify.page import page as qualified

sys.path.insert(0, str(Path(__file__).parent))
import figures

project = "fastops"
author = copyright = "fastops contributors"
release = __version__

extensions = [
    "myst_parser",
    "sphinx-mathjax-offline",  # the site loads nothing from elsewhere
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 2

# The layers say what differs from torch's; what is the same is documented there.
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_format = "fully-qualified"
autodoc_typehints_description_target = "documented"

default_role = "py:obj"  # `torch.nn.Linear` in a docstring is a link, by the function below
TORCH = "https://docs.pytorch.org/docs/stable"
PAGES_OF_TORCH = {
    "torch.nn.functional": "nn.functional.html",
    "torch.Tensor": "tensors.html",
    "torch.dtype": "tensor_attributes.html",
    "torch.device": "tensor_attributes.html",
    "torch.memory_format": "tensor_attributes.html",
    "torch.channels_last": "tensor_attributes.html",
    "torch.compile": "generated/torch.compile.html",
    "torch.no_grad": "generated/torch.no_grad.html",
}


def torch_reference(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.reference | None:
    """A link into torch's documentation for a name of torch's: an inventory would come from the network."""
    name = re.sub(r"^torch\.nn\.modules\.\w+\.", "torch.nn.", node["reftarget"])
    page = PAGES_OF_TORCH.get(name, f"generated/{name}.html" if name.startswith("torch.nn.") else None)
    return None if page is None else nodes.reference("", "", content, refuri=f"{TORCH}/{page}", internal=False)


class Options(SphinxDirective):
    """A table of the options of a command, from its parser."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        parser = argparse.ArgumentParser(add_help=False)
        parser.color = False  # which Python 3.14 has, for terminals
        import_module(f"fastops.cli.{self.arguments[0]}").add_arguments(parser)
        words = parser._get_formatter()._format_action_invocation
        rows = (f"| `{words(action)}` | {action.help or ''} |" for action in parser._actions)
        return self.parse_text_to_nodes("\n".join(["| option | meaning |", "|---|---|", *rows]))


class NotebookParser(MystParser):
    """Renders a notebook as the Markdown page that it would be, with what its cells printed below them."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
            for output in cell.get("outputs", ()):
                text = "".join(output.get("text") or output["data"]["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
        super().parse("\n\n".join(parts), document)


def write_what_a_gpu_found(app: Sphinx, error: Exception | None) -> None:
    """The page that `fastops qualify` would make of the results that docs/gpu.md tells of."""
    if error is None and app.builder.format == "html":
        data = json.loads((Path(app.srcdir) / "h100.json").read_text())
        (Path(app.outdir) / "h100.html").write_text(qualified(data))


def setup(app: Sphinx) -> None:
    app.connect("build-finished", write_what_a_gpu_found)
    app.connect("builder-inited", lambda app: figures.draw(Path(app.srcdir) / "_build" / "figures"))
    app.connect("missing-reference", torch_reference)
    app.add_directive("options", Options)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
