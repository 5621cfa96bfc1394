"""Visual prompt tuning: prompt tokens that all images share.

Source: Jia et al. 2022, "Visual Prompt Tuning", eq. 4 to 8.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, BlockPrompts
from insvp_jax.methods.ops.dropout import Dropout, is_off
from insvp_jax.methods.ops.initializers import (
  symmetric_uniform,
  torch_uniform,
  vpt_bound,
)


def _dropout_field(default: float) -> Any:
  """Declares what the variants share but for the published default."""
  doc = "rate on the prompts, drawn for each sample"
  return field(default, doc, check=checks.rate, hparam=True)


class _VPT(Method):
  """What the shallow and the deep variant share.

  VPT searches a prompt length of 1, 5, 10, 50, 100 or 200 for each task; the default is
  the middle of it and the paper's example.
  """

  prompt_length: int = field(50, "prompt tokens p per block", check=checks.positive_int)
  project: int | None = field(
    None,
    "width of the prompts before a dense layer that all blocks share; None: no layer",
    check=checks.positive_int,
  )

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
    self.prompt_dropout = Dropout(self.hparam("dropout"))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    """Returns the prompts; their batch axis is 1 unless dropout is on."""
    del prompted, embed
    tokens = self.common_prompt
    if self.project is not None:
      tokens = self.projection(tokens)
    tokens = jnp.expand_dims(tokens, 1)  # [l, 1, p, d]
    if train and not is_off(self.prompt_dropout.rate):
      tokens = jnp.repeat(tokens, len(images), axis=1)
      tokens = self.prompt_dropout(tokens, train=True)
    return Adaptation(prompts=BlockPrompts(tokens))

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [l, b, p, d]}, the same prompts for every image."""
    tokens = self.adapt(images, images).prompts.tokens
    return {"feature": jnp.repeat(tokens, len(images), axis=1)}


class VPTShallow(_VPT):
  """Prompts that join the sequence at the first block and are carried along."""

  dropout: float | int = _dropout_field(0.0)


class VPTDeep(_VPT):
  """Fresh prompts for each block in place of the previous block's outputs."""

  dropout: float | int = _dropout_field(0.1)
  prompted_blocks: int | None = field(
    lambda spec: spec.depth,
    "the first l blocks get fresh prompts, later ones carry them on; None: all blocks",
    check=checks.block_count,
  )

  @nn.nowrap
  def _num_blocks(self) -> int:
    return self.prompted_blocks
