"""The versions that a result depends on."""

from importlib import metadata
import platform

PACKAGES = ("insvp_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
  """Returns {package: version} of what computes, and Python's."""
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = "not installed"
  return found
