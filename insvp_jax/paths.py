"""Where files lie that belong to no run: caches, and the configs of the package."""

import hashlib
import os
from pathlib import Path
import platform
import re
import sys
from typing import Any

import platformdirs

from insvp_jax import errors

CACHE_VARIABLE = "INSVP_CACHE"


def cache_dir(kind: str = "") -> Path:
  """Returns the folder of a cache: "data" or "jax"; "" for that of both and backbones.

  They lie in $INSVP_CACHE or, where it is not set, in the platform's folder for caches
  (Linux: $XDG_CACHE_HOME/insvp_jax or ~/.cache/insvp_jax). It need not exist.

  Raises:
    OSError: neither is set, and this user has no home.
  """
  try:
    base = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("insvp_jax")
    return Path(base).expanduser() / kind
  except RuntimeError as error:
    # As in a container with a user id that has no entry in /etc/passwd.
    raise OSError(
      "there is no folder for caches, since this user has no home folder. Set "
      f"{CACHE_VARIABLE} to a folder."
    ) from error


def compiled_dir() -> Path:
  """Returns the folder of compiled programs for processors like this one's.

  What XLA compiled for one kind of processor may crash on another, and machines may
  share the folder of caches.
  """
  features = ""
  # Linux; elsewhere the kind of machine has to do.
  if (cpu_info := Path("/proc/cpuinfo")).is_file():
    text = cpu_info.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^(?:flags|Features)\b.*", text, re.M)
    features = found[0] if found else ""
  text = f"{platform.machine()} {platform.processor()} {features}"
  return cache_dir("jax") / hashlib.sha256(text.encode()).hexdigest()[:12]


def cache_compiled_programs() -> None:
  """Keeps the programs of this process on disk, so that the second start is quick.

  What the user has set by JAX's own variables stays. It has to come before the first
  program is compiled.
  """
  # Imported late: that takes half a second.
  import jax

  # Small programs, too: to read one takes a fraction of the time to compile it.
  settings: dict[str, Any] = {"jax_persistent_cache_min_compile_time_secs": 0.0}
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    try:
      folder = compiled_dir()
      folder.mkdir(parents=True, exist_ok=True)
      if not os.access(folder, os.W_OK):
        # JAX would warn of each program anew.
        raise PermissionError(f"no permission to write to {folder}")
      settings["jax_compilation_cache_dir"] = str(folder)
    except OSError as error:
      print(
        f"note: compiled programs are not kept: {errors.one_line(error)}",
        file=sys.stderr,
      )
  for name, value in settings.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def configs_dir() -> Path:
  """Returns the folder of the configs that come with the package."""
  package = Path(__file__).parent
  installed = package / "configs"
  # In a checkout they stand beside the package.
  return installed if installed.is_dir() else package.parent / "configs"
