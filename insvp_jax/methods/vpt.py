"""Visual prompt tuning: prompts that all images share.

Source: Jia et al. 2022, "Visual Prompt Tuning", eq. 4 to 8. Its ablations (figures 5, 7
and 8, and the published code) are the other fields; by default it is VPT as published.

Parameters for l blocks: l p d of prompts that are prepended, l n d of those that are
added to n tokens, l d for "add-1"; l is 1 if the blocks share them. With `project` q
the prompts are q wide, and the layer has q d + d. Pixels: see `vpt_pixels`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation
from insvp_jax.methods.ops import stage_prompts
from insvp_jax.methods.ops.dropout import Dropout
from insvp_jax.methods.vpt_base import TOKEN_LOCATIONS, VPT
from insvp_jax.methods.vpt_pixels import PIXEL_PROMPTS

_LOCATION_DOC = (
  "where prompts are: prepend (more tokens), add (one to each token) or add-1 (one to "
  "all tokens)"
)


class VPTShallow(VPT):
  """Prompts at the start of the backbone, which carries them along."""

  dropout: float | int = field(
    0.0, "rate on the prompts, drawn for each sample", check=checks.rate, hparam=True
  )
  location: str = field(
    "prepend",
    f"{_LOCATION_DOC}; or pixels: prepend-pixel (a strip of p patches), pad (a border "
    "p pixels wide) or below (p more channels; the patch embedding trains too)",
    check=checks.one_of(*TOKEN_LOCATIONS, *PIXEL_PROMPTS),
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    location, dropout = resolved["location"], resolved["dropout"]
    if dropout and location in ("pad", "below"):
      raise ValueError(
        f"dropout is {dropout}, but with location {location!r} there are no prompt "
        "tokens to drop; set it to 0."
      )
    return resolved

  def setup(self) -> None:
    """Creates the prompts, tokens or pixels."""
    if self.location not in PIXEL_PROMPTS:
      super().setup()
      return
    self.pixels = PIXEL_PROMPTS[self.location](self.spec, self.prompt_length)
    self.prompt_dropout = Dropout(self.hparam("dropout"))

  def prompt_image(self, images, *, train=False):
    return self.pixels(images) if self.location == "pad" else images

  @nn.nowrap
  def prompted_size(self) -> int:
    border = 2 * self.prompt_length if self.location == "pad" else 0
    return self.spec.image_size + border

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    if self.location == "pad":
      return Adaptation()
    if self.location == "below":
      return Adaptation(shared=self.pixels())
    if self.location == "prepend-pixel":
      tokens = stage_prompts.drop(
        self.prompt_dropout, [self.pixels(embed)], images.shape[0], train=train
      )
      return Adaptation(prompts=stage_prompts.join(self.spec, tokens))
    return super().adapt(images, prompted, embed=embed, train=train)

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [l, b, p, d]}, or {"pixels": [b, ...]} of prompt pixels."""
    if self.location not in PIXEL_PROMPTS:
      return super().prompts(images)
    if self.location == "pad":
      return {"pixels": self.pixels(jnp.zeros_like(images))}
    return {"pixels": jnp.repeat(self.pixels.prompt[None], len(images), axis=0)}

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    embedding = self.spec.embedding_patterns if self.location == "below" else ()
    return (*super().trainable_patterns(), *embedding)


class VPTDeep(VPT):
  """Fresh prompts for each block in place of the previous block's outputs."""

  dropout: float | int = field(
    0.1, "rate on the prompts, drawn for each sample", check=checks.rate, hparam=True
  )
  prompted_blocks: int | None = field(
    lambda spec: spec.depth,
    "l blocks get fresh prompts, later ones carry them on; None: all blocks",
    check=checks.block_count,
  )
  prompted_from: str = field(
    "first",
    "which l blocks these are: the first or the last",
    check=checks.one_of("first", "last"),
  )
  expand: bool = field(
    True, "whether later blocks carry the prompts on", check=checks.boolean
  )
  deep_shared: bool = field(
    False, "whether all these blocks get the same prompts", check=checks.boolean
  )
  location: str = field("prepend", _LOCATION_DOC, check=checks.one_of(*TOKEN_LOCATIONS))

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    if resolved["expand"]:
      return resolved
    if resolved["location"] != "prepend":
      raise ValueError(
        f"expand is False, but with location {resolved['location']!r} no prompts are "
        "carried on; leave it out."
      )
    goes_on = resolved["prompted_blocks"] < spec.depth
    ends_early = goes_on and resolved["prompted_from"] == "first"
    if resolved["pool"] in ("prompt", "both") and ends_early:
      raise ValueError(
        f"pool is {resolved['pool']!r}, but with expand=False and prompted_blocks="
        f"{resolved['prompted_blocks']} there are no prompts after the last block; set "
        "expand=True or pool 'cls' or 'image'."
      )
    return resolved

  @nn.nowrap
  def _blocks(self) -> range:
    count, depth = self.prompted_blocks, self.spec.depth
    return range(count) if self.prompted_from == "first" else range(depth)[-count:]

  @nn.nowrap
  def _num_sets(self) -> int:
    return 1 if self.deep_shared else self.prompted_blocks

  @nn.nowrap
  def _carry(self) -> bool:
    return self.expand
