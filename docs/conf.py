"""How Sphinx makes the site of these pages.

  pip install ".[docs]"
  sphinx-build -W -b html docs site

`catalogue` writes the catalogue of methods, `pages` the reference and what lies
elsewhere in the repository.
"""

from pathlib import Path
import sys

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import insvp_jax  # noqa: E402

project = "insvp_jax"
author = "the insvp_jax authors"
copyright = "the insvp_jax authors, Apache-2.0"  # noqa: A001
version = release = insvp_jax.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "catalogue",
  "pages",
]
exclude_patterns = ["**/.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = f"insvp_jax {version}"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}

# As GitHub reads these pages: formulas between dollars, anchors from headings.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# Notebooks keep the outputs that they were stored with; the tests execute them.
nb_execution_mode = "off"

# Docstrings have names between single backticks.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
