"""insvp_jax: instance visual prompting of frozen Vision Transformers in JAX.

  model = insvp_jax.create_model(backbone="boxed", method="insvp", num_classes=10)
  run = insvp_jax.load_run("runs/quickstart/insvp/seed0")

The public names are imported on first use: `import insvp_jax` alone costs nothing.
"""

import importlib
from typing import Any

_PUBLIC = {
  "METHODS": "insvp_jax.methods",
  "Run": "insvp_jax.run",
  "create_model": "insvp_jax.models.classifier",
  "load_backbone": "insvp_jax.models.weights.load",
  "load_run": "insvp_jax.run",
  "save_backbone": "insvp_jax.models.weights.load",
  "train": "insvp_jax.train.trainer",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
  """Imports a public name on first use (PEP 562)."""
  if name not in _PUBLIC:
    raise AttributeError(f"module 'insvp_jax' has no attribute {name!r}")
  value = getattr(importlib.import_module(_PUBLIC[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """Lists the public names too, for completion in notebooks."""
  return sorted([*globals(), *_PUBLIC])
