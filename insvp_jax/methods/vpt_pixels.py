"""VPT's prompts that are pixels: what its paper compares with prompt tokens.

Source: Jia et al. 2022, "Visual Prompt Tuning", figure 5 and its published code.
"""

from collections.abc import Callable

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.base import BackboneSpec
from insvp_jax.methods.ops.initializers import vpt_uniform

# ImageNet's, as published, whatever the backbone's own inputs are.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PixelStrip(nn.Module):
  """P patches side by side, which become tokens by the frozen patch embedding.

  Parameters: 3 s^2 P, s the patch size.
  """

  spec: BackboneSpec
  length: int

  def setup(self) -> None:
    """Creates the prompt [s, s * P, 3]."""
    size = self.spec.patch_size
    init = vpt_uniform(size, self.spec.stages[0].width)
    self.prompt = self.param("prompt", init, (size, size * self.length, 3))

  def __call__(self, embed: Callable[[Array], Array]) -> Float[Array, "1 p d"]:
    """Returns the tokens from left to right, without positions."""
    return embed(self.prompt[None])


class PixelBorder(nn.Module):
  """A border around the image, k pixels wide on each side.

  Its values in [0, 1] are normalised by ImageNet's mean and standard deviation.
  Parameters: 12 k (S + k), S pixels per side of the image.
  """

  spec: BackboneSpec
  length: int

  def setup(self) -> None:
    """Creates the rows [2k, S + 2k, 3] and the columns [S, 2k, 3]."""
    size, double = self.spec.image_size, 2 * self.length
    init = nn.initializers.uniform(1.0)
    self.top_bottom = self.param("top_bottom", init, (double, size + double, 3))
    self.left_right = self.param("left_right", init, (size, double, 3))

  def __call__(self, images: Float[Array, "b s s c"]) -> Float[Array, "b t t c"]:
    """Returns the images with the border around them."""

    def around(x: Array, border: Array, axis: int) -> Array:
      border = (border - jnp.asarray(_MEAN)) / jnp.asarray(_STD)
      border = jnp.broadcast_to(border.astype(x.dtype), (x.shape[0], *border.shape))
      before, after = jnp.split(border, 2, axis=axis)
      return jnp.concatenate([before, x, after], axis=axis)

    return around(around(images, self.left_right, 2), self.top_bottom, 1)


class PixelChannels(nn.Module):
  """More channels of the image, the same for all, with weights of the embedding.

  Parameters: c (S^2 + s^2 d), c channels; and those of the backbone's embedding, which
  trains too.
  """

  spec: BackboneSpec
  length: int

  def setup(self) -> None:
    """Creates the channels [S, S, c] and the kernel [s, s, c, d]."""
    spec = self.spec
    init = vpt_uniform(spec.patch_size, spec.width)
    pixels = (spec.image_size, spec.image_size, self.length)
    self.prompt = self.param("prompt", init, pixels)
    kernel = (spec.patch_size, spec.patch_size, self.length, spec.width)
    self.kernel = self.param("kernel", init, kernel)

  def __call__(self) -> Float[Array, "1 n d"]:
    """Returns what the channels add to the patch tokens."""
    size = self.spec.patch_size
    patches = einops.rearrange(
      self.prompt, "(h p) (w q) c -> (h w) (p q c)", p=size, q=size
    )
    return (patches @ self.kernel.reshape(-1, self.spec.width))[None]


# By the value of the field "location".
PIXEL_PROMPTS = {
  "prepend-pixel": PixelStrip,
  "pad": PixelBorder,
  "below": PixelChannels,
}
