"""An image in the middle of a larger one, for prompts that surround it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def pad(images: Float[Array, "b s s c"], size: int) -> Float[Array, "b t t c"]:
  """Returns images in the middle of zeros, `size` pixels per side.

  Where it cannot be the middle, there is one pixel more before the image than after it.
  """
  before = (size - images.shape[1] + 1) // 2
  after = size - images.shape[1] - before
  return jnp.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))


def hole(size: int, inner: Array | int, start: Array | int) -> Float[Array, "t t 1"]:
  """Returns 0 for the `inner` x `inner` pixels from `start` on, 1 around them."""
  i = jnp.arange(size)
  inside = (i >= start) & (i < start + inner)
  return 1.0 - (inside[:, None] & inside[None]).astype(jnp.float32)[..., None]


def pad_scaled(
  images: Float[Array, "b s s c"], size: int, scale: Float[Array, ""]
) -> Float[Array, "b t t c"]:
  """Returns `pad`, scaled about its centre c = (size - 1) / 2, bilinearly.

  The pixel q of the result is taken from c + (q - c) / scale; what is outside is zero.
  At a scale of 1 that is `pad`, and the scale's gradient takes the mean of the slopes
  on both sides of a pixel.
  """
  centre, inner = (size - 1) / 2, images.shape[1]
  q, p = jnp.arange(size), jnp.arange(inner) + (size - inner + 1) // 2
  source = centre + (q - centre) / scale
  # [t, s]: how much of each pixel.
  weights = jnp.maximum(0.0, 1.0 - jnp.abs(source[:, None] - p))
  weights = weights.astype(images.dtype)
  return jnp.einsum(
    "qp,rs,bpsc->bqrc",
    *(weights, weights, images),
    precision=jax.lax.Precision.HIGHEST,
  )
