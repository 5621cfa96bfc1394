"""ResNet, with the statistics of its BatchNorms as the backbone's training left them.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition"; the stride
stands in the 3 x 3 convolution, as in all published PyTorch weights.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.base import BackboneSpec, Stage
from insvp_jax.methods.hooks import PROMPTED_SIZE, UNCHANGED, Adaptation
from insvp_jax.models.encoder import unsharded
from insvp_jax.models.quantized import Conv
from insvp_jax.models.stages import (
  StagedBackbone,
  apply_blocks,
  block_patterns,
  check_coarsest,
  lifted,
)

_EPS = 1e-5
# A block's output is so many times as wide as its 3 x 3 convolution.
_EXPANSION = 4
# Pixels per side of one position of the first stage.
_STEM = 4

VARIANTS = {
  "resnet50": {"depths": (3, 4, 6, 3)},
  "resnet101": {"depths": (3, 4, 23, 3)},
}


class FrozenBatchNorm(nn.Module):
  """Scales and shifts channels by statistics that stay as they are."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Returns the normalised channels."""
    inits = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    scale, bias, mean, var = (
      self.param(name, nn.initializers.constant(value), (x.shape[-1],))
      for name, value in inits.items()
    )
    factor = scale * jax.lax.rsqrt(var + _EPS)
    shift = bias - mean * factor
    return x * factor.astype(x.dtype) + shift.astype(x.dtype)


def _conv(
  width: int,
  size: int,
  stride: int,
  dtype: Any,
  name: str | None = None,
  conv: type[nn.Module] = Conv,
) -> nn.Module:
  pad = size // 2
  return conv(
    width,
    (size, size),
    strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    dtype=dtype,
    name=name,
  )


class Block(nn.Module):
  """Three convolutions around which the input goes.

  Attributes:
    width: of the output.
    stride: of the 3 x 3 convolution.
    projects: whether the input goes through a convolution of its own.
    dtype: of the computation.
  """

  width: int
  stride: int
  projects: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j e"]:
    """Returns what leaves the block."""

    def norm(name: str) -> nn.Module:
      return FrozenBatchNorm(self.dtype, name=name)

    hidden = self.width // _EXPANSION
    layers = ((hidden, 1, 1), (hidden, 3, self.stride), (self.width, 1, 1))
    y = x
    for i, (width, size, stride) in enumerate(layers):
      y = norm(f"norm_{i}")(_conv(width, size, stride, self.dtype, f"conv_{i}")(y))
      y = nn.relu(y) if i < 2 else y
    if self.projects:
      x = _conv(self.width, 1, self.stride, self.dtype, "shortcut")(x)
      x = norm("shortcut_norm")(x)
    return nn.relu(x + y)


class ResNetStage(nn.Module):
  """Blocks of one width, of which the first one projects its input."""

  width: int
  depth: int
  stride: int
  dtype: Any
  remat: bool
  scan: bool
  unshard: Callable[[Any], Any] | None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j e"]:
    """Returns what leaves the stage."""
    first = lifted(Block, self.remat, self.unshard)
    x = first(self.width, self.stride, True, self.dtype, name="block_0")(x)
    return apply_blocks(
      x,
      Block,
      {"width": self.width, "stride": 1, "projects": False, "dtype": self.dtype},
      range(1, self.depth),
      remat=self.remat,
      scan=self.scan,
      unshard=self.unshard,
    )


class ResNet(StagedBackbone):
  """A ResNet of bottleneck blocks without its head.

  Attributes:
    width: channels of the stem; the first stage has four times as many, and each later
      one twice as many as the one before.

  The others are those of `StagedBackbone`. With `scan` one program serves all blocks of
  a stage but the first.
  """

  width: int = 64

  def check(self) -> None:
    super().check()
    check_coarsest(self.image_size, _STEM, len(self.depths))

  def setup(self) -> None:
    """Checks the sizes and creates the sub-modules."""
    self.check()
    dtype = jnp.dtype(self.dtype)
    self.embedding = _conv(self.width, 7, 2, dtype, conv=self._lifted(Conv))
    self.embedding_norm = self._lifted(FrozenBatchNorm)(dtype)
    for i, depth in enumerate(self.depths):
      module = ResNetStage(
        width=_EXPANSION * self.width * 2**i,
        depth=depth,
        stride=1 if i == 0 else 2,
        dtype=dtype,
        remat=self.remat,
        scan=self.scan,
        unshard=self.unshard,
      )
      setattr(self, f"stage_{i}", module)
    self.create_head()

  def _lifted(self, module: type[nn.Module]) -> type[nn.Module]:
    return unsharded(module, self.unshard)

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a method is built from."""
    grid = self.image_size // _STEM
    widths = [_EXPANSION * self.width * 2**i for i in range(len(self.depths))]
    stages = tuple(
      Stage(width, depth, 0, 0, grid // 2**i)
      for i, (width, depth) in enumerate(zip(widths, self.depths, strict=True))
    )
    return self.create_spec(
      stages,
      _STEM,
      {PROMPTED_SIZE},
      block_patterns(self.depths, leaf=".*(kernel|scale|bias)"),
      constant_patterns=("backbone/.*/(mean|var)",),
    )

  @nn.nowrap
  def place(self, block: int) -> tuple[str, int] | None:
    """Returns where a block stands where they are stacked; see `StagedBackbone`."""
    return ("blocks", block - 1) if block else None

  def patches(self, images: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    """Returns the positions of the first stage, of images of any size."""
    x = nn.relu(self.embedding_norm(self.embedding(images.astype(self.dtype))))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

  def encode(
    self, x: Float[Array, "b h w d"], adaptation: Adaptation = UNCHANGED
  ) -> Float[Array, "b e"]:
    """Returns the mean of the last positions; no hook is here."""
    del adaptation
    for i in range(len(self.depths)):
      x = getattr(self, f"stage_{i}")(x)
    return self.finish(jnp.mean(x, axis=(1, 2)))
