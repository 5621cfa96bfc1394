"""Our dropout draws what flax's does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax.methods.ops.dropout import Dropout


class Two(nn.Module):
  """Two dropouts in one module, which draw different numbers."""

  ours: bool

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = (
        Dropout(0.3)(x, train=True)
        if self.ours
        else nn.Dropout(0.3)(x, deterministic=False)
      )
    return x


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (3, 2, 4, 8), (5,)])
def test_the_same_values_are_dropped_as_by_flax(shape):
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

  def run(ours):
    def apply(x):
      return Two(ours).apply({}, x, rngs={"dropout": jax.random.key(1)})

    output, backward = jax.vjp(jax.jit(apply), x)
    return output, *backward(2 * x)

  for actual, expected in zip(run(True), run(False), strict=True):
    np.testing.assert_array_equal(actual, expected)
  assert shape == (5,) or 0.3 < np.mean(run(True)[0] == 0) < 0.7


@pytest.mark.parametrize(("rate", "train"), [(0.3, False), (0.0, True)])
def test_nothing_is_drawn_where_nothing_is_dropped(rate, train):
  x = jnp.ones((2, 3))
  assert Dropout(rate).apply({}, x, train=train) is x


def test_dropout_keeps_the_dtype():
  x = jnp.ones((64,), jnp.bfloat16)
  output = Dropout(0.5).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
  assert output.dtype == jnp.bfloat16
  assert set(output.tolist()) == {0.0, 2.0}
