"""insvp_jax: instance visual prompting of frozen Vision Transformers in JAX.

  model = insvp_jax.create_model(backbone="boxed", method="insvp", num_classes=10)
  run = insvp_jax.load_run("runs/quickstart/insvp/seed0")
  run = insvp_jax.adapt((images, labels), workdir="runs/mine")

The public names are imported on first use: `import insvp_jax` alone costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# {public name: (its module, its name there)}; a module itself has no name there.
_PUBLIC = {
  "BACKBONES": ("insvp_jax.models.weights.releases", "RELEASES"),
  "METHODS": ("insvp_jax.methods", "METHODS"),
  "Run": ("insvp_jax.run", "Run"),
  "TASKS": ("insvp_jax.data.tasks", "TASKS"),
  "adapt": ("insvp_jax.search.adapt", "adapt"),
  "config": ("insvp_jax.config", ""),
  "create_model": ("insvp_jax.models.classifier", "create_model"),
  "load_backbone": ("insvp_jax.models.weights.load", "load_backbone"),
  "load_data": ("insvp_jax.data", "load_data"),
  "load_run": ("insvp_jax.run", "load_run"),
  "push_to_hub": ("insvp_jax.tools.hub", "push_to_hub"),
  "save_backbone": ("insvp_jax.models.weights.load", "save_backbone"),
  "train": ("insvp_jax.train", ""),
  "tune": ("insvp_jax.search.suite", "tune"),
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
  """Imports a public name on first use (PEP 562)."""
  if name not in _PUBLIC:
    raise AttributeError(f"module 'insvp_jax' has no attribute {name!r}")
  module, attribute = _PUBLIC[name]
  value = importlib.import_module(module)
  if attribute:
    value = getattr(value, attribute)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """Lists the public names too, for completion in notebooks."""
  return sorted({*globals(), *_PUBLIC})
