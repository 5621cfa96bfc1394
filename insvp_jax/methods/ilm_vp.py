"""ILM-VP: a frame of pixels around a small image, and a mapping of labels.

Source: Chen et al. 2023, "Understanding and Improving Visual Prompting: A Label-Mapping
Perspective", algorithm 1, and its published code.

The image, with pixels in [0, 1], lies in the middle of S x S zeros; around it is
sigmoid(delta), which starts grey; the whole is normalised. The logit of a class is that
of the source class that stands for it: before each epoch it is counted what the
prompted training images are taken for, and the most frequent pairs are taken, one by
one ("iterative"); or once before training ("frequency", the paper's FLM-VP).

Parameters: 3 S^2, of which those under the image have no effect.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.fields import field
from insvp_jax.methods.label_mapped import (
  FIXED,
  FREQUENCY,
  ITERATIVE,
  LabelMapped,
  check_inner_size,
  default_inner_size,
)
from insvp_jax.methods.ops import frame


class ILMVP(LabelMapped):
  """A trained frame; the source's classes in the place of a head."""

  inner_size: int | None = field(
    default_inner_size,
    "pixels per side of the image in the frame; None: 4/7 of the backbone's, "
    "as 128 of 224",
    check=check_inner_size,
  )
  mapping: str = field(
    ITERATIVE,
    "source classes of a class: iterative (anew before each epoch), frequency (once) "
    "or fixed (the first ones)",
    check=checks.one_of(ITERATIVE, FREQUENCY, FIXED),
  )
  sources_per_target: int = field(
    1, "source classes whose mean logit is a class's", check=checks.positive_int
  )

  def prompt_image(self, images, *, train=False):
    del train
    # Relative to black, so that what is not there is zero.
    black = self.black()
    inner = frame.pad(images - black.astype(images.dtype), self.spec.image_size)
    return inner + (self.border() + black).astype(images.dtype)

  def border(self) -> Float[Array, "t t c"]:
    """Returns the frame in normalised units, zero under the image."""
    side, inner = self.spec.image_size, self.inner_size
    around = frame.hole(side, inner, (side - inner + 1) // 2)
    return around * jax.nn.sigmoid(self.delta) / jnp.asarray(self.spec.std)
