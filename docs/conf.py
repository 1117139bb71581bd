"""The settings of the documentation, which Sphinx builds from the whole repository: `make docs`.

The documents lie where GitHub shows them, so the root of the repository is the source folder, and the links between the
documents are relative. MyST reads Markdown and the notebook, and runs the notebook. autodoc reads the docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings are those of this checkout

import fastmlp  # noqa: E402

project, release = "fastmlp", fastmlp.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "kernels/*.md", "examples/*.md", "tests/**.md", "bench/**.md", "fastmlp/**.md"]

html_theme, html_title, html_extra_path = "furo", f"fastmlp {release}", ["html"]
html_copy_source = False

myst_heading_anchors = 4
nb_execution_mode, nb_execution_raise_on_error, nb_merge_streams = "force", True, True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
smartquotes = False  # a quote is part of a name in code
default_role = "py:obj"  # a name in single backquotes is a link where the name has a description


def markdown_to_rst(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings have indented code and plain asterisks, as Markdown has: make them reStructuredText, in place."""
    found: list[str] = []
    indent, code = 0, -1  # of the last line of prose; of the code that the line is in, or -1
    for line in lines:
        text, width = line.lstrip(), len(line) - len(line.lstrip())
        if text and (code < 0 or width < code):
            code = -1
            if width >= indent + 4 and found and not found[-1].strip():
                code = width
                found += [f"{' ' * indent}::", ""]
            else:
                indent = width
        if code < 0:
            parts = re.split(r"(``.*?``|`.*?`)", line)
            line = "".join(part if part[:1] == "`" else re.sub(r"([*|])", r"\\\1", part) for part in parts)
        found.append(line)
    lines[:] = found


def folders_as_text(app: Any, doctree: Any) -> None:
    """A link to a folder, which GitHub shows and these pages do not have, is its text alone."""
    page = Path(app.env.doc2path(app.env.docname)).parent
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node["reftype"] == "myst" and (page / node["reftarget"]).is_dir():
            node.replace_self(node.children)


def setup(app: Any) -> None:
    """What Sphinx calls with the application."""
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)  # before napoleon, whose priority is 500
    app.connect("doctree-read", folders_as_text)
