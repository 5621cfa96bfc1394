"""Pages of the site that are not written in docs/: the reference, and other folders'.

An extension of Sphinx. What `ELSEWHERE` names is copied to docs/project/ while the site
is made, and links lead to the site's pages: on GitHub all files stay where they are.
"""

from collections.abc import Mapping
import functools
import importlib
import inspect
import os
from pathlib import Path, PurePosixPath
import re
import shutil
from typing import Any

from sphinx.application import Sphinx

import insvp_jax
from insvp_jax import methods

ROOT = Path(__file__).resolve().parent.parent
DOCS = PurePosixPath("docs")
COPIES = "project"  # below docs/
ELSEWHERE = (
  *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
  *("benchmarks/README.md", "launch/README.md", "notebooks/*.ipynb"),
)
_LINK = re.compile(r"\[([^\]\[]*)\]\(([\w./-]+)((?:#[\w-]+)?)\)")
# Where these stand come the reference, and the pages that index.md does not list.
_REFERENCE = "<!-- reference -->"
_OTHERS = "\nOTHERS\n"
# Of a public module, what its users call.
_FUNCTIONS = {"config": "defaults, published, complete, parse_arg, select, format_keys"}


@functools.cache
def copied() -> list[str]:
  """Returns the paths in the repository of what is copied."""
  files = (path for pattern in ELSEWHERE for path in sorted(ROOT.glob(pattern)))
  return [path.relative_to(ROOT).as_posix() for path in files]


def page_of(path: str) -> str:
  """Returns where below docs/ the site has a file of the repository; "" for nowhere."""
  if path in copied():
    return f"{COPIES}/{path}"
  below = PurePosixPath(path)
  on_site = below.is_relative_to(DOCS) and (ROOT / path).is_file()
  return str(below.relative_to(DOCS)) if on_site else ""


def site_links(text: str, origin: str) -> str:
  """Returns a page whose links lead to pages of the site.

  Args:
    text: of the page.
    origin: its path in the repository, by which its links go.

  A link to a file that the site does not have becomes its text.
  """
  here = os.path.dirname(page_of(origin))

  def replace(match: re.Match[str]) -> str:
    label, target, anchor = match.groups()
    path = os.path.normpath(os.path.join(os.path.dirname(origin), target))
    if not (ROOT / path).exists():
      return match[0]
    page = page_of(path)
    return f"[{label}]({os.path.relpath(page, here or '.')}{anchor})" if page else label

  return _LINK.sub(replace, text)


def reference() -> str:
  """Returns the reference of the public names as MyST."""
  parts = []
  for name in insvp_jax.__all__:
    value = getattr(insvp_jax, name)
    parts += [f"## `insvp_jax.{name}`", ""]
    if name == "train":
      # A folder that can be called.
      value = importlib.import_module("insvp_jax.train.trainer").train
    if inspect.ismodule(value):
      parts += _directive(
        "automodule", value.__name__, members=_FUNCTIONS.get(name, "")
      )
    elif inspect.isclass(value):
      parts += _directive("autoclass", _target(value), members="")
    elif callable(value):
      parts += _directive("autofunction", _target(value))
    else:
      parts += [_describe(value), ""]
  for name in ("Method", "Hooks", "Adaptation", "BackboneSpec"):
    parts += [f"## `insvp_jax.methods.{name}`", ""]
    parts += _directive("autoclass", _target(getattr(methods, name)), members="")
  return "\n".join(parts)


def _target(value: Any) -> str:
  return f"{value.__module__}.{value.__qualname__}"


def _directive(kind: str, target: str, **options: str) -> list[str]:
  listed = [f"   :{name}: {value}".rstrip() for name, value in options.items()]
  return ["```{eval-rst}", f".. {kind}:: {target}", *listed, "```", ""]


def _describe(value: Any) -> str:
  """Returns what a public constant is."""
  if isinstance(value, Mapping):
    return "A dict with the keys " + ", ".join(f"`{key}`" for key in value) + "."
  return f"`{value!r}`"


def _copy(app: Sphinx) -> None:
  for path in copied():
    target = Path(app.srcdir) / COPIES / path
    target.parent.mkdir(parents=True, exist_ok=True)
    # With its times, by which Sphinx knows what has changed.
    shutil.copy2(ROOT / path, target)


def _remove(app: Sphinx, error: Exception | None) -> None:
  del error
  shutil.rmtree(Path(app.srcdir) / COPIES, ignore_errors=True)


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
  suffix = Path(app.env.doc2path(docname)).suffix
  page = docname + suffix
  origin = page.removeprefix(f"{COPIES}/")
  origin = origin if origin != page else str(DOCS / page)
  if _REFERENCE in content[0]:
    content[0] = content[0].replace(_REFERENCE, reference())
  if _OTHERS in content[0]:
    listed = {docname, *content[0].split()}
    pages = {page for page in app.env.found_docs if not page.startswith(COPIES)}
    names = "".join(f"{name}\n" for name in sorted(pages - listed))
    content[0] = content[0].replace(_OTHERS, f"\n{names}")
  content[0] = site_links(content[0], origin)


def _signature(
  app: Sphinx, what: str, name: str, value: Any, options: Any, text: Any, returned: Any
) -> tuple[Any, Any]:
  """Returns a signature and what it returns, with arrays by their public name."""
  del app, what, name, value, options
  return tuple(t and t.replace("jaxlib._jax.Array", "Array") for t in (text, returned))


def setup(app: Sphinx) -> dict[str, bool]:
  """Connects the extension."""
  app.connect("builder-inited", _copy)
  app.connect("source-read", _read)
  app.connect("autodoc-process-signature", _signature)
  app.connect("build-finished", _remove)
  return {"parallel_read_safe": True}
