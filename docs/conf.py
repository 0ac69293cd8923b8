"""The settings of the documentation, which `make docs` builds into docs/_build/html; warnings are errors there."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import lora_jax

ROOT = Path(__file__).resolve().parents[1]

project = "lora_jax"
author = "the authors of lora_jax"
project_copyright = f"2026, {author}"
version = release = lora_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "results"]

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"  # in place of MathJax, which pages would load from a CDN
# The outputs of the notebooks are committed: tests/test_notebooks.py runs each of them, and compares.
nb_execution_mode = "off"
nb_output_stderr = "remove"

default_role = "py:obj"  # `name` in a docstring: a link where it is a name of the reference, else code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 100
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "lora_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "navbar_persistent": []}
html_show_sourcelink = False

SEARCHED = ("lift", "DoRA", "resume", "target_modules")  # words that the search has to find


def copy_notebooks() -> None:
    """Sphinx reads what is below docs/ only."""
    folder = ROOT / "docs" / "notebooks"
    folder.mkdir(exist_ok=True)
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy2(file, folder)


def skip_field_numbers(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of NamedTuples, of which Python only says "Alias for field number 0"."""
    return True if type(member).__name__ == "_tuplegetter" else None


def shorten_types(app: Any, what: str, name: str, obj: Any, options: Any, parameters: str, returned: str) -> Any:
    """A signature with short types: without the ranges that numbers are annotated with, and with Array for JAX's."""

    def short(text: str) -> str:
        text = text.replace("<factory>", "...")
        text = re.sub(r"Annotated\[(.*?), [\w.~]*Range\(.*?\)\]", r"\1", text)
        return re.sub(r"OptimizerConfig\(.*\)\)$", "OptimizerConfig())", text).replace("jaxlib._jax.Array", "Array")

    return parameters and short(parameters), returned and short(returned)


def check_search(app: Any, error: Exception | None) -> None:
    """Ends the build with an error where the search would not find one of the words."""
    if error or app.builder.name != "html":
        return
    index = (Path(app.outdir) / "searchindex.js").read_text()
    terms = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["terms"]
    missing = [word for word in SEARCHED if app.builder.indexer.lang.stem(word.lower()) not in terms]
    if missing:
        raise ValueError(f"the search does not find {', '.join(missing)}")


def write_math(translator: Any, node: nodes.Element) -> None:
    """A formula as MathML, which browsers show without a script."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    copy_notebooks()
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-skip-member", skip_field_numbers)
    app.connect("autodoc-process-signature", shorten_types)
    app.connect("build-finished", check_search)
