"""The Vision Transformer, with big_vision's variants and parameter names.

One backbone serves every method: it takes arrays and functions
(`methods.hooks.Adaptation`) and knows nothing of where they come from.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 1-4;
variants and names as in google-research/big_vision.
"""

from collections.abc import Callable, Sequence
import functools
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax import trees
from insvp_jax.methods.base import BackboneSpec
from insvp_jax.methods.hooks import SITES, UNCHANGED, Adaptation, HookArrays
from insvp_jax.models import positions
from insvp_jax.models.backbone import Backbone
from insvp_jax.models.encoder import Encoder, bind_after, unsharded
from insvp_jax.models.layers import (
  GELUS,
  LAYER_NORM_EPS,
  MLPS,
  MAPHead,
  PatchEmbedding,
)
from insvp_jax.models.quantized import Dense

# name: (width, depth, mlp_dim, num_heads)
VARIANTS = {
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "So400m": (1152, 27, 4304, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
  "G": (1664, 48, 8192, 16),
}
POOLS = ("tok", "gap", "map")


def decode_variant(variant: str) -> dict[str, int]:
  """Returns the sizes of a variant such as "B/16".

  Raises:
    ValueError: unknown size, or no integer patch size after the slash.
  """
  name, slash, patch = variant.partition("/")
  width, depth, mlp_dim, num_heads = trees.lookup(VARIANTS, name, "ViT variant")
  if not slash or not patch.isdigit() or int(patch) == 0:
    raise ValueError(
      f"the variant {variant!r} names no patch size; write it as '{name}/16'."
    )
  return {
    "width": width,
    "depth": depth,
    "mlp_dim": mlp_dim,
    "num_heads": num_heads,
    "patch_size": int(patch),
  }


class ViT(Backbone):
  """A Vision Transformer without its head.

  Attributes:
    width: token width d.
    depth: number of blocks l.
    mlp_dim: hidden width of the MLP.
    num_heads: attention heads; divides `width`.
    patch_size: pixels per side of a patch.
    image_size: pixels per side of an image; a multiple of `patch_size`.
    pool: "tok" (class token), "gap" (mean of the patch tokens) or "map"
      (attention pooling). Prompts are never pooled.
    gelu: "tanh" (JAX releases), "exact" (PyTorch releases) or "quick" (CLIP).
    mlp: "gelu", or "swiglu": gated, with a first layer of 2 `mlp_dim` channels.
    class_token: whether a class token is among the tokens; None where it is pooled.
    registers: further tokens without a position, which are not pooled.
    layer_scale: scale the channels of each branch. A file's factors are folded into the
      projections before them where the model has none: the same function.
    pre_norm: normalise the tokens before the first block, as CLIP does.
    fc_norm: normalise the pooled feature in place of the tokens, as a fine-tuned MAE.
    norm_eps: of all norms: 1e-6, or 1e-5 (CLIP).
    projection: width of a last layer without bias, as CLIP's; 0 leaves it away.
    dtype: "float32" or "bfloat16", of the computation; parameters keep theirs. With
      JAX's x64 turned on also "float64".
    remat: recompute each block in the backward pass; saves memory, costs time.
    scan: one compiled block for all, parameters stacked on a leading axis;
      saves compile time. The names become `Transformer/encoderblock/...`.
    skip_unread: leave out of the last block what the pool does not read: with "tok"
      the queries and the MLP of all patch tokens. The feature stays the same. Scanned
      blocks compute everything.
    fused_attention: attend by `jax.nn.dot_product_attention`: on NVIDIA GPUs, and with
      dtype "bfloat16", cuDNN's flash attention.
    head_classes: classes of the head that the backbone was trained with, kept for
      methods that read it; 0 leaves it away.
    unshard: makes parameters that are sharded over devices whole where they are used, a
      block's within the block. It must keep their values. None leaves them as they are,
      and initialisation needs None.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: int
  image_size: int
  pool: str = "tok"
  gelu: str = "tanh"
  mlp: str = "gelu"
  class_token: bool | None = None
  registers: int = 0
  layer_scale: bool = False
  pre_norm: bool = False
  fc_norm: bool = False
  norm_eps: float = LAYER_NORM_EPS
  projection: int = 0
  dtype: str = "float32"
  remat: bool = False
  scan: bool = False
  skip_unread: bool = True
  fused_attention: bool = False
  head_classes: int = 0
  unshard: Callable[[Any], Any] | None = None

  def setup(self) -> None:
    """Checks the sizes and creates the sub-modules."""
    self.check()
    dtype = jnp.dtype(self.dtype)
    num_patches = (self.image_size // self.patch_size) ** 2
    self.embedding = unsharded(PatchEmbedding, self.unshard)(
      self.width, self.patch_size, dtype
    )
    self.pos_embedding = self.param(
      "pos_embedding",
      nn.initializers.normal(1 / self.width**0.5),
      (1, num_patches, self.width),
    )
    if self.has_cls:
      self.cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
    if self.registers:
      self.register_tokens = self.param(
        "registers", nn.initializers.normal(1e-6), (1, self.registers, self.width)
      )
    block = {
      "mlp_dim": self.mlp_dim,
      "num_heads": self.num_heads,
      "gelu": self.gelu,
      "dtype": dtype,
      "norm_eps": self.norm_eps,
    }
    norm = functools.partial(
      unsharded(nn.LayerNorm, self.unshard), epsilon=self.norm_eps, dtype=dtype
    )
    if self.pre_norm:
      self.norm_before = norm(name="pre_norm")
    if self.fc_norm:
      self.norm_of_feature = norm(name="fc_norm")
    self.Transformer = Encoder(
      depth=self.depth,
      remat=self.remat,
      scan=self.scan,
      num_read=1 if self.skip_unread and self.pool == "tok" else None,
      unshard=self.unshard,
      fused_attention=self.fused_attention,
      mlp=self.mlp,
      layer_scale=self.layer_scale,
      final_norm=not self.fc_norm,
      **block,
    )
    if self.pool == "map":
      self.MAPHead_0 = unsharded(MAPHead, self.unshard)(**block)
    if self.projection:
      self.project = unsharded(Dense, self.unshard)(
        self.projection, use_bias=False, dtype=dtype, name="projection"
      )
    self.create_head()

  def check(self) -> None:
    """Checks that the fields fit together.

    Raises:
      ValueError: they do not; the message names them.
    """
    for field, known in (("pool", POOLS), ("gelu", GELUS), ("mlp", MLPS)):
      if getattr(self, field) not in known:
        raise ValueError(
          f"{field} is {getattr(self, field)!r}, expected one of {tuple(known)}."
        )
    if self.pool == "tok" and not self.has_cls:
      raise ValueError(
        "pool is 'tok', but class_token=False leaves no class token to be pooled; "
        "expected pool 'gap' or 'map'."
      )
    self.check_dtype()
    if self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not divisible by num_heads {self.num_heads}."
      )
    head_width = self.width // self.num_heads
    if self.fused_attention and head_width % 8:
      raise ValueError(
        f"fused_attention needs heads whose width is a multiple of 8, as cuDNN does; "
        f"{self.num_heads} heads of {self.width} have {head_width}. Turn it off."
      )
    if self.image_size % self.patch_size:
      raise ValueError(
        f"image_size {self.image_size} is not a multiple of patch_size "
        f"{self.patch_size}."
      )

  @property
  def has_cls(self) -> bool:
    """Whether a class token is among the tokens."""
    return self.pool == "tok" if self.class_token is None else self.class_token

  @property
  def num_prefix(self) -> int:
    """Number of tokens before those of the patches."""
    return int(self.has_cls) + self.registers

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a method is built from."""
    last_norm = "fc_norm" if self.fc_norm else "Transformer/encoder_norm"
    return BackboneSpec(
      width=self.width,
      depth=self.depth,
      mlp_dim=self.mlp_dim,
      num_heads=self.num_heads,
      patch_size=self.patch_size,
      image_size=self.image_size,
      num_prefix=self.num_prefix,
      # Its output is wider than the hidden tokens of the gated MLP.
      sites=SITES - {"fc1"} if self.mlp == "swiglu" else SITES,
      block_patterns=()
      if self.scan
      else tuple(
        f"backbone/Transformer/encoderblock_{i}/.*" for i in range(self.depth)
      ),
      norm_patterns=(
        "backbone/Transformer/encoderblock.*/LayerNorm_[01]/.*",
        *(["backbone/pre_norm/.*"] if self.pre_norm else []),
        f"backbone/{last_norm}/.*",
      ),
      embedding_patterns=("backbone/embedding/.*",),
      head_classes=self.head_classes,
      dtype=self.dtype,
    )

  def without_scales(self, patterns: Sequence[str]) -> "ViT":
    """Returns the ViT without LayerScale, unless it or what it scales is trained.

    Args:
      patterns: regular expressions over the names of the trainable parameters.
    """
    block = "backbone/Transformer/encoderblock"
    leaves = [
      f"{name}/{site}"
      for name in (block, *(f"{block}_{i}" for i in range(self.depth)))
      for site in (
        *("LayerScale_0/scale", "LayerScale_1/scale"),
        *(f"MultiHeadDotProductAttention_0/out/{leaf}" for leaf in ("kernel", "bias")),
        *(f"MlpBlock_0/Dense_1/{leaf}" for leaf in ("kernel", "bias")),
      )
    ]
    if any(re.fullmatch(p, leaf) for p in patterns for leaf in leaves):
      return self
    return self.clone(layer_scale=False)

  def patches(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Returns patch tokens of images of any size, without positions."""
    return self.embedding(images)

  def embed(
    self,
    images: Float[Array, "b h w c"],
    adaptation: Adaptation = UNCHANGED,
    *,
    size: int = 0,
  ) -> Float[Array, "b n d"]:
    """Returns patch tokens with their position embedding.

    Args:
      images: the images.
      adaptation: whose hooks may change the tokens, before the positions.
      size: pixels per side of the images; 0 is the backbone's own. For another size
        the position embedding is resized, linearly with aligned corners.

    Raises:
      ValueError: the images do not have that size.
    """
    self.check_size(images, size)
    x = self.embedding(images)
    after = bind_after(adaptation.hooks, HookArrays(None, adaptation.shared))
    if after is not None:
      x = after("embedding", images, x)
    pos_embedding = self.pos_embedding
    if self.unshard is not None:
      pos_embedding = self.unshard(pos_embedding)
    if x.shape[1] != pos_embedding.shape[1]:
      pos_embedding = positions.resize_traced(
        pos_embedding, images.shape[1] // self.patch_size
      )
    return x + pos_embedding.astype(x.dtype)

  def encode(
    self, tokens: Float[Array, "b n d"], adaptation: Adaptation = UNCHANGED
  ) -> Float[Array, "b f"]:
    """Returns the pooled feature of patch tokens under an adaptation."""
    if self.head_classes and self.is_initializing():
      self.head(jnp.zeros((1, self.projection or self.width)))
    x = self.Transformer(self._with_prefix(tokens), adaptation)
    if not adaptation.hooks.overrides("pool"):
      x = self._pool(x)
    if self.fc_norm:
      after = bind_after(adaptation.hooks, HookArrays(None, adaptation.shared))
      y = self.norm_of_feature(x)
      x = y if after is None else after("encoder_norm", x, y)
    return self.project(x) if self.projection else x

  def tokens(self, images: Float[Array, "b h w c"]) -> Float[Array, "b m d"]:
    """Returns the tokens of the last block, normalised unless the feature is.

    Without `skip_unread` these are all: class token, registers, patches row by row.
    """
    return self.Transformer(self._with_prefix(self.embed(images)))

  def maps(
    self,
    tokens: Float[Array, "b n d"],
    adaptation: Adaptation = UNCHANGED,
    blocks: tuple[int, ...] = (),
  ) -> tuple[Float[Array, "b g g d"], ...]:
    """Returns maps of patch tokens, without class token, registers and prompts.

    Args:
      tokens: patch tokens, from `embed`.
      adaptation: of a method; it must not pool.
      blocks: which blocks' outputs are wanted, ascending and counted from 1.

    Returns:
      One for each of `blocks`, as they leave it, and that of the last block, normalised
      by the backbone's last norm.
    """
    if self.is_initializing():
      # The parameters do not depend on what becomes of the tokens.
      self.encode(tokens)
    kept = self.Transformer(self._with_prefix(tokens), adaptation, blocks)
    if self.fc_norm:
      after = bind_after(adaptation.hooks, HookArrays(None, adaptation.shared))
      y = self.norm_of_feature(kept[-1])
      last = y if after is None else after("encoder_norm", kept[-1], y)
      kept = (*kept[:-1], last)
    grid = round(tokens.shape[1] ** 0.5)
    shape = (tokens.shape[0], grid, grid, self.width)
    return tuple(x[:, self.num_prefix :].reshape(shape) for x in kept)

  def _with_prefix(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    """Returns what the first block gets: [b, num_prefix + n, d]."""
    prefix = [self.cls] if self.has_cls else []
    if self.registers:
      prefix.append(self.register_tokens)
    if prefix:
      prefix = [
        jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], *token.shape[1:]))
        for token in prefix
      ]
      x = jnp.concatenate([*prefix, x], axis=1)
    return self.norm_before(x) if self.pre_norm else x

  def _pool(self, x: Float[Array, "b m d"]) -> Float[Array, "b d"]:
    if self.pool == "tok":
      return x[:, 0]
    x = x[:, self.num_prefix :] if self.pool == "gap" else x
    return jnp.mean(x, axis=1) if self.pool == "gap" else self.MAPHead_0(x)
