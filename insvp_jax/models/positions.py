"""Position embeddings of square grids: split off the class token's, resample.

Source: Dosovitskiy et al. 2021, section 3.2 (fine-tuning at higher resolution).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


def split_positions(
  positions: Float[np.ndarray, "1 n d"],
) -> tuple[Float[np.ndarray, "1 1 d"] | None, Float[np.ndarray, "1 m d"]]:
  """Separates the class token's entry from those of the patches.

  Old files added the position embedding after the class token had joined, so
  entry 0 is the class token's: n = k * k + 1.

  Returns:
    (entry of the class token or None, entries of the k * k patches).

  Raises:
    ValueError: n is neither k * k nor k * k + 1.
  """
  n = positions.shape[1]
  if math.isqrt(n) ** 2 == n and n > 0:
    return None, positions
  if n > 1 and math.isqrt(n - 1) ** 2 == n - 1:
    return positions[:, :1], positions[:, 1:]
  raise ValueError(
    f"the position embedding has {n} entries, expected k * k or k * k + 1 for a "
    "square grid of k x k patches; other grids are not supported."
  )


def resample_positions(
  positions: Float[np.ndarray, "1 n d"], grid: int
) -> Float[np.ndarray, "1 m d"]:
  """Resamples a square grid of position embeddings to `grid` x `grid`.

  Linear along each axis, corners on corners: what `scipy.ndimage.zoom(order=1)`
  computes, and with it big_vision and the original code, so that a model at
  another resolution starts where theirs does. A grid of the same size comes back
  as it is. A single entry is read at the first corner.

  Args:
    positions: [1, k * k, d], row by row.
    grid: patches per side of the result.

  Raises:
    ValueError: the entries form no square.
  """
  n = positions.shape[1]
  old = math.isqrt(n)
  if old * old != n:
    raise ValueError(f"{n} position embeddings form no square grid.")
  if old == grid:
    return positions
  weights = _linear_weights(old, grid)
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
