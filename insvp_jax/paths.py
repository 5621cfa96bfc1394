"""Where files lie that belong to no run: caches, and the configs of the package."""

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "INSVP_CACHE"


def cache_dir(kind: str = "") -> Path:
  """Returns the folder of a cache: "data" or "jax"; "" for that of both and backbones.

  They lie in $INSVP_CACHE or, where it is not set, in the platform's folder for caches
  (Linux: $XDG_CACHE_HOME/insvp_jax or ~/.cache/insvp_jax). It need not exist.
  """
  base = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("insvp_jax")
  return Path(base).expanduser() / kind


def configs_dir() -> Path:
  """Returns the folder of the configs that come with the package."""
  package = Path(__file__).parent
  installed = package / "configs"
  # In a checkout they stand beside the package.
  return installed if installed.is_dir() else package.parent / "configs"
