"""E2VPT: prompts among the keys and values too, and masks that prune prompts.

Source: Han et al. 2023, "E2VPT: An Effective and Efficient Approach for Visual Prompt
Tuning", eq. 4 to 9; published code for what the paper leaves open.

Deep prompts as VPT's, each times its token's mask and, channel c, piece c mod 16 of its
piece masks; one pair of masks for all blocks. In each block m prompts per head, shared
by keys and values or one set each, join the projected keys and values. A masked prompt
stays in the sequence, as zeros.

Parameters: l p d + (1 or 2) l m d, and 17 p of masks while they train.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, BlockPrompts, Hooks
from insvp_jax.methods.ops.dropout import Dropout, drop_per_sample
from insvp_jax.methods.ops.initializers import symmetric_uniform, vpt_uniform
from insvp_jax.methods.ops.stacked import per_block

PIECES = 16


@dataclasses.dataclass(frozen=True)
class E2VPTHooks(Hooks):
  """Joins the prompts [h, m, e] of a block to its keys and values."""

  def qkv(self, p, q, k, v):
    def join(x: Array, prompt: Array) -> Array:
      prompt = jnp.swapaxes(prompt, 0, 1)  # [m, h, e]
      prompt = jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape))
      return jnp.concatenate([x, prompt.astype(x.dtype)], axis=1)

    return q, join(k, p.block["key"]), join(v, p.block["value"])


def _check_mask(name: str, value: Any, spec: BackboneSpec) -> tuple[Any, ...]:
  """Returns the mask in tuples; its shape is checked with the other fields."""
  del spec

  def is_row(row: Any) -> bool:
    return isinstance(row, tuple | list) and all(
      isinstance(x, float | int) and x in (0, 1) for x in row
    )

  if is_row(value):
    return tuple(map(int, value))
  if isinstance(value, tuple | list) and all(map(is_row, value)):
    return tuple(tuple(map(int, row)) for row in value)
  raise ValueError(f"{name} is {value!r}, expected zeros and ones.")


class E2VPT(Method):
  """VPT-Deep with key and value prompts and pruning.

  The masks are trained, as the published code does, until they are given: see
  `search.pruning` for how a search finds them.
  """

  prompt_length: int = field(5, "prompt tokens p per block", check=checks.positive_int)
  kv_length: int = field(
    5, "key and value prompts m per block and head", check=checks.positive_int
  )
  share_kv: bool = field(
    True, "keys and values have the same prompts", check=checks.boolean
  )
  token_mask: Sequence[float | int] | None = field(
    None,
    "p numbers, 0 for a pruned token; (): nothing is pruned; None: they are trained",
    check=_check_mask,
    keeps=1,
  )
  piece_mask: Sequence[Any] | None = field(
    None,
    f"p rows of {PIECES}, 0 for pruned channels; (): none are; None: trained",
    check=_check_mask,
    keeps=PIECES // 4,
  )
  dropout: float | int = field(
    0.1,
    "rate on the prompts, drawn for each image",
    check=checks.rate,
    hparam=True,
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    for name, shape in cls._mask_shapes(resolved["prompt_length"]).items():
      mask = resolved[name]
      lengths = {len(row) for row in mask or () if isinstance(row, tuple)}
      found = (len(mask or ()), *lengths)
      if mask and found != shape:
        raise ValueError(
          f"{name} has the shape {list(found)}, but prompt_length is {shape[0]}; "
          f"expected {list(shape)} zeros and ones."
        )
    return resolved

  @staticmethod
  def _mask_shapes(length: int) -> dict[str, tuple[int, ...]]:
    return {"token_mask": (length,), "piece_mask": (length, PIECES)}

  @nn.nowrap
  def hooks(self) -> Hooks:
    return E2VPTHooks()

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    return super().claims() | {"prompts"}

  def setup(self) -> None:
    """Creates the prompts, [l, p, d] and [l, h, m, e], and masks that are trained."""
    spec = self.spec
    init = vpt_uniform(spec.patch_size, spec.width)
    shape = (spec.depth, self.prompt_length, spec.width)
    self.common_prompt = self.param("common_prompt", init, shape)
    head_width = spec.width // spec.num_heads
    # Kaiming uniform, as PyTorch counts the fan-in of [h, m, e].
    init = symmetric_uniform(math.sqrt(6 / (self.kv_length * head_width)))
    shape = (spec.depth, spec.num_heads, self.kv_length, head_width)
    self.kv_prompts = {
      name: self.param(f"{name}_prompt", per_block(init), shape)
      for name in (("kv",) if self.share_kv else ("key", "value"))
    }
    self.trained_masks = {
      name: self.param(name, nn.initializers.ones, shape)
      for name, shape in self._mask_shapes(self.prompt_length).items()
      if getattr(self, name) is None
    }
    self.prompt_dropout = Dropout(self.hparam("dropout"))

  @nn.nowrap
  def _mask(self, name: str) -> Array | None:
    """Returns a mask, trained or given; None where nothing is pruned."""
    if name in self.trained_masks:
      return self.trained_masks[name]
    return jnp.asarray(self.hparam(name)) if getattr(self, name) else None

  def _tokens(self) -> Float[Array, "l p d"]:
    """Returns the masked prompts."""
    tokens, width = self.common_prompt, self.spec.width
    by_token, by_piece = self._mask("token_mask"), self._mask("piece_mask")
    if by_token is not None:
      tokens = tokens * by_token[:, None]
    if by_piece is not None:
      tokens = tokens * by_piece[:, np.arange(width) % PIECES]
    return tokens

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del prompted, embed
    tokens = drop_per_sample(
      self.prompt_dropout, self._tokens()[:, None], images.shape[0], train=train
    )
    own = self.kv_prompts
    blocks = {name: own.get(name, own.get("kv")) for name in ("key", "value")}
    return Adaptation(blocks=blocks, prompts=BlockPrompts(tokens))

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [l, b, p, d]}, the same prompts for every image."""
    tokens = self.adapt(images, images).prompts.tokens
    return {"feature": jnp.repeat(tokens, len(images), axis=1)}
