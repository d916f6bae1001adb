"""Sphinx configuration: the pages are Markdown, the reference comes from the docstrings."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

from fastops import __version__

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
]
exclude_patterns = ["_build"]
html_theme = "furo"
myst_enable_extensions = ["amsmath", "dollarmath"]

# The layers say what differs from torch's; what is the same is documented there.
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_format = "fully-qualified"
autodoc_typehints_description_target = "documented"


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: figures.draw(Path(app.srcdir) / "_build" / "figures"))
