"""Prompt tokens that all images share."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.ops.dropout import Dropout, is_off


def drop_per_image(
  dropout: Dropout, tokens: Float[Array, "l p d"], num_images: int, train: bool
) -> Float[Array, "l b_or_1 p d"]:
  """Returns the tokens with an axis of images, which is 1 unless dropout is on.

  Dropout is drawn for each image.
  """
  tokens = jnp.expand_dims(tokens, 1)
  if train and not is_off(dropout.rate):
    tokens = dropout(jnp.repeat(tokens, num_images, axis=1), train=True)
  return tokens
