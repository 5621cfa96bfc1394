"""ConvNeXt: a convolutional network with the proportions of Swin.

Source: Liu et al. 2022, "A ConvNet for the 2020s", section 2 and appendix A.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.base import BackboneSpec, Stage
from insvp_jax.methods.hooks import (
  LAYER_NORMS,
  PROMPTED_SIZE,
  UNCHANGED,
  Adaptation,
)
from insvp_jax.models.encoder import unsharded
from insvp_jax.models.layers import LAYER_NORM_EPS, MlpBlock, PatchEmbedding
from insvp_jax.models.quantized import Conv
from insvp_jax.models.stages import (
  EMBEDDING_PATTERNS,
  StagedBackbone,
  apply_blocks,
  block_patterns,
  check_coarsest,
)

_MLP_RATIO = 4
_KERNEL = 7

VARIANTS = {
  "convnext_t": {"width": 96, "depths": (3, 3, 9, 3)},
  "convnext_s": {"width": 96, "depths": (3, 3, 27, 3)},
  "convnext_b": {"width": 128, "depths": (3, 3, 27, 3)},
  "convnext_l": {"width": 192, "depths": (3, 3, 27, 3)},
}


class Block(nn.Module):
  """A depthwise convolution and an MLP on each position, scaled by channel."""

  gelu: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Returns what leaves the block."""
    width = x.shape[-1]
    pad = _KERNEL // 2
    y = Conv(
      width,
      (_KERNEL, _KERNEL),
      padding=((pad, pad), (pad, pad)),
      feature_group_count=width,
      kernel_init=nn.initializers.truncated_normal(0.02),
      dtype=self.dtype,
      name="depthwise",
    )(x)
    y = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="norm")(y)
    y = y.reshape(y.shape[0], -1, width)
    y = MlpBlock(_MLP_RATIO * width, self.gelu, self.dtype, name="mlp")(y)
    gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
    return x + y.reshape(x.shape) * gamma.astype(y.dtype)


class Downsampling(nn.Module):
  """Joins 2 x 2 positions to one of another width."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j e"]:
    """Returns half as many rows and columns."""
    x = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="norm")(x)
    return Conv(
      self.width,
      (2, 2),
      strides=(2, 2),
      padding="VALID",
      kernel_init=nn.initializers.truncated_normal(0.02),
      dtype=self.dtype,
      name="reduction",
    )(x)


class ConvNeXtStage(nn.Module):
  """Blocks of one width, after the downsampling where it is not the first."""

  width: int
  depth: int
  reduces: bool
  gelu: str
  dtype: Any
  remat: bool
  scan: bool
  unshard: Callable[[Any], Any] | None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j e"]:
    """Returns what leaves the stage."""
    if self.reduces:
      downsampling = unsharded(Downsampling, self.unshard)
      x = downsampling(self.width, self.dtype, name="downsample")(x)
    return apply_blocks(
      x,
      Block,
      {"gelu": self.gelu, "dtype": self.dtype},
      range(self.depth),
      remat=self.remat,
      scan=self.scan,
      unshard=self.unshard,
    )


class ConvNeXt(StagedBackbone):
  """A ConvNeXt without its head.

  Attributes:
    width: channels of the first stage; each later one has twice as many as the one
      before.
    patch_size: pixels per side of a position of the first stage.
    gelu: "exact" (as published) or "tanh".

  The others are those of `StagedBackbone`.
  """

  width: int
  patch_size: int = 4
  gelu: str = "exact"

  def check(self) -> None:
    super().check()
    check_coarsest(self.image_size, self.patch_size, len(self.depths))
    if self.gelu not in ("exact", "tanh"):
      raise ValueError(f"gelu is {self.gelu!r}, expected one of {('exact', 'tanh')}.")

  def setup(self) -> None:
    """Checks the sizes and creates the sub-modules."""
    self.check()
    dtype = jnp.dtype(self.dtype)
    self.embedding = unsharded(PatchEmbedding, self.unshard)(
      self.width, self.patch_size, dtype
    )
    self.embedding_norm = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype)
    for i, depth in enumerate(self.depths):
      module = ConvNeXtStage(
        width=self.width * 2**i,
        depth=depth,
        reduces=i > 0,
        gelu=self.gelu,
        dtype=dtype,
        remat=self.remat,
        scan=self.scan,
        unshard=self.unshard,
      )
      setattr(self, f"stage_{i}", module)
    self.norm = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype)
    self.create_head()

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a method is built from."""
    grid = self.image_size // self.patch_size
    widths = [self.width * 2**i for i in range(len(self.depths))]
    stages = tuple(
      Stage(width, depth, _MLP_RATIO * width, 0, grid // 2**i)
      for i, (width, depth) in enumerate(zip(widths, self.depths, strict=True))
    )
    return self.create_spec(
      stages,
      self.patch_size,
      {PROMPTED_SIZE, LAYER_NORMS},
      block_patterns(self.depths, follows="downsample"),
      norm_patterns=(
        "backbone/stage_.*/norm/.*",
        "backbone/embedding_norm/.*",
        "backbone/norm/.*",
      ),
      embedding_patterns=EMBEDDING_PATTERNS,
    )

  def patches(self, images: Float[Array, "b s s c"]) -> Float[Array, "b h w d"]:
    """Returns the positions of the first stage, of images of any size."""
    side = images.shape[1] // self.patch_size
    x = self.embedding(images)
    return self.embedding_norm(x.reshape(x.shape[0], side, side, self.width))

  def encode(
    self, x: Float[Array, "b h w d"], adaptation: Adaptation = UNCHANGED
  ) -> Float[Array, "b e"]:
    """Returns the normalised mean of the last positions; no hook is here."""
    del adaptation
    for i in range(len(self.depths)):
      x = getattr(self, f"stage_{i}")(x)
    return self.finish(self.norm(jnp.mean(x, axis=(1, 2))))
