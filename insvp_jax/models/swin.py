"""The Swin Transformer: attention within windows that shift from block to block.

Prompts join every window as in VPT's Swin: they attend to, and are attended by, the
tokens of each window, without a position; what they become is the mean over the
windows. An image's prompts never meet those of another image. (The published prompted
Swin mixes the images of a batch where it carries prompts along.)

Source: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using
Shifted Windows", sections 3.1 and 3.2; Jia et al. 2022, "Visual Prompt Tuning",
appendix A.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax.methods.base import BackboneSpec, Stage
from insvp_jax.methods.hooks import (
  LAYER_NORMS,
  PROMPTS,
  UNCHANGED,
  Adaptation,
  BlockPrompts,
)
from insvp_jax.models.encoder import unsharded
from insvp_jax.models.layers import MlpBlock, PatchEmbedding, join
from insvp_jax.models.quantized import Dense, DenseGeneral
from insvp_jax.models.stages import (
  EMBEDDING_PATTERNS,
  StagedBackbone,
  block_patterns,
  lifted,
)

_EPS = 1e-5
_MLP_RATIO = 4
# Added to the logits of tokens that are no neighbours, as published.
_MASKED = -100.0

_HEADS = {"num_heads": (3, 6, 12, 24)}
VARIANTS = {
  "swin_t": {"width": 96, "depths": (2, 2, 6, 2), **_HEADS},
  "swin_s": {"width": 96, "depths": (2, 2, 18, 2), **_HEADS},
  "swin_b": {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
  "swin_l": {"width": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


def relative_positions(window: int) -> np.ndarray:
  """Returns the row of the bias table for each pair of tokens of a window, [n, n]."""
  rows, columns = np.mgrid[:window, :window].reshape(2, -1)
  down = rows[:, None] - rows + window - 1
  right = columns[:, None] - columns + window - 1
  return down * (2 * window - 1) + right


def shift_mask(grid: int, window: int, shift: int) -> np.ndarray:
  """Returns what is added to the logits of each window, [windows, n, n].

  After a cyclic shift, windows at the border hold tokens of opposite sides.
  """
  # Which of the three parts of an axis a position comes from.
  part = np.zeros(grid, np.int32)
  part[grid - window : grid - shift], part[grid - shift :] = 1, 2
  region = 3 * part[:, None] + part
  region = einops.rearrange(region, "(h p) (w q) -> (h w) (p q)", p=window, q=window)
  differs = region[:, :, None] != region[:, None, :]
  return np.where(differs, _MASKED, 0.0).astype(np.float32)


class WindowAttention(nn.Module):
  """Multi-head attention within windows, with a bias for relative positions.

  Attributes:
    num_heads: number of heads; divides the width.
    window: tokens per side of a window.
    dtype: of the computation.
  """

  num_heads: int
  window: int
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b w n d"],
    prompts: Float[Array, "b_or_1 p d"] | None = None,
    mask: Float[np.ndarray, "w n n"] | None = None,
    read_prompts: bool = False,
  ) -> tuple[Float[Array, "b w n d"], Float[Array, "b p d"] | None]:
    """Returns the outputs of the tokens and, where they are read, of the prompts.

    Args:
      x: the tokens of each window.
      prompts: tokens that join each window.
      mask: added to the logits of the windows' own tokens.
      read_prompts: whether the prompts attend too.
    """
    width, heads = x.shape[-1], self.num_heads
    init = nn.initializers.truncated_normal(0.02)
    query, key, value = (
      DenseGeneral(
        (heads, width // heads), kernel_init=init, dtype=self.dtype, name=name
      )
      for name in ("query", "key", "value")
    )
    table = self.param(
      "relative_position_bias", init, ((2 * self.window - 1) ** 2, heads)
    )
    # In float32 at least, as the softmax.
    dtype = jnp.promote_types(self.dtype, jnp.float32)
    bias = jnp.moveaxis(table[relative_positions(self.window)], -1, 0).astype(dtype)
    bias = bias[None] if mask is None else bias + jnp.asarray(mask, dtype)[:, None]
    q, k, v = query(x), key(x), value(x)  # [b, w, n, h, e]
    num_tokens, num_queries = x.shape[2], 0
    if prompts is not None:

      def every_window(tokens: Array) -> Array:
        # Projected once; from [b or 1, p, h, e] to [b, w, p, h, e].
        return jnp.broadcast_to(tokens[:, None], (*x.shape[:2], *tokens.shape[1:]))

      k = jnp.concatenate([k, every_window(key(prompts))], axis=2)
      v = jnp.concatenate([v, every_window(value(prompts))], axis=2)
      if read_prompts:
        num_queries = prompts.shape[1]
        q = jnp.concatenate([q, every_window(query(prompts))], axis=2)
      bias = jnp.pad(bias, [(0, 0)] * 2 + [(0, num_queries), (0, prompts.shape[1])])
    # Heads before tokens, as in `layers.attend`.
    q, k, v = (jnp.swapaxes(t, 2, 3) for t in (q * q.shape[-1] ** -0.5, k, v))
    logits = jnp.einsum("bwhqe,bwhke->bwhqk", q, k, preferred_element_type=dtype)
    probs = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
    y = jnp.swapaxes(jnp.einsum("bwhqk,bwhke->bwhqe", probs, v), 2, 3)
    out = DenseGeneral(
      width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out"
    )
    if not num_queries:
      return out(y), None
    return out(y[:, :, :num_tokens]), out(jnp.mean(y[:, :, num_tokens:], axis=1))


class Block(nn.Module):
  """One pre-norm block.

  Attributes:
    mlp_dim, num_heads, gelu, dtype: as those of the ViT's blocks.
    window: tokens per side of a window; divides the grid.
    shift: by how many tokens the windows are shifted.
  """

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  window: int
  shift: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "b_or_1 p d"] | None,
    update_prompts: bool,
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b_or_1_out p d"] | None]:
    """Returns the tokens, and the prompts: updated, or as they came."""
    grid, window, shift = round(x.shape[1] ** 0.5), self.window, self.shift
    norm1, norm2 = (
      nn.LayerNorm(epsilon=_EPS, dtype=self.dtype, name=name)
      for name in ("norm1", "norm2")
    )
    mlp = MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="mlp")
    attention = WindowAttention(self.num_heads, window, self.dtype, name="attention")
    sizes = {"h": grid // window, "p": window, "w": grid // window, "q": window}
    y = einops.rearrange(norm1(x), "b (h w) d -> b h w d", h=grid)
    mask = None
    if shift:
      y, mask = jnp.roll(y, (-shift, -shift), (1, 2)), shift_mask(grid, window, shift)
    y = einops.rearrange(y, "b (h p) (w q) d -> b (h w) (p q) d", **sizes)
    normed = None if prompts is None else norm1(prompts)
    y, read = attention(y, normed, mask, update_prompts and prompts is not None)
    y = einops.rearrange(y, "b (h w) (p q) d -> b (h p) (w q) d", **sizes)
    if shift:
      y = jnp.roll(y, (shift, shift), (1, 2))
    x = x + y.reshape(x.shape)
    x = x + mlp(norm2(x))
    if read is not None:
      prompts = prompts + read
      prompts = prompts + mlp(norm2(prompts))
    return x, prompts


class _Pair(nn.Module):
  """A block and one whose windows are shifted, in the form that `nn.scan` wants."""

  blocks: Sequence[Mapping[str, Any]]
  updates: tuple[bool, bool]

  @nn.compact
  def __call__(self, carry, inputs):
    x, prompts = carry  # the outputs of the pair before; prompts only to update them
    new, is_own = inputs
    for i, fields in enumerate(self.blocks):
      given = prompts
      if new is not None:
        given = new[i]
        # Where not all blocks of the stage have prompts of their own.
        if prompts is not None and self.updates[0]:
          given = jnp.where(is_own[i], given, prompts)
      block = Block(**fields, name=f"block_{i}")
      x, given = block(x, given, self.updates[i])
      prompts = given if self.updates[i] else prompts
    return (x, prompts), None


class Merging(nn.Module):
  """Joins 2 x 2 tokens to one of twice the width.

  A prompt stands for all four.
  """

  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], prompts: Float[Array, "b p d"] | None
  ) -> tuple[Float[Array, "b m e"], Float[Array, "b p e"] | None]:
    """Returns a quarter of the tokens, and all prompts."""
    grid, width = round(x.shape[1] ** 0.5), x.shape[-1]
    norm = nn.LayerNorm(epsilon=_EPS, dtype=self.dtype, name="norm")
    reduction = Dense(
      2 * width,
      use_bias=False,
      kernel_init=nn.initializers.truncated_normal(0.02),
      dtype=self.dtype,
      name="reduction",
    )
    # Column by column within the four, as published.
    x = einops.rearrange(
      x, "b (h p w q) d -> b (h w) (q p d)", h=grid // 2, p=2, w=grid // 2, q=2
    )
    if prompts is not None:
      prompts = reduction(norm(jnp.tile(prompts, (1, 1, 4))))
    return reduction(norm(x)), prompts


class SwinStage(nn.Module):
  """Blocks of one width, after the merging of tokens where it is not the first.

  Attributes:
    depth: number of blocks.
    grid: tokens per side.
    window: tokens per side of a window.
    merges: whether tokens are merged first.
    block: the fields that all blocks share.
    dtype, remat, scan, unshard: see `Swin`.
  """

  depth: int
  grid: int
  window: int
  merges: bool
  block: Mapping[str, Any]
  dtype: Any
  remat: bool
  scan: bool
  unshard: Callable[[Any], Any] | None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "b p d"] | None,
    own: Float[Array, "l b_or_1 p e"] | None,
    read_prompts: bool,
  ) -> tuple[Float[Array, "b m e"], Float[Array, "b p e"] | None]:
    """Applies the stage.

    Args:
      x: the tokens.
      prompts: the outputs of the prompts of the stage before, where they are read.
      own: prompts for the first l blocks, in place of the outputs of the block before.
      read_prompts: whether the outputs of the prompts are read after the stage.

    Returns:
      (tokens, prompts or None).
    """
    if self.merges:
      x, prompts = unsharded(Merging, self.unshard)(self.dtype, name="downsample")(
        x, prompts
      )
    # A window as large as the grid has nowhere to go.
    shift = self.window // 2 if self.window < self.grid else 0
    shared = {**self.block, "dtype": self.dtype, "window": self.window}
    fields = [{**shared, "shift": 0}, {**shared, "shift": shift}]
    run = self._scanned if self.scan else self._unrolled
    x, prompts = run(x, prompts, own, read_prompts, fields)
    return x, prompts if read_prompts else None

  def _unrolled(self, x, prompts, own, read_prompts, fields):
    block = lifted(Block, self.remat, self.unshard, static_argnums=(3,))
    count = 0 if own is None else own.shape[0]
    for i in range(self.depth):
      if i < count:
        prompts = own[i]
      update = read_prompts if i + 1 == self.depth else i + 1 >= count
      x, prompts = block(**fields[i % 2], name=f"block_{i}")(
        x, prompts, update and prompts is not None
      )
    return x, prompts

  def _scanned(self, x, prompts, own, read_prompts, fields):
    """Computes the same, though all pairs of blocks have to do the same."""
    count = 0 if own is None else own.shape[0]
    carries = count < self.depth and (own is not None or prompts is not None)
    reads = read_prompts and (own is not None or prompts is not None)
    is_own = einops.rearrange(np.arange(self.depth) < count, "(l i) -> l i", i=2)
    if own is not None:
      # What is carried needs its final shape from the start: [b, p, d].
      prompts = None
      if carries or reads:
        prompts = jnp.broadcast_to(own[0], (x.shape[0], *own.shape[2:])).astype(x.dtype)
      rest = jnp.zeros((self.depth - count, *own.shape[1:]), own.dtype)
      own = einops.rearrange(
        jnp.concatenate([own, rest]), "(l i) b p d -> l i b p d", i=2
      )
    pairs = nn.scan(
      lifted(_Pair, self.remat, self.unshard, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth // 2,
    )(fields, (carries, carries or reads), name="blocks")
    (x, prompts), _ = pairs((x, prompts), (own, jnp.asarray(is_own)))
    return x, prompts


class Swin(StagedBackbone):
  """A Swin Transformer without its head.

  Attributes:
    width: of the first stage's tokens; each later stage's is twice that of the one
      before.
    num_heads: attention heads of each stage; one number is the first stage's, and each
      later one has twice as many as the one before.
    window: tokens per side of a window. It divides each stage's grid, or the grid is
      smaller and is one window.
    patch_size: pixels per side of a patch.
    gelu: "exact" (as published) or "tanh".

  The others are those of `StagedBackbone`. With `scan` one program serves all pairs of
  blocks of a stage, whose depths are then even.
  """

  width: int
  num_heads: Sequence[int] | int
  window: int = 7
  patch_size: int = 4
  gelu: str = "exact"

  def setup(self) -> None:
    """Checks the sizes and creates the sub-modules."""
    self.check()
    dtype = jnp.dtype(self.dtype)
    self.embedding = unsharded(PatchEmbedding, self.unshard)(
      self.width, self.patch_size, dtype
    )
    self.embedding_norm = nn.LayerNorm(epsilon=_EPS, dtype=dtype)
    for i, stage in enumerate(self._stages()):
      module = SwinStage(
        depth=stage.depth,
        grid=stage.grid,
        window=min(self.window, stage.grid),
        merges=i > 0,
        block={
          "mlp_dim": stage.mlp_dim,
          "num_heads": stage.num_heads,
          "gelu": self.gelu,
        },
        dtype=dtype,
        remat=self.remat,
        scan=self.scan,
        unshard=self.unshard,
      )
      setattr(self, f"stage_{i}", module)
    self.norm = nn.LayerNorm(epsilon=_EPS, dtype=dtype)
    self.create_head()

  def check(self) -> None:
    super().check()
    if self.gelu not in ("exact", "tanh"):
      raise ValueError(f"gelu is {self.gelu!r}, expected one of {('exact', 'tanh')}.")
    if len(self.depths) != len(self._heads()):
      raise ValueError(
        f"depths has {len(self.depths)} stages and num_heads {len(self._heads())}."
      )
    for stage in self._stages():
      if stage.width % stage.num_heads:
        raise ValueError(
          f"width {stage.width} is not divisible by num_heads {stage.num_heads}."
        )
      if self.scan and stage.depth % 2:
        raise ValueError(
          f"scan takes blocks in pairs, but depths is {tuple(self.depths)}; set "
          "scan=False."
        )
    coarsest = self.patch_size * 2 ** (len(self.depths) - 1)
    if self.image_size % coarsest:
      raise ValueError(
        f"image_size {self.image_size} is not a multiple of {coarsest}, which is one "
        "token of the last stage."
      )
    for stage in self._stages():
      if stage.grid > self.window and stage.grid % self.window:
        raise ValueError(
          f"a stage has {stage.grid} x {stage.grid} tokens, which windows of "
          f"{self.window} x {self.window} do not divide; take image_size="
          f"{coarsest * self.window} or another window."
        )

  def _heads(self) -> tuple[int, ...]:
    if isinstance(self.num_heads, int):
      return tuple(self.num_heads * 2**i for i in range(len(self.depths)))
    return tuple(self.num_heads)

  def _stages(self) -> tuple[Stage, ...]:
    grid = self.image_size // self.patch_size
    return tuple(
      Stage(
        width=self.width * 2**i,
        depth=depth,
        mlp_dim=_MLP_RATIO * self.width * 2**i,
        num_heads=heads,
        grid=grid // 2**i,
      )
      for i, (depth, heads) in enumerate(zip(self.depths, self._heads(), strict=False))
    )

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a method is built from."""
    return self.create_spec(
      self._stages(),
      self.patch_size,
      {PROMPTS, LAYER_NORMS},
      block_patterns(self.depths, follows="downsample"),
      norm_patterns=(
        "backbone/stage_.*/norm[12]?/.*",
        "backbone/embedding_norm/.*",
        "backbone/norm/.*",
      ),
      embedding_patterns=EMBEDDING_PATTERNS,
    )

  @nn.nowrap
  def place(self, block: int) -> tuple[str, int] | None:
    """Returns where a block stands where pairs are stacked; see `StagedBackbone`."""
    return f"blocks/block_{block % 2}", block // 2

  def patches(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Returns patch tokens of images of any size."""
    return self.embedding_norm(self.embedding(images))

  def encode(
    self, tokens: Float[Array, "b n d"], adaptation: Adaptation = UNCHANGED
  ) -> Float[Array, "b e"]:
    """Returns the mean of the last tokens and prompts, under an adaptation.

    Raises:
      ValueError: the prompts do not fit the stages.
    """
    own = self._own_prompts(adaptation.prompts)
    x, prompts = tokens, None
    for i in range(len(self.depths)):
      # The next stage reads the outputs, unless it has prompts of its own; after the
      # last one they are pooled.
      is_last = i + 1 == len(self.depths)
      read = is_last or own[i + 1] is None
      x, prompts = getattr(self, f"stage_{i}")(x, prompts, own[i], read)
    if prompts is not None:
      x = join(x, prompts)
    return self.finish(jnp.mean(self.norm(x), axis=1))

  def _own_prompts(self, prompts: BlockPrompts | None) -> list[Array | None]:
    """Returns the prompts of each stage's first blocks, or None."""
    own: list[Array | None] = [None] * len(self.depths)
    if prompts is None:
      return own
    if prompts.first or not prompts.carry or not isinstance(prompts.tokens, tuple):
      raise ValueError(
        "a backbone of several stages takes prompts as a tuple with an array for each "
        "stage, from block 0 on, and carries them along."
      )
    for i, tokens in enumerate(prompts.tokens):
      own[i] = tokens.astype(self.dtype)
    return own
