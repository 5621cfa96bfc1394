"""The blocks of the Vision Transformer and how prompt tokens join them."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.base import BlockPrompts
from insvp_jax.models.layers import LAYER_NORM_EPS, Attention, MlpBlock, join


class Block(nn.Module):
  """One pre-norm encoder block.

  Prompt tokens join the class and patch tokens x in one of two ways. If their outputs
  are read afterwards, they are tokens like all others. If not, as where the next block
  has prompts of its own, they are only keys and values of the attention.
  """

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  fused_attention: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "b_or_1 p d"] | None,
    update_prompts: bool,
    num_read: int | None = None,
  ) -> tuple[Float[Array, "b m d"], Float[Array, "b_or_1_out p d"] | None]:
    """Applies the block.

    Prompts stand after the other tokens here, wherever a paper writes them: attention
    does not depend on the order.

    Args:
      x: class and patch tokens.
      prompts: prompt tokens; the same for all images if the first axis is 1.
      update_prompts: whether the prompts' outputs are read afterwards.
      num_read: how many tokens of x, the first ones, are read afterwards; None for all.
        Of the others only keys and values are computed. For the last block, which
        updates no prompts.

    Returns:
      (x, prompts): the outputs of the tokens that are read, and of the prompts if they
      are updated; else the prompts as they came.
    """
    num_tokens = x.shape[1]
    in_sequence = update_prompts and prompts is not None
    kv_prompts = None if in_sequence else prompts
    if in_sequence:
      x = join(x, prompts)  # [b, n + p, d]
    norm = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_0")
    attention = Attention(
      self.num_heads,
      self.dtype,
      fused=self.fused_attention,
      name="MultiHeadDotProductAttention_0",
    )
    y = norm(x)
    if kv_prompts is not None:
      kv_prompts = norm(kv_prompts)
    # [b, m, d]; all tokens where num_read is None.
    x = x[:, :num_read] + attention(y[:, :num_read], y, kv_prompts)
    y = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_1")(x)
    x = x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y)
    if in_sequence:
      return x[:, :num_tokens], x[:, num_tokens:]
    return x, prompts


class _ScannedBlock(nn.Module):
  """`Block` in the form that `nn.scan` wants: (carry, inputs) -> (carry, outputs)."""

  block: Mapping[str, Any]
  update_prompts: bool

  @nn.compact
  def __call__(self, carry, inputs):
    x, prompts = carry  # the outputs of the block before; prompts only to update them
    new_prompts, is_prompted = inputs
    if self.update_prompts:
      new_prompts = jnp.where(is_prompted, new_prompts, prompts)
    block = Block(**self.block)
    # The scanned block's parameters are the block's own, one level up.
    nn.share_scope(self, block)
    x, new_prompts = block(x, new_prompts, self.update_prompts)
    return (x, new_prompts if self.update_prompts else None), None


def unsharded(
  module: type[nn.Module], unshard: Callable[[Any], Any] | None
) -> type[nn.Module]:
  """Returns the module's class with `unshard` applied to its parameters on use."""
  if unshard is None:
    return module
  return nn.map_variables(module, "params", trans_in_fn=unshard)


class Encoder(nn.Module):
  """The stack of blocks and the final norm.

  Attributes:
    depth, mlp_dim, num_heads, gelu, dtype, remat, scan, fused_attention, unshard: see
      `ViT`.
    num_read: how many tokens, the first ones, are returned; None for all.
  """

  depth: int
  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  remat: bool
  scan: bool
  num_read: int | None = None
  unshard: Callable[[Any], Any] | None = None
  fused_attention: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], prompts: BlockPrompts | None
  ) -> Float[Array, "b m d"]:
    """Returns the normalised tokens of the last block, without prompts."""
    tokens = None if prompts is None else prompts.tokens
    if tokens is not None and not 1 <= tokens.shape[0] <= self.depth:
      raise ValueError(
        f"prompts for {tokens.shape[0]} blocks, but the backbone has {self.depth}; "
        "prompt between 1 block and all of them."
      )
    x = (self._scanned if self.scan else self._unrolled)(x, tokens)
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="encoder_norm")(
      x
    )

  def _block_fields(self) -> dict[str, Any]:
    return {
      "mlp_dim": self.mlp_dim,
      "num_heads": self.num_heads,
      "gelu": self.gelu,
      "dtype": self.dtype,
      "fused_attention": self.fused_attention,
    }

  def _lifted(self, block: type[nn.Module], **remat_options: Any) -> type[nn.Module]:
    """Returns the block's class with `unshard` and `remat`."""
    block = unsharded(block, self.unshard)
    if self.remat:
      return nn.remat(block, **remat_options)
    if self.unshard is not None:
      # All but matrix products is computed again in the backward pass. Otherwise the
      # whole weights of all blocks would be kept for it: a whole backbone.
      policy = jax.checkpoint_policies.dots_saveable
      return nn.remat(block, policy=policy, **remat_options)
    return block

  def _unrolled(self, x, tokens):
    block = self._lifted(Block, static_argnums=(3, 4))
    num_prompted = 0 if tokens is None else tokens.shape[0]
    prompts = None
    for i in range(self.depth):
      if i < num_prompted:
        prompts = tokens[i]  # in place of the outputs of the block before
      # The next block reads the prompts' outputs, unless it has prompts of its own.
      update_prompts = num_prompted <= i + 1 < self.depth
      num_read = self.num_read if i + 1 == self.depth else None
      x, prompts = block(**self._block_fields(), name=f"encoderblock_{i}")(
        x, prompts, update_prompts, num_read
      )
    return x

  def _scanned(self, x, tokens):
    """Computes the same as `_unrolled`, though all blocks have to do the same.

    If one block updates the prompts all of them do, and the last one computes the
    tokens that are not read too.
    """
    num_prompted = 0 if tokens is None else tokens.shape[0]
    update_prompts = 0 < num_prompted < self.depth
    prompts = None
    if update_prompts:
      # What is carried needs its final shape from the start: [b, p, d].
      shape = (x.shape[0], *tokens.shape[2:])
      prompts = jnp.broadcast_to(tokens[0], shape).astype(x.dtype)
      rest = jnp.zeros((self.depth - num_prompted, *tokens.shape[1:]), tokens.dtype)
      tokens = jnp.concatenate([tokens, rest])
    blocks = nn.scan(
      self._lifted(_ScannedBlock, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )(self._block_fields(), update_prompts, name="encoderblock")
    is_prompted = jnp.arange(self.depth) < num_prompted
    (x, _), _ = blocks((x, prompts), (tokens, is_prompted))
    return x[:, : self.num_read]
