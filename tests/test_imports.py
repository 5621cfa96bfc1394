"""Imports point one way, heavy libraries come in only where they are used.

The order is the README's architecture section, top to bottom. A new module has to be
given its place here.
"""

import ast
from collections.abc import Iterator
import graphlib
from pathlib import Path
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

# A module may import from its own line and from the lines below it.
LAYERS = (
  ("cli",),
  ("main",),
  ("tools",),
  ("search",),
  ("run",),
  ("train",),
  ("checkpoints", "logs"),
  ("data", "distributed"),
  ("models",),
  ("config_files",),
  ("config_checks",),
  ("config_variants",),
  ("config",),
  ("methods",),
  ("array_files",),
  ("errors", "files", "paths", "trees"),
)
# What a part may import of the package where that is less than the order allows.
ONLY = {
  "data": {"data", "config", "errors", "files", "paths", "trees"},
  "models": {"models", "methods", "array_files", "errors", "files", "paths", "trees"},
  "methods": {"methods", "array_files", "files", "trees"},
  "config": {"methods", "trees"},
  "trees": set(),
}
# TensorFlow reads TFDS and does nothing else; figures, t-SNE and pages are for tools.
ONLY_IN_FUNCTIONS = {
  "tensorflow",
  "tensorflow_datasets",
  "matplotlib",
  "sklearn",
  "gradio",
  "wandb",
  # These two import TensorFlow where it is installed.
  "clu.metric_writers",
  "clu.periodic_actions",
}
PACKAGE = "insvp_jax"


def _sources(root: Path) -> dict[str, Path]:
  """Maps the names of all modules of the package to their files."""
  sources = {}
  for path in sorted((root / PACKAGE).rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    sources[".".join(parts).removesuffix(".__init__")] = path
  return sources


def _imported(node: ast.AST) -> Iterator[str]:
  """Yields the dotted names that an import statement may import."""
  if isinstance(node, ast.Import):
    yield from (alias.name for alias in node.names)
  elif isinstance(node, ast.ImportFrom):
    assert node.level == 0, f"line {node.lineno}: relative import, name it in full"
    yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_of(name: str, modules: dict[str, Path]) -> str:
  """Returns the module that the dotted name is, or lies in."""
  while name not in modules:
    name = name.rpartition(".")[0]
  return name


def _graph(root: Path) -> dict[str, set[str]]:
  """Maps each module to the package's modules that it imports, anywhere in it."""
  sources = _sources(root)
  graph = {}
  for module, path in sources.items():
    names = [
      n for node in ast.walk(ast.parse(path.read_text())) for n in _imported(node)
    ]
    own = {_module_of(n, sources) for n in names if n.split(".")[0] == PACKAGE}
    graph[module] = own - {module}
  return graph


def _part(module: str) -> str:
  """Returns "data" for insvp_jax.data.tasks, "" for the package itself."""
  return (module.split(".") + [""])[1]


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
  """Yields what runs when a module is imported: all but the bodies of functions."""
  todo: list[ast.AST] = [tree]
  while todo:
    node = todo.pop()
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      todo.extend(ast.iter_child_nodes(node))


def _run(code: str, root: Path) -> str:
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def _upward(root: Path) -> list[str]:
  """Returns the imports that the order forbids."""
  level = {part: i for i, layer in enumerate(LAYERS) for part in layer}
  wrong = []
  for module, imported in _graph(root).items():
    part = _part(module)
    if not part:  # The public face may name anything.
      continue
    for other in sorted(map(_part, imported)):
      if part == "cli" and not other:  # It names the version.
        continue
      if level.get(other, -1) < level[part] or other not in ONLY.get(part, level):
        wrong.append(f"{module} imports {other or PACKAGE}")
  return wrong


def _heavy(root: Path) -> list[str]:
  """Returns the heavy imports that run when a module is imported."""
  wrong = []
  for module, path in _sources(root).items():
    for node in _at_import(ast.parse(path.read_text())):
      for name in _imported(node):
        if any(f"{name}.".startswith(f"{heavy}.") for heavy in ONLY_IN_FUNCTIONS):
          wrong.append(f"{module} imports {name}")
  return wrong


def test_every_module_has_a_place(root):
  parts = {_part(module) for module in _sources(root)} - {""}
  assert parts <= {part for layer in LAYERS for part in layer}


def test_imports_point_down(root):
  assert not _upward(root)


def test_no_cycles(root):
  # A package's __init__ gathers its modules, which therefore must not import it.
  list(graphlib.TopologicalSorter(_graph(root)).static_order())


def test_heavy_libraries_are_imported_in_functions(root):
  assert not _heavy(root)


def test_the_rules_find_what_they_forbid(tmp_path):
  for name, text in {
    "__init__": "",
    "trees": "def f():\n  from insvp_jax import config\n",
    "config": "from insvp_jax import trees\n",
    "logs/writers": "import optax, tensorflow.io\n",
    "models/__init__": "",
    "search/__init__": "",
    "models/vit": "if True:\n  from clu import metric_writers\n",
    "train/steps": "from insvp_jax.trees import f\nfrom insvp_jax import search\n",
    "search/tune": "def f():\n  import tensorflow\n",
    "data/__init__": "from insvp_jax import models\n",
  }.items():
    path = tmp_path / PACKAGE / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert _upward(tmp_path) == [
    "insvp_jax.data imports models",
    "insvp_jax.train.steps imports search",
    "insvp_jax.trees imports config",
  ]
  assert _heavy(tmp_path) == [
    "insvp_jax.logs.writers imports tensorflow.io",
    "insvp_jax.models.vit imports clu.metric_writers",
  ]
  with pytest.raises(graphlib.CycleError):
    list(graphlib.TopologicalSorter(_graph(tmp_path)).static_order())


def test_configs_import_only_the_schema(root):
  allowed = {"ml_collections", "insvp_jax.config"}
  wrong = []
  for path in sorted((root / "configs").glob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      for name in _imported(node):
        known = name.split(".")[0] in sys.stdlib_module_names
        if not known and not any(f"{name}.".startswith(f"{a}.") for a in allowed):
          wrong.append(f"{path.name} imports {name}")
  assert not wrong


def test_the_public_names_are_what_they_say(monkeypatch):
  import insvp_jax
  from insvp_jax.search import suite
  from insvp_jax.train import trainer

  names = {name: getattr(insvp_jax, name) for name in insvp_jax.__all__}
  assert set(names) <= set(dir(insvp_jax))
  assert "svhn" in names["TASKS"] and "boxed" in names["BACKBONES"]
  assert "insvp" in names["METHODS"] and names["config"].defaults().is_locked
  assert names["tune"] is suite.tune
  # A folder of that name has been imported, and it is the public function all the same.
  monkeypatch.setattr(trainer, "train", lambda config, workdir, **more: more)
  assert insvp_jax.train("config", "workdir", test=False) == {"test": False}
  with pytest.raises(AttributeError, match="has no attribute 'trian'"):
    insvp_jax.trian  # noqa: B018


def test_the_package_imports_nothing_heavy(root):
  code = (
    "import sys, insvp_jax\n"
    "heavy = 'jax flax optax orbax clu tensorflow tensorflow_datasets tensorboard "
    "matplotlib sklearn PIL'\n"
    "print([name for name in heavy.split() if name in sys.modules])"
  )
  assert _run(code, root).strip() == "[]"


def test_all_modules_import_together_without_tensorflow(root):
  # TensorFlow is made to look as if it were not installed. One process for all, which
  # also shows flags that two modules define.
  names = sorted(_sources(root))
  code = (
    "import importlib, importlib.abc, sys\n"
    "class Absent(importlib.abc.MetaPathFinder):\n"
    "  def find_spec(self, name, path, target=None):\n"
    "    if name.split('.')[0] in ('tensorflow', 'tensorflow_datasets'):\n"
    "      raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Absent())\n"
    f"for name in {names}: importlib.import_module(name)\n"
    "heavy = ('matplotlib', 'sklearn')\n"
    "print([name for name in heavy if name in sys.modules])"
  )
  assert _run(code, root).strip() == "[]"


def test_importing_does_not_start_devices(root):
  # jax.distributed must be able to come first.
  names = sorted(_sources(root))
  code = (
    "import importlib, jax\n"
    f"for name in {names}: importlib.import_module(name)\n"
    # JAX refuses this once devices are in use.
    "jax.config.update('jax_num_cpu_devices', 3)\n"
  )
  _run(code, root)


def test_annotations_are_checked_in_tests():
  from insvp_jax.data.preprocess import get_preset
  from insvp_jax.models import layers
  from insvp_jax.models.heads import Head

  params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
  head = Head(num_classes=2)
  assert head.apply({"params": params}, jnp.zeros((3, 4))).shape == (3, 2)
  with pytest.raises(jaxtyping.TypeCheckError):
    head.apply({"params": params}, jnp.zeros((3, 4, 4)))
  # A size is one in all of a call, and any in the next one.
  for sizes in ((1, 1, 1), (2, 2, 2)):
    layers.attend(*(jnp.zeros((b, 3, 1, 4)) for b in sizes))
  with pytest.raises(jaxtyping.TypeCheckError):
    layers.attend(*(jnp.zeros((b, 3, 1, 4)) for b in (1, 2, 2)))
  # And where no shape is named: of a module's fields, and of a function.
  with pytest.raises(jaxtyping.TypeCheckError, match="num_classes"):
    Head(num_classes="2")
  with pytest.raises(jaxtyping.TypeCheckError, match="name"):
    get_preset(2)
