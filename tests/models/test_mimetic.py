"""Mimetic initialisation: the products of attention weights, and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax.models.mimetic import mimetic, sincos_positions
from insvp_jax.models.vit import ViT

SIZES = {"width": 64, "depth": 2, "mlp_dim": 8, "num_heads": 2, "pool": "gap"}


def shapes(**changes):
  model = ViT(patch_size=4, image_size=16, **SIZES, **changes)
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  tree = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)


def test_products_of_attention_weights_lean_on_the_identity():
  params = mimetic(shapes(), seed=0)
  attention = params["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]
  query, key, value, out = (
    attention[name]["kernel"] for name in ("query", "key", "value", "out")
  )
  for head in range(2):
    product = query[:, head] @ key[:, head].T
    # Rank 32 of 64 keeps the larger half of the spectrum.
    assert np.trace(product) / 64 > 0.5
  product = value.reshape(64, 64) @ out.reshape(64, 64)
  assert np.trace(product) / 64 == pytest.approx(-0.4, abs=0.1)
  off = product - np.diag(np.diag(product))
  assert np.std(off) == pytest.approx(0.4 / 8, rel=0.2)


def test_it_is_a_function_of_the_seed_and_leaves_the_rest_alone():
  before = shapes()
  first, again, other = (mimetic(before, seed=s) for s in (0, 0, 1))
  leaves = [jax.tree.leaves(tree) for tree in (first, again, other)]
  assert all(np.array_equal(a, b) for a, b in zip(*leaves[:2], strict=True))
  assert not all(np.array_equal(a, b) for a, b in zip(*leaves[::2], strict=True))
  assert jax.tree.structure(first) == jax.tree.structure(before)
  assert not first["embedding"]["kernel"].any()
  # The argument is not written to.
  assert not before["pos_embedding"].any() and first["pos_embedding"].any()


def test_positions_are_distinct_and_nearer_to_their_neighbours():
  table = sincos_positions(4, 64)[0]
  distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
  assert np.min(distance + 10 * np.eye(16)) > 0.1
  assert distance[0, 1] < distance[0, 3] and distance[0, 4] < distance[0, 12]


def test_errors():
  with pytest.raises(ValueError, match="needs unrolled blocks; set scan=False"):
    mimetic(shapes(scan=True), seed=0)
  with pytest.raises(ValueError, match="width 6 is not divisible by 4"):
    sincos_positions(2, 6)
