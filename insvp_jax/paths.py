"""Where files lie that belong to no run: caches."""

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
