"""Draws the weights of small backbones without compiling anything."""

import jax
import numpy as np


def draw_backbone(shapes):
  """Returns weights of a tree of shapes, of about the size of trained ones.

  What JAX draws a backbone with takes longest to compile of all that a small test does.
  """
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.8, 1.2, leaf.shape).astype(leaf.dtype)
    fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
    return rng.normal(0, fan_in**-0.5, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)
