"""The blocks of the Vision Transformer, how prompt tokens join them and methods act."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.hooks import (
  NO_ARRAYS,
  UNCHANGED,
  Adaptation,
  BlockPrompts,
  HookArrays,
  Hooks,
  block_of,
)
from insvp_jax.models.layers import (
  LAYER_NORM_EPS,
  After,
  Attention,
  LayerScale,
  MlpBlock,
  image_by_image,
  join,
)


def bind_after(hooks: Hooks, arrays: HookArrays) -> After:
  """Returns `hooks.after` over its arrays; None where it changes no operation."""
  if not hooks.overrides("after"):
    return None

  def after(name: str, x: Array, y: Array) -> Array:
    if name not in hooks.at:
      return y
    return hooks.after(arrays, name, x, y).astype(y.dtype)

  return after


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
  hooks: Hooks = Hooks()
  mlp: str = "gelu"
  layer_scale: bool = False
  norm_eps: float = LAYER_NORM_EPS

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "b_or_1 p d"] | None,
    update_prompts: bool,
    num_read: int | None = None,
    arrays: HookArrays = NO_ARRAYS,
  ) -> tuple[Float[Array, "b m d"], Float[Array, "b_or_1_out p_out d"] | None, Any]:
    """Applies the block.

    Prompts stand after the other tokens here, wherever a paper writes them: attention
    does not depend on the order.

    Args:
      x: class and patch tokens.
      prompts: prompt tokens; the same for all images if the first axis is 1.
      update_prompts: whether the prompts' outputs are read afterwards.
      num_read: how many tokens of x, the first ones, are read afterwards; None for all.
        Of the others only keys and values are computed. For the last block.
      arrays: for the hooks.

    Returns:
      (x, prompts, reads): the outputs of the tokens that are read, and of the prompts
      if they are updated, else the prompts as they came; and what `Hooks.leave` keeps
      for the loss.
    """
    hooks = self.hooks
    after = bind_after(hooks, arrays)

    def norm(name: str, site: str) -> Callable[[Array], Array]:
      layer = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)
      return lambda x: layer(x) if after is None else after(site, x, layer(x))

    def branch(site: str, stream: Array, normed: Array, out: Array) -> Array:
      if self.layer_scale:
        name = "LayerScale_0" if site == "attn" else "LayerScale_1"
        out = LayerScale(self.dtype, name=name)(out)
      if site not in hooks.at:
        return out
      return hooks.branch(arrays, site, stream, normed, out).astype(out.dtype)

    if hooks.overrides("enter"):
      dtype = x.dtype
      x, prompts = hooks.enter(arrays, x, prompts)
      x = x.astype(dtype)
    before = (x[:, :num_read], prompts)
    num_tokens = before[0].shape[1]
    x = image_by_image(x)
    in_sequence = update_prompts and prompts is not None
    kv_prompts = None if in_sequence else prompts
    if in_sequence:
      x = join(x, prompts)  # [b, n + p, d]
    norm1 = norm("LayerNorm_0", "norm1")
    attention = Attention(
      self.num_heads,
      self.dtype,
      fused=self.fused_attention,
      name="MultiHeadDotProductAttention_0",
    )
    y = norm1(x)
    if kv_prompts is not None:
      kv_prompts = norm1(kv_prompts)
    change_qkv = None
    if hooks.overrides("qkv"):
      change_qkv = functools.partial(_cast_qkv, functools.partial(hooks.qkv, arrays))
    # [b, m, d]; all tokens where num_read is None.
    num_prompts = prompts.shape[1] if in_sequence else 0
    x, read = (_read_rows(rows, num_read, num_prompts) for rows in (x, y))
    out = attention(read, y, kv_prompts, after, change_qkv)
    x = image_by_image(x + branch("attn", x, read, out))
    y = norm("LayerNorm_1", "norm2")(x)
    mlp = MlpBlock(self.mlp_dim, self.gelu, self.dtype, self.mlp, name="MlpBlock_0")
    x = image_by_image(x + branch("mlp", x, y, mlp(y, after)))
    if in_sequence:
      x, prompts = x[:, :num_tokens], x[:, num_tokens:]
    reads = None
    if hooks.overrides("leave"):
      dtype = x.dtype
      x, prompts, reads = hooks.leave(arrays, x, prompts, before)
      x = x.astype(dtype)
    return x, prompts, reads


def _read_rows(x: Array, num_read: int | None, num_prompts: int) -> Array:
  """Returns the first rows of x [b, m, d], and the last ones, which are prompts."""
  if num_read is None:
    return x
  if num_prompts == 0:
    return x[:, :num_read]
  return jnp.concatenate([x[:, :num_read], x[:, -num_prompts:]], axis=1)


def _cast_qkv(
  change: Callable[..., tuple[Array, Array, Array]], q: Array, k: Array, v: Array
) -> tuple[Array, Array, Array]:
  """Returns what `change` makes of queries, keys and values, in their own type."""
  return tuple(x.astype(q.dtype) for x in change(q, k, v))


class _ScannedBlock(nn.Module):
  """`Block` in the form that `nn.scan` wants: (carry, inputs) -> (carry, outputs)."""

  block: Mapping[str, Any]
  update_prompts: bool
  keeps: bool = False

  @nn.compact
  def __call__(self, carry, inputs, shared):
    x, prompts = carry  # the outputs of the block before; prompts only to update them
    new_prompts, is_prompted, arrays = inputs
    if self.update_prompts and new_prompts is not None:
      new_prompts = jnp.where(is_prompted, new_prompts, prompts)
    block = Block(**self.block)
    # The scanned block's parameters are the block's own, one level up.
    nn.share_scope(self, block)
    x, new_prompts, reads = block(
      x, new_prompts, self.update_prompts, None, HookArrays(arrays, shared)
    )
    new_prompts = new_prompts if self.update_prompts else None
    return (x, new_prompts), (reads, x if self.keeps else None)


def unstacked(x: Float[Array, "l *shape"]) -> list[Array]:
  """Returns the slices of the first axis.

  As a split, whose gradient puts the slices' gradients side by side. That of an index
  pads each to the whole and adds them all up.
  """
  return [jnp.squeeze(part, 0) for part in jax.lax.split(x, (1,) * len(x))]


def unsharded(
  module: type[nn.Module], unshard: Callable[[Any], Any] | None
) -> type[nn.Module]:
  """Returns the module's class with `unshard` applied to its parameters on use."""
  if unshard is None:
    return module
  return nn.map_variables(module, "params", trans_in_fn=unshard)


def _cast(tree: Any, dtype: Any) -> Any:
  """Returns the tree with its floating point leaves in the type of the computation."""

  def cast(leaf: Any) -> Any:
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, dtype) if is_float else leaf

  return jax.tree.map(cast, tree)


class Encoder(nn.Module):
  """The stack of blocks and the final norm.

  Attributes:
    depth, mlp_dim, num_heads, gelu, dtype, remat, scan, fused_attention, unshard, mlp,
      layer_scale, norm_eps: see `ViT`.
    num_read: how many tokens, the first ones, are returned; None for all.
    final_norm: whether the tokens are normalised at the end.
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
  mlp: str = "gelu"
  layer_scale: bool = False
  norm_eps: float = LAYER_NORM_EPS
  final_norm: bool = True

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    adaptation: Adaptation = UNCHANGED,
    keep: tuple[int, ...] | None = None,
  ) -> Float[Array, "b m d"] | Float[Array, "b d"] | tuple[Float[Array, "b n d"], ...]:
    """Returns the normalised tokens of the last block, without prompts.

    Where a hook pools, it is the feature [b, d]. What the hooks keep for the loss is
    sown in the collection "reads", as the list "blocks".

    Args:
      x: prefix and patch tokens.
      adaptation: the arrays of a method, and its hooks.
      keep: blocks, counted from 1: then all tokens after each of them, as they are, and
        those of the last block, normalised, are returned. No hook may pool.
    """
    _check(adaptation.prompts, self.depth)
    pools = adaptation.hooks.overrides("pool")
    alike = _are_alike(adaptation, self.depth)
    if self.scan and not alike and self.is_initializing():
      # The parameters that are made do not depend on what a method does with tokens.
      adaptation, alike = UNCHANGED, True
    hooks = adaptation.hooks
    adaptation = adaptation.replace(
      blocks=_cast(adaptation.blocks, self.dtype),
      shared=_cast(adaptation.shared, self.dtype),
    )
    if not self.scan:
      run = self._unrolled
    elif alike:
      run = self._scanned
    else:
      run = self._unstacked
    x, prompts, reads, kept = run(x, adaptation, keep)
    if reads is not None:
      self.sow("reads", "blocks", reads, reduce_fn=lambda _, new: new, init_fn=list)
    arrays = HookArrays(None, adaptation.shared)
    after = bind_after(hooks, arrays)

    layer = None
    if self.final_norm:
      layer = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="encoder_norm")

    def norm(x: Array) -> Array:
      if layer is None:
        return x
      return layer(x) if after is None else after("encoder_norm", x, layer(x))

    if keep is not None:
      return (*kept, norm(x))
    if hooks.overrides("pool"):
      return hooks.pool(arrays, norm, x, prompts)
    return norm(x)[:, 0] if pools else norm(x)

  def _block_fields(self, hooks: Hooks) -> dict[str, Any]:
    return {
      "mlp_dim": self.mlp_dim,
      "num_heads": self.num_heads,
      "gelu": self.gelu,
      "dtype": self.dtype,
      "fused_attention": self.fused_attention,
      "hooks": hooks,
      "mlp": self.mlp,
      "layer_scale": self.layer_scale,
      "norm_eps": self.norm_eps,
    }

  def _remat_policy(self) -> dict[str, Any] | None:
    """Returns what `nn.remat` or `jax.checkpoint` shall do; None for nothing."""
    if self.remat:
      return {}
    if self.unshard is not None:
      # All but matrix products is computed again in the backward pass. Otherwise the
      # whole weights of all blocks would be kept for it: a whole backbone.
      return {"policy": jax.checkpoint_policies.dots_saveable}
    return None

  def _lifted(self, block: type[nn.Module], **remat_options: Any) -> type[nn.Module]:
    """Returns the block's class with `unshard` and `remat`."""
    block, policy = unsharded(block, self.unshard), self._remat_policy()
    return block if policy is None else nn.remat(block, **policy, **remat_options)

  def _num_read(self, hooks: Hooks, keep: tuple[int, ...] | None) -> int | None:
    """Returns how many tokens the last block has to compute; None for all."""
    return None if keep is not None or hooks.overrides("pool") else self.num_read

  def _unrolled(self, x, adaptation, keep):
    block = self._lifted(Block, static_argnums=(3, 4))
    fields = self._block_fields(adaptation.hooks)
    return self._in_turn(
      x, adaptation, keep, lambda i: block(**fields, name=f"encoderblock_{i}")
    )

  def _unstacked(self, x, adaptation, keep):
    """As `_unrolled`, of parameters that are stacked: where blocks differ."""
    stacked = self.variables["params"]["encoderblock"]
    block = Block(**self._block_fields(adaptation.hooks), parent=None)

    def apply(i: int):
      def call(stacked, x, prompts, update_prompts, num_read, arrays):
        params = jax.tree.map(lambda leaf: leaf[i], stacked)
        if self.unshard is not None:
          params = self.unshard(params)
        return block.apply(
          {"params": params}, x, prompts, update_prompts, num_read, arrays
        )

      policy = self._remat_policy()
      if policy is not None:
        call = jax.checkpoint(call, static_argnums=(3, 4), **policy)
      return functools.partial(call, stacked)

    return self._in_turn(x, adaptation, keep, apply)

  def _in_turn(self, x, adaptation, keep, get_block):
    """Applies one block after the other; `get_block(i)` is the i-th."""
    hooks = adaptation.hooks
    # A block's own prompts: an array, or None where those of the block before go on.
    own = dict.fromkeys(range(self.depth))
    carries = not hooks.makes_prompts
    if adaptation.prompts is not None:
      tokens, first = adaptation.prompts.tokens, adaptation.prompts.first
      own |= dict(enumerate(unstacked(tokens), first))
      carries = carries and adaptation.prompts.carry
    num_read = self._num_read(hooks, keep)
    prompts, reads, kept = None, [], []
    for i in range(self.depth):
      if own[i] is not None:
        prompts = own[i]
      elif not carries:
        prompts = None
      is_last = i + 1 == self.depth
      # The next block reads the prompts' outputs, unless it has prompts of its own.
      goes_on = not is_last and carries and own[i + 1] is None
      update_prompts = goes_on or hooks.reads_prompts
      update_prompts |= is_last and hooks.pools_prompts
      arrays = HookArrays(block_of(adaptation.blocks, i), adaptation.shared)
      x, prompts, read = get_block(i)(
        x, prompts, update_prompts, num_read if is_last else None, arrays
      )
      reads.append(read)
      if keep is not None and i + 1 in keep:
        kept.append(x)
    if num_read is not None:
      x = x[:, :num_read]
    return x, prompts, reads if hooks.overrides("leave") else None, kept

  def _scanned(self, x, adaptation, keep):
    """Computes the same as `_unrolled`, though all blocks have to do the same.

    If one block updates the prompts all of them do, and the last one computes the
    tokens that are not read too.
    """
    hooks, prompts = adaptation.hooks, None
    tokens = None if adaptation.prompts is None else adaptation.prompts.tokens
    num_prompted = 0 if tokens is None else tokens.shape[0]
    update_prompts = 0 < num_prompted < self.depth or (
      num_prompted > 0 and hooks.pools_prompts
    )
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
      in_axes=(0, nn.broadcast),
      length=self.depth,
    )(self._block_fields(hooks), update_prompts, bool(keep), name="encoderblock")
    is_prompted = jnp.arange(self.depth) < num_prompted
    (x, prompts), (reads, outputs) = blocks(
      (x, prompts), (tokens, is_prompted, adaptation.blocks), adaptation.shared
    )
    x = x[:, : self._num_read(hooks, keep)]
    kept = [outputs[block - 1] for block in keep or ()]
    if not hooks.overrides("leave"):
      return x, prompts, None, kept
    return x, prompts, [block_of(reads, i) for i in range(self.depth)], kept


def _are_alike(adaptation: Adaptation, depth: int) -> bool:
  """Returns whether all blocks do the same, so that one program serves all."""
  hooks, prompts = adaptation.hooks, adaptation.prompts
  if isinstance(adaptation.blocks, list) or hooks.reads_prompts:
    return False
  if prompts is None:
    return True
  ends_early = not prompts.carry and prompts.tokens.shape[0] < depth
  return not hooks.makes_prompts and prompts.first == 0 and not ends_early


def _check(prompts: BlockPrompts | None, depth: int) -> None:
  if prompts is None:
    return
  count = prompts.tokens.shape[0]
  if count < 1 or prompts.first < 0 or prompts.first + count > depth:
    start = f" from block {prompts.first} on" if prompts.first else ""
    raise ValueError(
      f"prompts for {count} blocks{start}, but the backbone has {depth}; "
      "prompt between 1 block and all of them."
    )
