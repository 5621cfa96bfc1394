"""Our dropout draws what flax's does; of tokens and of whole samples."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax.methods.ops.dropout import Dropout, drop_path, drop_tokens


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
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def run(ours, x):
    def apply(x):
      return Two(ours).apply({}, x, rngs={"dropout": jax.random.key(1)})

    output, backward = jax.vjp(apply, x)
    return output, *backward(2 * x)

  found = jax.device_get(run(True, x))
  for actual, expected in zip(found, run(False, x), strict=True):
    np.testing.assert_array_equal(actual, expected)
  assert shape == (5,) or 0.3 < np.mean(found[0] == 0) < 0.7


@pytest.mark.parametrize(("rate", "train"), [(0.3, False), (0.0, True)])
def test_nothing_is_drawn_where_nothing_is_dropped(rate, train):
  x = jnp.ones((2, 3))
  assert Dropout(rate).apply({}, x, train=train) is x


def test_dropout_keeps_the_dtype():
  @jax.jit
  def apply(x, key):
    return Dropout(0.5).apply({}, x, train=True, rngs={"dropout": key})

  output = apply(np.ones((64,), jnp.bfloat16), jax.random.key(0))
  assert output.dtype == jnp.bfloat16
  assert set(output.tolist()) == {0.0, 2.0}


def test_draws_of_tokens_do_not_depend_on_how_many_follow():
  x = jax.device_put(np.ones((5, 7, 3), np.float32))
  drop = jax.jit(lambda x: drop_tokens(jax.random.key(0), 0.5, x))
  whole = np.asarray(drop(x))
  np.testing.assert_array_equal(drop(np.asarray(x)[:, :2]), whole[:, :2])
  assert set(np.unique(whole)) == {0, 2}
  # Each image and each token has draws of its own.
  rows = whole.reshape(35, 3)
  assert len(np.unique(rows, axis=0)) == 8
  assert drop_tokens(None, 0.5, x) is x


def test_drop_path_drops_whole_samples():
  x = jax.device_put(np.ones((64, 3, 2), np.float32))
  y = np.asarray(jax.jit(lambda x: drop_path(jax.random.key(0), 0.25, x))(x))
  assert np.all(y == y[:, :1, :1])
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
  assert 0 < np.mean(y == 0) < 0.5
  assert drop_path(None, 0.25, x) is x
