"""PyTorch's layouts of arrays, and ours."""

from collections.abc import Iterable
import re

import numpy as np


def kernel(weight: np.ndarray) -> np.ndarray:
  """Returns the kernel of a dense layer [in, out] or a convolution [h, w, in, out].

  Args:
    weight: [out, in] or [out, in, h, w]. A kernel's last two axes come first there.
  """
  return weight.T if weight.ndim == 2 else np.transpose(weight, (2, 3, 1, 0))


def weight(kernel: np.ndarray) -> np.ndarray:
  """Returns PyTorch's weight; the inverse of `kernel`."""
  return kernel.T if kernel.ndim == 2 else np.transpose(kernel, (3, 2, 0, 1))


def renamed(leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  """Returns our name and layout of a module's "weight" or "bias"."""
  if leaf == "weight":
    return ("scale", array) if array.ndim == 1 else ("kernel", kernel(array))
  return {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf), array


def restored(leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  """Returns PyTorch's name and layout; the inverse of `renamed`."""
  if leaf == "kernel":
    return "weight", weight(array)
  names = {"scale": "weight", "mean": "running_mean", "var": "running_var"}
  return names.get(leaf, leaf), array


def stage_depths(names: Iterable[str]) -> tuple[int, ...]:
  """Returns how many blocks each stage has, of our names with one group per block."""
  depths: dict[int, int] = {}
  for name in names:
    if match := re.match(r"stage_([0-9]+)/block_([0-9]+)/", name):
      stage, block = int(match[1]), int(match[2])
      depths[stage] = max(depths.get(stage, 0), block + 1)
  return tuple(depths[stage] for stage in sorted(depths))
