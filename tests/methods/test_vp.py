"""VP: where its prompts are, how large they may be."""

import functools

import jax
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method

SPEC = BackboneSpec(8, 1, 16, 1, patch_size=4, image_size=16)


@functools.cache
def _program(location, size, **kwargs):
  method = create_method("vp", SPEC, location=location, prompt_size=size)

  @jax.jit
  def run(images, key):
    params = method.init(jax.random.key(0), images, method="prompt_image")
    options = {"rngs": {} if key is None else {"dropout": key}, **kwargs}
    added = method.apply(params, images, method="prompt_image", **options)
    return added, params["params"]

  return run


def prompts_of(location, size, *, key=None, **kwargs):
  """Returns what is added to two images."""
  run, images = _program(location, size, **kwargs), np.zeros((2, 16, 16, 3), np.float32)
  return jax.device_get(run(images, None if key is None else jax.random.key(key)))


def test_a_border_is_zero_inside():
  (one, other), params = prompts_of("padding", 3)
  assert np.array_equal(one, other)
  assert not one[3:-3, 3:-3].any() and one[:3].all() and one[3:-3, -3:].all()
  assert trees.count(params) == 12 * 3 * (16 - 3)


def test_a_random_patch_is_somewhere_else_in_each_batch_of_training():
  middle, params = prompts_of("random_patch", 4)
  assert np.array_equal(middle[0, 6:10, 6:10], params["patch"])
  corners = set()
  for key in range(6):
    (one, other), _ = prompts_of("random_patch", 4, key=key, train=True)
    assert np.array_equal(one, other)
    rows, columns, _ = np.nonzero(one)
    corners.add((rows.min(), columns.min()))
    patch = one[rows.min() : rows.min() + 4, columns.min() : columns.min() + 4]
    assert np.array_equal(patch, params["patch"])
  assert len(corners) > 3


@pytest.mark.parametrize(("side", "expected"), [(224, 30), (32, 8), (16, 4), (4, 1)])
def test_the_default_width_fits_small_images(side, expected):
  spec = BackboneSpec(8, 1, 16, 1, patch_size=4, image_size=side)
  assert create_method("vp", spec).prompt_size == expected


@pytest.mark.parametrize(
  ("location", "size", "largest"), [("padding", 8, 7), ("fixed_patch", 17, 16)]
)
def test_a_prompt_that_does_not_fit_is_refused(location, size, largest):
  with pytest.raises(ValueError, match=f"expected an integer from 1 to {largest}"):
    create_method("vp", SPEC, location=location, prompt_size=size)
