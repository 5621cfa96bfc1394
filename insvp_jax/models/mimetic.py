"""Mimetic initialisation: attention weights that start where training leads.

It speeds up the first epochs of a small ViT trained from scratch, which is what
`configs/pretrain.py` needs; adaptation never uses it.

Source: Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers",
eq. 5-8: W_q W_k^T ~ a I + b Z and W_v W_o ~ b Z - a I, and sinusoidal positions.
"""

from typing import Any

import numpy as np

from insvp_jax import trees


def sincos_positions(grid: int, width: int) -> np.ndarray:
  """Returns 2-D sinusoidal position embeddings [1, grid * grid, width].

  Raises:
    ValueError: the width is not divisible by 4 (sine and cosine of two axes).
  """
  if width % 4:
    raise ValueError(f"width {width} is not divisible by 4.")
  omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4 - 1))
  y, x = np.mgrid[:grid, :grid].reshape(2, -1, 1) * omega
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table[None].astype(np.float32)


def _factor(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the best factors A [d, rank], B [rank, d] of A @ B ~ matrix."""
  u, s, vt = np.linalg.svd(matrix)
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * vt[:rank]


def mimetic(backbone: dict[str, Any], seed: int) -> dict[str, Any]:
  """Returns an unrolled ViT's parameters with mimetic attention and positions.

  Args:
    backbone: nested parameters of `models.vit.ViT` with scan=False.
    seed: of the noise.

  Raises:
    ValueError: the blocks are scanned, or it is no ViT.
  """
  flat = {name: np.array(leaf) for name, leaf in trees.flatten(backbone).items()}
  if any("encoderblock/" in name for name in flat):
    raise ValueError("mimetic initialisation needs unrolled blocks; set scan=False.")
  if "pos_embedding" not in flat:
    raise ValueError(
      "mimetic initialisation is a Vision Transformer's; set backbone.init='default'."
    )
  rng = np.random.default_rng(seed)
  grid = round(flat["pos_embedding"].shape[1] ** 0.5)
  width = flat["pos_embedding"].shape[2]
  flat["pos_embedding"] = 0.5 * sincos_positions(grid, width)
  for name in [n for n in flat if n.endswith("query/kernel")]:
    scope = name.removesuffix("query/kernel")
    _, heads, head_dim = flat[name].shape
    identity = np.eye(width)
    for head in range(heads):
      noise = rng.normal(size=(width, width)) / np.sqrt(width)
      query, key = _factor(0.7 * noise + 0.7 * identity, head_dim)
      flat[scope + "query/kernel"][:, head] = query
      flat[scope + "key/kernel"][:, head] = key.T
    noise = rng.normal(size=(width, width)) / np.sqrt(width)
    value, out = _factor(0.4 * noise - 0.4 * identity, width)
    flat[scope + "value/kernel"] = value.reshape(width, heads, head_dim)
    flat[scope + "out/kernel"] = out.reshape(heads, head_dim, width)
  return trees.unflatten({n: leaf.astype(np.float32) for n, leaf in flat.items()})
