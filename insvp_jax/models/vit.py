"""The Vision Transformer, with big_vision's variants and parameter names.

One backbone serves every method: it takes prompt tokens as an array
(`methods.base.BlockPrompts`) and knows nothing of where they come from.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 1-4;
variants and names as in google-research/big_vision.
"""

from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax import trees
from insvp_jax.methods.base import BackboneSpec, BlockPrompts

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
GELUS = ("tanh", "exact")
LAYER_NORM_EPS = 1e-6


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


class PatchEmbedding(nn.Module):
  """Cuts images into patches and projects each: a strided convolution.

  Written as one matrix product, which every backend runs at full speed in both
  directions; the kernel keeps the convolution's layout [h, w, c, d].
  """

  width: int
  patch_size: int
  dtype: Any

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Returns one token per patch, row by row."""
    size = self.patch_size
    shape = (size, size, images.shape[-1], self.width)
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    patches = einops.rearrange(
      images, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size
    )
    kernel = kernel.reshape(-1, self.width).astype(self.dtype)
    return patches.astype(self.dtype) @ kernel + bias.astype(self.dtype)


class Attention(nn.Module):
  """Multi-head attention of queries over themselves, or over `keys`.

  `context` tokens are keys and values only. A prompt whose output nobody reads
  enters this way: the result is that of the full sequence without computing
  the prompt's query, and a prompt shared by all instances is projected once.
  """

  num_heads: int
  dtype: Any

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, "b q d"],
    keys: Float[Array, "b n d"] | None = None,
    context: Float[Array, "c p d"] | None = None,
  ) -> Float[Array, "b q d"]:
    """Returns the attended queries; c is b, or 1 for a shared context."""
    width = queries.shape[-1]

    def project(name: str) -> nn.DenseGeneral:
      return nn.DenseGeneral(
        (self.num_heads, width // self.num_heads),
        kernel_init=nn.initializers.xavier_uniform(),
        dtype=self.dtype,
        name=name,
      )

    query, key, value = project("query"), project("key"), project("value")
    q = query(queries)
    source = queries if keys is None else keys
    k, v = key(source), value(source)
    if context is not None:
      k = _join(k, key(context))
      v = _join(v, value(context))
    attended = _attend(q, k, v)
    return nn.DenseGeneral(
      width,
      axis=(-2, -1),
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="out",
    )(attended)


def _attend(
  q: Float[Array, "b q h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"]
) -> Float[Array, "b q h e"]:
  """Softmax attention, with the softmax in float32.

  Heads stand before tokens while it computes: on CPUs the gradient takes 0.6 of the
  time of `jax.nn.dot_product_attention` (benchmarks/attention.py).
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  scores = jnp.einsum("bhqe,bhne->bhqn", q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum("bhqn,bhne->bhqe", weights, v), 1, 2)


def _join(x: Array, extra: Array) -> Array:
  """Appends `extra` to `x` on axis 1; a leading axis of 1 is repeated."""
  extra = jnp.broadcast_to(extra, (x.shape[0], *extra.shape[1:]))
  return jnp.concatenate([x, extra.astype(x.dtype)], axis=1)


class MlpBlock(nn.Module):
  """Dense, GELU, dense."""

  mlp_dim: int
  gelu: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Returns the transformed tokens."""
    inits = {
      "kernel_init": nn.initializers.xavier_uniform(),
      "bias_init": nn.initializers.normal(1e-6),
      "dtype": self.dtype,
    }
    hidden = nn.Dense(self.mlp_dim, **inits)(x)
    hidden = nn.gelu(hidden, approximate=self.gelu == "tanh")
    return nn.Dense(x.shape[-1], **inits)(hidden)


class Block(nn.Module):
  """One pre-norm encoder block over patch tokens and prompt tokens."""

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    prompts: Float[Array, "c p d"] | None,
    keep: bool,
  ) -> tuple[Float[Array, "b n d"], Float[Array, "c2 p d"] | None]:
    """Applies the block.

    Attention does not depend on the order of its keys, so prompts stand after
    the tokens here, wherever a paper writes them.

    Args:
      x: tokens whose outputs are needed.
      prompts: prompt tokens, c = b, or 1 when all instances share them.
      keep: whether a later block reads the prompts' outputs.

    Returns:
      (tokens, prompts): the prompts' outputs if `keep`, else prompts unchanged.
    """
    num_tokens = x.shape[1]
    if keep and prompts is not None:
      x, context = _join(x, prompts), None
    else:
      context = prompts
    norm = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_0")
    attention = Attention(
      self.num_heads, self.dtype, name="MultiHeadDotProductAttention_0"
    )
    x = x + attention(norm(x), context=None if context is None else norm(context))
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


class Encoder(nn.Module):
  """The stack of blocks and the final norm."""

  depth: int
  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  remat: bool
  scan: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], prompts: BlockPrompts | None
  ) -> Float[Array, "b n d"]:
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

  def _fields(self) -> dict[str, Any]:
    return {
      "mlp_dim": self.mlp_dim,
      "num_heads": self.num_heads,
      "gelu": self.gelu,
      "dtype": self.dtype,
    }

  def _unrolled(self, x, tokens):
    block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
    num_prompted = 0 if tokens is None else tokens.shape[0]
    prompts = None
    for i in range(self.depth):
      if i < num_prompted:
        prompts = tokens[i]
      # Outputs of prompts that are replaced next, or stand last, are not read.
      keep = prompts is not None and num_prompted <= i + 1 < self.depth
      x, prompts = block(**self._fields(), name=f"encoderblock_{i}")(x, prompts, keep)
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
    body = nn.remat(_ScannedBlock, prevent_cse=False) if self.remat else _ScannedBlock
    blocks = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )(self._fields(), keep, name="encoderblock")
    (x, _), _ = blocks((x, carried), (tokens, jnp.arange(self.depth) < num_prompted))
    return x


class MAPHead(nn.Module):
  """Pools tokens by attention from one trained probe.

  Source: Zhai et al. 2022, "Scaling Vision Transformers", section 3.2.
  """

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """Returns one feature per image."""
    width = x.shape[-1]
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(self.dtype)
    x = Attention(self.num_heads, self.dtype, name="MultiHeadDotProductAttention_0")(
      probe, keys=x
    )
    y = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_0")(x)
    x = x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y)
    return x[:, 0]


class ViT(nn.Module):
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
    gelu: "tanh" (JAX releases) or "exact" (PyTorch releases).
    dtype: "float32" or "bfloat16", of the computation; parameters keep theirs.
    remat: recompute each block in the backward pass; saves memory, costs time.
    scan: one compiled block for all, parameters stacked on a leading axis;
      saves compile time. The names become `Transformer/encoderblock/...`.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: int
  image_size: int
  pool: str = "tok"
  gelu: str = "tanh"
  dtype: str = "float32"
  remat: bool = False
  scan: bool = False

  def setup(self) -> None:
    """Checks the sizes and creates the sub-modules."""
    self._check()
    dtype = jnp.dtype(self.dtype)
    num_patches = (self.image_size // self.patch_size) ** 2
    self.embedding = PatchEmbedding(self.width, self.patch_size, dtype)
    self.pos_embedding = self.param(
      "pos_embedding",
      nn.initializers.normal(1 / self.width**0.5),
      (1, num_patches, self.width),
    )
    if self.pool == "tok":
      self.cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
    block = {
      "mlp_dim": self.mlp_dim,
      "num_heads": self.num_heads,
      "gelu": self.gelu,
      "dtype": dtype,
    }
    self.Transformer = Encoder(
      depth=self.depth, remat=self.remat, scan=self.scan, **block
    )
    if self.pool == "map":
      self.MAPHead_0 = MAPHead(**block)

  def _check(self) -> None:
    for field, known in (("pool", POOLS), ("gelu", GELUS)):
      if getattr(self, field) not in known:
        raise ValueError(
          f"{field} is {getattr(self, field)!r}, expected one of {known}."
        )
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'.")
    if self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not divisible by num_heads {self.num_heads}."
      )
    if self.image_size % self.patch_size:
      raise ValueError(
        f"image_size {self.image_size} is not a multiple of patch_size "
        f"{self.patch_size}."
      )

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a method is built from."""
    return BackboneSpec(
      width=self.width,
      depth=self.depth,
      mlp_dim=self.mlp_dim,
      num_heads=self.num_heads,
      patch_size=self.patch_size,
      image_size=self.image_size,
    )

  def embed(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Returns patch tokens with their position embedding.

    Raises:
      ValueError: the images are not `image_size` pixels high and wide.
    """
    if images.shape[1:3] != (self.image_size, self.image_size):
      raise ValueError(
        f"images are {images.shape[1]} x {images.shape[2]} pixels, but the backbone "
        f"was built for {self.image_size} x {self.image_size}; resize the images or "
        f"build it with image_size={images.shape[1]}."
      )
    x = self.embedding(images)
    return x + self.pos_embedding.astype(x.dtype)

  def encode(
    self, tokens: Float[Array, "b n d"], prompts: BlockPrompts | None = None
  ) -> Float[Array, "b d"]:
    """Returns the pooled feature of patch tokens under prompts."""
    x = tokens
    if self.pool == "tok":
      cls = jnp.broadcast_to(self.cls, (x.shape[0], 1, self.width))
      x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
    x = self.Transformer(x, prompts)
    if self.pool == "tok":
      return x[:, 0]
    return jnp.mean(x, axis=1) if self.pool == "gap" else self.MAPHead_0(x)

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Returns the feature [b, d] of images, without any prompt."""
    return self.encode(self.embed(images))
