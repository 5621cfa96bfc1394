"""The networks that turn an image into InsVP's instance-aware prompts.

Source: Liu et al. 2024, "InsVP: Efficient Instance Visual Prompting from Image
Itself", section 3.2 and figure 2.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.ops.conv import AUTO, Conv
from insvp_jax.methods.ops.dropout import Dropout, Rate
from insvp_jax.methods.ops.initializers import torch_uniform

SIMAM_LAMBDA = 1e-3
ACTIVATIONS = {
  "relu": nn.relu,
  "leaky_relu": lambda x: nn.leaky_relu(x, negative_slope=0.01),
}


def simam(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Weights each pixel by how far it stands out of its channel; no parameters.

  Source: Yang et al. 2021, "SimAM", eq. 5 and 6: x * sigmoid(1 / energy).
  """
  deviation = jnp.square(images - jnp.mean(images, axis=(1, 2), keepdims=True))
  num_others = images.shape[1] * images.shape[2] - 1
  variance = jnp.sum(deviation, axis=(1, 2), keepdims=True) / num_others
  inverse_energy = deviation / (4 * (variance + SIMAM_LAMBDA)) + 0.5
  return images * jax.nn.sigmoid(inverse_energy)


def normalized(
  prompts: Float[Array, "b *shape"], rms: float
) -> Float[Array, "b *shape"]:
  """Returns the prompts of each image, scaled to a root mean square.

  A step of the optimizer turns what comes out, but makes it neither larger nor smaller.
  Prompts of almost nothing (below 1e-3) are not blown up.

  Args:
    prompts: pixels or tokens that a network made of each image.
    rms: the root mean square over all values of an image's prompts.
  """
  wide = prompts.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=tuple(range(1, wide.ndim)), keepdims=True)
  return (wide * (rms * jax.lax.rsqrt(mean + 1e-6))).astype(prompts.dtype)


def _dense(features: int, fan_in: int, dtype: Any) -> nn.Dense:
  """Returns a dense layer that starts as PyTorch's does."""
  init = torch_uniform(fan_in)
  return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init)


class PatchPrompter(nn.Module):
  """Two dense layers on each flattened patch: the patch prompt p^l.

  A patch is flattened as (row, column, channel).

  Attributes:
    patch_size: pixels per side of a patch.
    hidden: width of the hidden layer.
    dropout: rate on the assembled prompt.

  Source: InsVP, eq. 5.
  """

  patch_size: int
  hidden: int
  dropout: Rate
  dtype: Any = None

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b h w c"]:
    """Returns the patch prompt, in pixels."""
    size = {"p": self.patch_size, "q": self.patch_size}
    patches = einops.rearrange(images, "b (h p) (w q) c -> b h w (p q c)", **size)
    num_values = patches.shape[-1]
    hidden = nn.relu(_dense(self.hidden, num_values, self.dtype)(patches))
    patches = _dense(num_values, self.hidden, self.dtype)(hidden)
    prompt = einops.rearrange(patches, "b h w (p q c) -> b (h p) (w q) c", **size)
    return Dropout(self.dropout)(prompt, train=train)


class GlobalPrompter(nn.Module):
  """Two dilated convolutions over the whole image: the global prompt p^g.

  Attributes:
    hidden: channels between the convolutions.
    kernels: their two kernel sizes.
    dilations: their two dilations.
    dropout: rate on the prompt.
    conv: form of the convolutions; see `conv.Conv`.

  Source: InsVP, eq. 4.
  """

  hidden: int
  kernels: Sequence[int]
  dilations: Sequence[int]
  dropout: Rate
  conv: str = AUTO
  dtype: Any = None

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b h w c"]:
    """Returns the global prompt, in pixels."""
    channels = images.shape[-1]
    options = {"form": self.conv, "dtype": self.dtype}
    x = Conv(self.hidden, self.kernels[0], self.dilations[0], **options)(images)
    x = Conv(channels, self.kernels[1], self.dilations[1], **options)(nn.relu(x))
    return Dropout(self.dropout)(x, train=train)


@dataclasses.dataclass(frozen=True)
class SpecificGrid:
  """How the specific prompter gets from an image to tokens of the given width.

  A token of width d is a grid of `size` x `size` x `channels` = d.

  Attributes:
    crop: pixels cut off each side before the first pooling.
    size: rows and columns s of a token's grid.
    channels: channels c of a token's grid.
    pool: window k2 of the second pooling; the first one's is 4.
  """

  crop: int
  size: int
  channels: int
  pool: int


def specific_grid(width: int, image_size: int) -> SpecificGrid:
  """Returns the grid of the specific prompter for a backbone.

  s is the largest of 16, 8 and 4 whose square divides the width and that the
  first pooling leaves room for. For 768 at 224 px it is the paper's 16 x 16 x 3.

  Args:
    width: token width d.
    image_size: pixels per side.

  Raises:
    ValueError: no such s; the message says which sizes would do.
  """
  # The published code crops 8 pixels; of a small image that would be too much.
  crop = 8 if image_size >= 64 else 0
  side = (image_size - 2 * crop) // 4
  for size in (16, 8, 4):
    if width % size**2 == 0 and size <= side:
      return SpecificGrid(crop, size, width // size**2, side // size)
  if width % 16:
    need = "the width must be divisible by 16 (4 x 4 pixels per channel)"
  else:
    need = "the image must have at least 16 pixels per side"
  raise ValueError(
    f"InsVP's specific prompt cannot be made for width {width} and image_size "
    f"{image_size}: {need}; or set use_specific=False."
  )


def _center(x: Array, side: int) -> Array:
  """Returns the middle `side` rows and columns of [b, h, w, c]."""
  top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
  return x[:, top : top + side, left : left + side]


def _max_pool(x: Array, size: int) -> Array:
  """Returns the maxima of windows that do not overlap; drops what is left over."""
  # As reductions, one axis after the other: their gradient takes a fraction of the
  # time of a window's on CPUs.
  x = x[:, : x.shape[1] // size * size, : x.shape[2] // size * size]
  x = einops.reduce(x, "b (h p) w c -> b h w c", "max", p=size)
  return einops.reduce(x, "b h (w q) c -> b h w c", "max", q=size)


class SpecificPrompter(nn.Module):
  """Three convolutions with pooling: the specific prompt tokens p^s.

  The trunk has 3 -> p -> 3p channels as published; the last convolution emits c
  channels per token (`specific_grid`), c = 3 where the paper's shapes hold. For tokens
  of several widths, one for each stage of a backbone, the trunk is one and each width
  has a last convolution of its own.

  Attributes:
    widths: token widths d.
    prompt_length: number of tokens p.
    kernels: the three kernel sizes.
    activation: a key of `ACTIVATIONS`.
    dropout: rate after each pooling.
    conv: form of the convolutions; see `conv.Conv`.

  Source: InsVP, eq. 9.
  """

  widths: Sequence[int]
  prompt_length: int
  kernels: Sequence[int]
  activation: str
  dropout: Rate
  conv: str = AUTO
  dtype: Any = None

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> list[Array]:
    """Returns the prompt tokens [b, p, d] of each width d, for all its blocks."""
    grids = [specific_grid(width, images.shape[1]) for width in self.widths]
    grid = grids[0]  # They differ after the second convolution.
    activation = ACTIVATIONS[self.activation]
    p = self.prompt_length
    # Of what the crop cuts off, the convolution needs only what its kernel reaches.
    unreached = max(grid.crop - self.kernels[0] // 2, 0)
    x = _center(images, images.shape[1] - 2 * unreached)
    options = {"form": self.conv, "dtype": self.dtype}
    x = Conv(p, self.kernels[0], **options)(x)  # [b, h, w, p]
    # Pooling first equals the paper's order, since activations are monotone, and
    # leaves the activation a fraction of the pixels.
    x = _max_pool(_center(x, images.shape[1] - 2 * grid.crop), 4)
    x = Dropout(self.dropout)(activation(x), train=train)
    x = Conv(3 * p, self.kernels[1], **options)(x)
    pooled: dict[int, Array] = {}  # by rows of a token's grid
    tokens = []
    for grid in grids:
      if grid.size not in pooled:
        y = _max_pool(_center(x, grid.size * grid.pool), grid.pool)  # [b, s, s, 3p]
        pooled[grid.size] = Dropout(self.dropout)(activation(y), train=train)
      y = pooled[grid.size]
      y = Conv(grid.channels * p, self.kernels[2], **options)(y)
      # As PyTorch flattens: a token is its channels' grids, one after the other.
      tokens.append(einops.rearrange(y, "b h w (p c) -> b p (c h w)", p=p))
    return tokens
