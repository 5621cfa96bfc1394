"""Visual prompt tuning: prompt tokens that all images share.

Source: Jia et al. 2022, "Visual Prompt Tuning", eq. 4 to 8.
"""

import math
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import BlockPrompts, Method
from insvp_jax.methods.ops.dropout import Dropout, is_off
from insvp_jax.methods.ops.initializers import (
  symmetric_uniform,
  torch_uniform,
  vpt_bound,
)


class _VPT(Method):
  """What the shallow and the deep variant share."""

  NUMBERS: ClassVar[tuple[str, ...]] = ("dropout",)
  prompt_length: int = 50
  project: int | None = None
  dropout: float | int = 0.0

  def __post_init__(self) -> None:
    """Checks the fields at construction, before any device work."""
    checks.positive_int("prompt_length", self.prompt_length)
    checks.rate("dropout", self.dropout)
    if self.project is not None:
      checks.positive_int("project", self.project)
    checks.block_count("prompted_blocks", self._num_blocks(), self.spec.depth)
    super().__post_init__()

  @nn.nowrap
  def _num_blocks(self) -> int:
    return 1

  def setup(self) -> None:
    """Creates the prompts [l, p, d] and, if asked for, their projection."""
    width = self.project or self.spec.width
    init = symmetric_uniform(vpt_bound(self.spec.patch_size, width))
    shape = (self._num_blocks(), self.prompt_length, width)
    self.common_prompt = self.param("common_prompt", init, shape)
    if self.project is not None:
      # Kaiming normal over the fan-out, as published.
      self.projection = nn.Dense(
        self.spec.width,
        kernel_init=nn.initializers.normal(math.sqrt(2 / self.spec.width)),
        bias_init=torch_uniform(width),
      )
    self.prompt_dropout = Dropout(self.number("dropout", self.dropout))

  def prompt_tokens(
    self,
    images: Float[Array, "b h w c"],
    prompted_images: Float[Array, "b h w c"],
    *,
    train: bool = False,
  ) -> BlockPrompts:
    """Returns the prompts; their batch axis is 1 unless dropout is on."""
    del prompted_images
    tokens = self.common_prompt
    if self.project is not None:
      tokens = self.projection(tokens)
    tokens = jnp.expand_dims(tokens, 1)
    if train and not is_off(self.prompt_dropout.rate):
      tokens = jnp.repeat(tokens, len(images), axis=1)
      tokens = self.prompt_dropout(tokens, train=True)
    return BlockPrompts(tokens)

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [l, b, p, d]}, the same prompts for every image."""
    tokens = self.prompt_tokens(images, images).tokens
    return {"feature": jnp.repeat(tokens, len(images), axis=1)}


class VPTShallow(_VPT):
  """Prompts that join the sequence at the first block and are carried along.

  Attributes:
    prompt_length: prompt tokens p. VPT searches {1, 5, 10, 50, 100, 200} for each
      task; 50 is the middle of it and the paper's example.
    project: width of the prompts before one dense layer to d, or None for none.
    dropout: rate on the prompts, drawn for each sample.
  """


class VPTDeep(_VPT):
  """Fresh prompts for each block in place of the previous block's outputs.

  Attributes:
    prompt_length: prompt tokens p per block; see `VPTShallow`.
    project: width of the prompts before one dense layer to d, which all blocks
      share, or None for none.
    dropout: rate on the prompts, drawn for each sample.
    prompted_blocks: the first l blocks get fresh prompts, the others carry the
      prompts' outputs on; None is all blocks.
  """

  dropout: float | int = 0.1
  prompted_blocks: int | None = None

  @nn.nowrap
  def _num_blocks(self) -> int:
    return self.spec.depth if self.prompted_blocks is None else self.prompted_blocks
