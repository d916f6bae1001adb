"""Sphinx configuration: the pages are Markdown, the reference comes from the docstrings."""

from fastops import __version__

project = "fastops"
author = copyright = "fastops contributors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"

# The layers say what differs from torch's; what is the same is documented there.
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_format = "fully-qualified"
autodoc_typehints_description_target = "documented"
