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
  """One pre-norm encoder block over patch tokens and prompt tokens."""

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  fused_attention: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "c p d"] | None,
    keep: bool,
    num_read: int | None = None,
  ) -> tuple[Float[Array, "b m d"], Float[Array, "c2 p d"] | None]:
    """Applies the block.

    Attention does not depend on the order of its keys, so prompts stand after
    the tokens here, wherever a paper writes them.

    Args:
      x: tokens whose outputs are needed.
      prompts: prompt tokens, c = b, or 1 when all instances share them.
      keep: whether a later block reads the prompts' outputs.
      num_read: how many tokens, the first ones, are read afterwards; None for all.
        The others are keys and values only.

    Returns:
      (tokens, prompts): the first `num_read` tokens; the prompts' outputs if `keep`,
      else prompts unchanged.
    """
    num_tokens = x.shape[1]
    if keep and prompts is not None:
      x, context = join(x, prompts), None
    else:
      context = prompts
    norm = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_0")
    attention = Attention(
      self.num_heads,
      self.dtype,
      absorb=num_read == 1,
      fused=self.fused_attention,
      name="MultiHeadDotProductAttention_0",
    )
    y = norm(x)
    context = None if context is None else norm(context)
    if num_read is None:
      x = x + attention(y, context=context)
    else:
      x = x[:, :num_read] + attention(y[:, :num_read], keys=y, context=context)
    y = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_1")(x)
    x = x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y)
    if keep and prompts is not None:
      return x[:, :num_tokens], x[:, num_tokens:]
    return x, prompts


class _ScannedBlock(nn.Module):
  """`Block` in the form that `nn.scan` wants: carry, inputs -> carry, outputs."""

  block: Mapping[str, Any]
  keep: bool

  @nn.compact
  def __call__(self, carry, inputs):
    x, carried = carry
    fresh, replace = inputs
    prompts = fresh
    if self.keep:
      prompts = jnp.where(replace, fresh, carried)
    block = Block(**self.block)
    # The scanned block's parameters are the block's own, one level up.
    nn.share_scope(self, block)
    x, prompts = block(x, prompts, self.keep)
    return (x, prompts if self.keep else carried), None


def _is_no_weight(primitive: Any, *_: Any, **__: Any) -> bool:
  """Returns whether the backward pass may keep what a block computed this way.

  Weights are taken from the stack, and cast, once more: kept, they are all blocks'.
  """
  return primitive.name not in ("dynamic_slice", "squeeze", "convert_element_type")


def gathering(
  module: type[nn.Module], gather: Callable[[Any], Any] | None
) -> type[nn.Module]:
  """Returns the module's class with `gather` applied to its parameters in use."""
  if gather is None:
    return module
  return nn.map_variables(module, "params", trans_in_fn=gather)


class Encoder(nn.Module):
  """The stack of blocks and the final norm."""

  depth: int
  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  remat: bool
  scan: bool
  num_read: int | None = None
  gather: Callable[[Any], Any] | None = None
  fused_attention: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], prompts: BlockPrompts | None
  ) -> Float[Array, "b m d"]:
    """Returns the normalised tokens of the last block, without prompts.

    Of them it returns the first `num_read`, or all.
    """
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

  def _fields(self) -> dict[str, Any]:
    return {
      "mlp_dim": self.mlp_dim,
      "num_heads": self.num_heads,
      "gelu": self.gelu,
      "dtype": self.dtype,
      "fused_attention": self.fused_attention,
    }

  def _lifted(self, block: type[nn.Module], **options: Any) -> type[nn.Module]:
    """Returns the block's class as the stack uses it: gathering, rematerialised."""
    block = gathering(block, self.gather)
    options = self._remat_options(**options)
    return block if options is None else nn.remat(block, **options)

  def _remat_options(self, **options: Any) -> dict[str, Any] | None:
    """Returns the options of `remat`; None where blocks are not computed again."""
    if self.remat:
      return options
    if self.gather is None:
      return None
    # What is no matrix product is computed again. Otherwise the gathered weights of
    # all blocks would be kept for the backward pass: a whole backbone.
    return {"policy": jax.checkpoint_policies.dots_saveable, **options}

  def _unrolled(self, x, tokens):
    block = self._lifted(Block, static_argnums=(3, 4))
    num_prompted = 0 if tokens is None else tokens.shape[0]
    prompts = None
    for i in range(self.depth):
      if i < num_prompted:
        prompts = tokens[i]
      # Outputs of prompts that are replaced next, or stand last, are not read.
      keep = prompts is not None and num_prompted <= i + 1 < self.depth
      num_read = self.num_read if i + 1 == self.depth else None
      x, prompts = block(**self._fields(), name=f"encoderblock_{i}")(
        x, prompts, keep, num_read
      )
    return x

  def _scanned(self, x, tokens):
    num_prompted = 0 if tokens is None else tokens.shape[0]
    keep = 0 < num_prompted < self.depth
    carried = None
    if keep:
      shape = (x.shape[0], *tokens.shape[2:])
      carried = jnp.broadcast_to(tokens[0], shape).astype(x.dtype)
      rest = jnp.zeros((self.depth - num_prompted, *tokens.shape[1:]), tokens.dtype)
      tokens = jnp.concatenate([tokens, rest])
    inputs = (tokens, jnp.arange(self.depth) < num_prompted)
    if self.num_read is not None and not self.is_initializing():
      return self._scanned_but_last((x, carried), inputs, keep)
    blocks = nn.scan(
      self._lifted(_ScannedBlock, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )(self._fields(), keep, name="encoderblock")
    (x, _), _ = blocks((x, carried), inputs)
    return x if self.num_read is None else x[:, : self.num_read]

  def _scanned_but_last(self, carry, inputs, keep):
    """The last block stands alone, since it computes less than the others."""
    stacked = self.variables["params"]["encoderblock"]
    gather = self.gather or (lambda params: params)

    def take(i):
      # Taken from the whole stack: a shorter one to scan over would be a copy.
      return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False),
        (stacked, inputs),
      )

    def step(carry, i):
      params, inputs = take(i)
      body = _ScannedBlock(self._fields(), keep, parent=None)
      return body.apply({"params": gather(params)}, carry, inputs)

    def last(x, carried):
      params, (tokens, _) = take(self.depth - 1)
      prompts = carried if keep else tokens
      block = Block(**self._fields(), parent=None)
      return block.apply({"params": gather(params)}, x, prompts, False, self.num_read)

    options = self._remat_options()
    if options is not None:
      last = jax.checkpoint(last, **options)
    options = {"policy": _is_no_weight} if options is None else options
    step = jax.checkpoint(step, prevent_cse=False, **options)
    (x, carried), _ = jax.lax.scan(step, carry, jnp.arange(self.depth - 1))
    x, _ = last(x, carried)
    return x
