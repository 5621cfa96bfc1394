"""VFPT: which prompts are transformed, over what, and when dropout comes."""

import jax
import numpy as np
import pytest
from test_counts import prompter_shapes

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.vfpt import real_fourier

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)


def cosines(size):
  return np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)


@pytest.mark.parametrize("dimension", ["all", "hidden", "sequence"])
def test_the_transform_is_the_textbook_s(dimension):
  tokens = np.random.default_rng(0).standard_normal((2, 1, 5, 6), np.float32)
  expected = np.array(tokens, complex)
  if dimension != "sequence":
    expected[..., :3, :] = expected[..., :3, :] @ cosines(6)
  if dimension != "hidden":
    expected[..., :3, :] = cosines(3) @ expected[..., :3, :]
  transform = jax.jit(real_fourier, static_argnums=(1, 2))
  actual = np.asarray(transform(tokens, 3, dimension))
  np.testing.assert_allclose(actual, expected.real, atol=1e-5)
  np.testing.assert_array_equal(actual[..., 3:, :], tokens[..., 3:, :])
  np.testing.assert_array_equal(transform(tokens, 0, dimension), tokens)


def test_it_has_as_many_parameters_as_vpt():
  for deep, expected in ((True, 460_800), (False, 38_400)):
    _, shapes = prompter_shapes("B/16", "vfpt", deep=deep)
    assert trees.count(shapes) == expected


def test_dropout_comes_before_the_transform_and_for_each_image():
  method = create_method(
    "vfpt", SPEC, prompt_length=8, fourier_fraction=0.55, dropout=0.5
  )

  @jax.jit
  def adapt(images, key):
    variables = method.init(key, images, method="prompts")
    options = {"train": True, "rngs": {"dropout": key}, "method": "adapt"}
    return method.apply(variables, images, images, **options).prompts.tokens

  images = np.zeros((2, 16, 16, 3), np.float32)
  tokens = np.asarray(adapt(images, jax.random.key(1)))
  assert tokens.shape == (3, 2, 8, 32)
  # floor(0.55 * 8) = 4 of the prompts are sums over what was left of others.
  assert np.all(tokens[..., :4, :] != 0)
  assert 0.3 < np.mean(tokens[..., 4:, :] == 0) < 0.7
  assert np.any(tokens[:, 0] != tokens[:, 1])


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("fourier_fraction", 1.5, r"fourier_fraction is 1.5, expected a share in \[0, 1\]"),
    ("dimension", "hiden", "dimension is 'hiden', expected one of 'all', 'hidden'"),
  ],
)
def test_wrong_values_are_one_line(field, value, message):
  with pytest.raises(ValueError, match=message):
    create_method("vfpt", SPEC, **{field: value})
