"""Settings of the documentation site, which `make docs` builds with Sphinx from the pages as they lie here."""

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

from sphinx.application import Sphinx

import residua

sys.path.insert(0, str(Path(__file__).parent))  # for notebook_pages

project = "Residua"
copyright = "the Residua authors"  # noqa: A001  # Sphinx reads it by this name
release = residua.__version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "notebooks/*.ipynb", "store/FORMAT.md", "benchmarks/*.md"]
extensions = [
    "myst_parser",
    "notebook_pages",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
default_role = "code"  # single backticks are names in our docstrings

html_theme = "furo"
html_title = "Residua"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _lead_to_the_first_page(app: Sphinx, _error: Exception | None) -> None:
    first = Path(app.outdir) / "index.html"
    first.write_text(
        f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>Residua</title>\n'
    )


def _list_settings(_app: Sphinx, _what: str, _name: str, found: object, _options: object, lines: list[str]) -> None:
    """Add what the command line says of each field of a dataclass of settings, for napoleon to lay out."""
    helps = {field.name: field.metadata.get("help", "") for field in fields(found)} if is_dataclass(found) else {}
    helps = {name: re.sub(r"--[a-z][\w-]*", r"``\g<0>``", text) for name, text in helps.items()}  # no dashes
    if any(helps.values()):
        lines[:0] = [lines.pop(0), "", "Args:", *(f"    {name}: {text}" for name, text in helps.items()), ""]


def setup(app: Sphinx) -> None:
    """Have the folder open at the first page, and settings described where they are listed."""
    app.connect("build-finished", _lead_to_the_first_page)
    app.connect("autodoc-process-docstring", _list_settings, priority=400)  # before napoleon's
