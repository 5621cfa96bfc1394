"""SETR's head of progressive upsampling: maps of patch tokens in, logits of pixels out.

Source: Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence
Perspective with Transformers", section 3.2, figure 1 (b), in the form of
mmsegmentation's `SETRUPHead` and its config for ADE20K: LayerNorm, 3 x 3 convolutions
to 256 channels, each with batch norm, ReLU and bilinear upsampling, and a 1 x 1
convolution to the classes. The main head has four of them and doubles the size after
each; three auxiliary heads, which only train, have two and enlarge four times.

Parameters of a head of m convolutions, c channels, width d and k classes:
2 d + 9 (d + (m - 1) c) c + 2 m c + (c + 1) k; the running means and variances of its
batch norms, 2 m c, do not train.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.ops.batch_norm import BatchNorm

# mmsegmentation's.
_LAYER_NORM_EPS = 1e-6
NUM_CONVS, NUM_AUX_CONVS = 4, 2
_UP, _AUX_UP = 2, 4


def aux_blocks(depth: int) -> tuple[int, ...]:
  """Returns the blocks whose maps auxiliary heads see, counted from 1.

  Those of SETR are 10, 15 and 20 of 24; of another depth they lie at the same shares.
  """
  blocks = {max(1, depth * block // 24) for block in (10, 15, 20)}
  return tuple(sorted(blocks))


class UpHead(nn.Module):
  """Convolutions, each with upsampling, and a classifier of pixels.

  Attributes:
    num_classes: k.
    channels: of each convolution, c.
    num_convs: how many there are, m.
    up: by how much each of them enlarges the map, up to the size of the image.
    dtype: of the convolutions; norms and logits are float32.
  """

  num_classes: int
  channels: int
  num_convs: int
  up: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b g g d"], size: int, *, train: bool
  ) -> Float[Array, "b h w k"]:
    """Returns logits in float32.

    Args:
      x: a map of patch tokens.
      size: pixels per side of the image, h = w.
      train: whether batch norms take the batch's statistics.
    """
    x = nn.LayerNorm(epsilon=_LAYER_NORM_EPS, name="LayerNorm_0")(x.astype(jnp.float32))
    for i in range(self.num_convs):
      x = nn.Conv(
        self.channels,
        (3, 3),
        use_bias=False,
        dtype=self.dtype,
        # Kaiming normal over the fan-out.
        kernel_init=nn.initializers.normal(math.sqrt(2 / (9 * self.channels))),
        name=f"Conv_{i}",
      )(x)
      x = BatchNorm(name=f"BatchNorm_{i}")(x.astype(jnp.float32), train=train)
      x = nn.relu(x)
      if i + 1 < self.num_convs:
        x = resize(x, min(self.up * x.shape[1], size))
    # The classifier and the last upsampling are both linear, and weights of upsampling
    # sum to one: in this order there are fewer pixels to classify, and the same logits.
    x = nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.normal(0.01),
      name="classifier",
    )(x)
    # In the published order a last resize to the size of the labels follows.
    return resize(resize(x, min(self.up * x.shape[1], size)), size)


def resize(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
  """Returns a map that is enlarged bilinearly, with half-pixel centres."""
  if x.shape[1] == size:
    return x
  shape = (x.shape[0], size, size, x.shape[3])
  return jax.image.resize(x, shape, "linear", antialias=False)


class SETRHead(nn.Module):
  """The main head, and auxiliary ones on the maps of earlier blocks.

  Attributes:
    num_classes: k.
    channels: of the convolutions.
    num_aux: how many auxiliary heads there are.
    dtype: of the convolutions.
  """

  num_classes: int
  channels: int = 256
  num_aux: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, maps: tuple[Float[Array, "b g g d"], ...], size: int, *, train: bool = False
  ) -> tuple[Float[Array, "b h w k"], ...]:
    """Returns the logits of the main head and, in training, of the auxiliary ones.

    Args:
      maps: those for the auxiliary heads, and that for the main head.
      size: pixels per side of the image.
      train: whether the model is trained.
    """
    *aux, last = maps
    main = UpHead(
      self.num_classes, self.channels, NUM_CONVS, _UP, self.dtype, name="main"
    )(last, size, train=train)
    if not (train or self.is_initializing()):
      return (main,)
    others = [
      UpHead(
        self.num_classes,
        self.channels,
        NUM_AUX_CONVS,
        _AUX_UP,
        self.dtype,
        name=f"aux_{i}",
      )(x, size, train=train)
      for i, x in enumerate(aux)
    ]
    return (main, *others)
