"""Position embeddings of square grids: split off the class token's, resample.

Source: Dosovitskiy et al. 2021, section 3.2 (fine-tuning at higher resolution).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


def split_positions(
  positions: Float[np.ndarray, "1 n d"],
  num_prefix: int = 1,
) -> tuple[Float[np.ndarray, "1 m d"] | None, Float[np.ndarray, "1 k d"]]:
  """Separates the entries of the class token and its like from those of the patches.

  Many files add the position embedding after the class token has joined, so
  entry 0 is the class token's: n = k * k + 1.

  Args:
    positions: of a file.
    num_prefix: how many tokens before the patches may have an entry.

  Returns:
    (entries of the tokens before the patches or None, those of the k * k patches).

  Raises:
    ValueError: n is neither k * k nor k * k + 1.
  """
  n = positions.shape[1]
  if math.isqrt(n) ** 2 == n and n > 0:
    return None, positions
  for count in (1, num_prefix):
    if n > count and math.isqrt(n - count) ** 2 == n - count:
      return positions[:, :count], positions[:, count:]
  raise ValueError(
    f"the position embedding has {n} entries, expected k * k or k * k + 1 for a "
    "square grid of k x k patches; other grids are not supported."
  )


def resample_positions(
  positions: Float[np.ndarray, "1 n d"], grid: int, kind: str = "linear"
) -> Float[np.ndarray, "1 m d"]:
  """Resamples a square grid of position embeddings to `grid` x `grid`.

  Linear along each axis, corners on corners: what `scipy.ndimage.zoom(order=1)`
  computes, and with it big_vision and the original code, so that a model at
  another resolution starts where theirs does. Bicubic, as PyTorch's releases do: half-
  pixel centres, no antialias. A grid of the same size comes back as it is. A single
  entry is read at the first corner.

  Args:
    positions: [1, k * k, d], row by row.
    grid: patches per side of the result.
    kind: "linear" or "bicubic".

  Raises:
    ValueError: the entries form no square.
  """
  n = positions.shape[1]
  old = math.isqrt(n)
  if old * old != n:
    raise ValueError(f"{n} position embeddings form no square grid.")
  if old == grid:
    return positions
  weights = (_cubic_weights if kind == "bicubic" else _linear_weights)(old, grid)
  table = positions[0].astype(np.float64).reshape(old, old, -1)
  table = np.einsum("ih,jw,hwd->ijd", weights, weights, table, optimize=True)
  return table.reshape(1, grid * grid, -1).astype(positions.dtype)


def resize_traced(positions: Float[Array, "1 n d"], grid: int) -> Float[Array, "1 m d"]:
  """Resamples as `resample_positions`, within a traced function."""
  old = math.isqrt(positions.shape[1])
  weights = jnp.asarray(_linear_weights(old, grid), positions.dtype)
  table = positions[0].reshape(old, old, -1)
  table = jnp.einsum("ih,jw,hwd->ijd", weights, weights, table)
  return table.reshape(1, grid * grid, -1)


def _linear_weights(old: int, new: int) -> np.ndarray:
  """Returns [new, old] rows that read a line of `old` values at `new` points."""
  points = np.arange(new) * ((old - 1) / max(new - 1, 1))
  distance = np.abs(points[:, None] - np.arange(old))
  return np.maximum(0.0, 1.0 - distance)


def _cubic_weights(old: int, new: int) -> np.ndarray:
  """As `_linear_weights`: Keys' cubic with a = -0.75, edges repeated, as PyTorch's."""
  a, rows = -0.75, np.arange(new)
  points = (rows + 0.5) * (old / new) - 0.5
  first, weights = np.floor(points).astype(int), np.zeros((new, old))
  for offset in (-1, 0, 1, 2):
    x = np.abs(points - first - offset)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    column = np.clip(first + offset, 0, old - 1)
    np.add.at(weights, (rows, column), np.where(x <= 1, near, far))
  return weights
