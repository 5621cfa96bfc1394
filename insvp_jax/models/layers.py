"""The layers of the Vision Transformer, with big_vision's parameter names."""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYER_NORM_EPS = 1e-6


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


class HeadProjection(nn.Module):
  """The projection of tokens to each head's queries, keys or values.

  Parameters as those of `nn.DenseGeneral`: kernel [d, h, e] and bias [h, e].
  """

  width: int
  num_heads: int
  dtype: Any

  def setup(self) -> None:
    """Creates the parameters."""
    shape = (self.width, self.num_heads, self.width // self.num_heads)

    def init(key, shape):
      # Fan-in and fan-out are those of the matrix [d, h e].
      flat = nn.initializers.xavier_uniform()(key, (shape[0], shape[1] * shape[2]))
      return flat.reshape(shape)

    self.kernel = self.param("kernel", init, shape)
    self.bias = self.param("bias", nn.initializers.zeros, shape[1:])

  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n h e"]:
    """Returns what each head sees of the tokens."""
    kernel = self.kernel.astype(self.dtype)
    y = x.astype(self.dtype) @ kernel.reshape(self.width, -1)
    return y.reshape(*y.shape[:2], *kernel.shape[1:]) + self.bias.astype(self.dtype)

  def transposed(self, x: Float[Array, "b q h e"]) -> Float[Array, "b q h d"]:
    """Returns, for each head, the direction that its dot product with x reads."""
    return jnp.einsum("bqhe,dhe->bqhd", x, self.kernel.astype(self.dtype))

  def of_each_head(self, x: Float[Array, "b q h d"]) -> Float[Array, "b q h e"]:
    """Returns the projections of tokens that differ from head to head."""
    y = jnp.einsum("bqhd,dhe->bqhe", x, self.kernel.astype(self.dtype))
    return y + self.bias.astype(self.dtype)


class Attention(nn.Module):
  """Multi-head attention of queries over themselves, or over `keys`.

  `context` tokens are keys and values only. A prompt whose output nobody reads
  enters this way: the result is that of the full sequence without computing
  the prompt's query, and a prompt shared by all instances is projected once.

  Attributes:
    num_heads: h.
    dtype: of the computation.
    absorb: attend to the tokens themselves: the query goes through the key's
      projection, backwards, and the tokens' mean through the value's. The result is
      the same; for one query it costs next to nothing, for many too much.
    fused: many queries go through `attend_fused`.
  """

  num_heads: int
  dtype: Any
  absorb: bool = False
  fused: bool = False

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, "b q d"],
    keys: Float[Array, "b n d"] | None = None,
    context: Float[Array, "c p d"] | None = None,
  ) -> Float[Array, "b q d"]:
    """Returns the attended queries; c is b, or 1 for a shared context."""
    width = queries.shape[-1]
    query, key, value = (
      HeadProjection(width, self.num_heads, self.dtype, name=name)
      for name in ("query", "key", "value")
    )
    q = query(queries)
    source = queries if keys is None else keys
    if self.absorb:
      tokens = source if context is None else join(source, context)
      attended = value.of_each_head(attend_tokens(key.transposed(scaled(q)), tokens))
    else:
      k, v = key(source), value(source)
      if context is not None:
        k = join(k, key(context))
        v = join(v, value(context))
      attended = (attend_fused if self.fused else attend)(q, k, v)
    return nn.DenseGeneral(
      width,
      axis=(-2, -1),
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="out",
    )(attended)


def scaled(q: Float[Array, "b q h e"]) -> Float[Array, "b q h e"]:
  """Returns the queries over the root of a head's width."""
  return q * q.shape[-1] ** -0.5


def attend(
  q: Float[Array, "b q h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"]
) -> Float[Array, "b q h e"]:
  """Softmax attention, with the softmax in float32.

  Heads stand before tokens while it computes: on CPUs the gradient takes two thirds
  of the time of `jax.nn.dot_product_attention` (benchmarks/attention.py).
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled(q), k, v))
  scores = _scores("bhqe,bhne->bhqn", q, k)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum("bhqn,bhne->bhqe", weights, v), 1, 2)


def attend_fused(
  q: Float[Array, "b q h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"]
) -> Float[Array, "b q h e"]:
  """Softmax attention as `jax.nn.dot_product_attention` has it.

  On NVIDIA GPUs and in 16 bits that is cuDNN's flash attention, which never stores the
  scores; elsewhere it is XLA's.

  Raises:
    NotImplementedError: cuDNN does not support the shape; the message has its reason.
  """
  if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
    return attend_even(q, k, v, "cudnn")
  return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def attend_even(
  q: Float[Array, "b q h e"],
  k: Float[Array, "b n h e"],
  v: Float[Array, "b n h e"],
  implementation: str,
) -> Float[Array, "b q h e"]:
  """Softmax attention of sequences filled up to even lengths.

  The class token makes a ViT's odd, and cuDNN has no gradient of those. What fills
  them up is masked.
  """

  def filled(x: Array) -> Array:
    return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)])

  def lengths(x: Array) -> Array:
    return jnp.full(x.shape[:1], x.shape[1], jnp.int32)

  attended = jax.nn.dot_product_attention(
    filled(q),
    filled(k),
    filled(v),
    query_seq_lengths=lengths(q),
    key_value_seq_lengths=lengths(k),
    implementation=implementation,
  )
  return attended[:, : q.shape[1]]


def attend_tokens(
  q: Float[Array, "b q h d"], tokens: Float[Array, "b n d"]
) -> Float[Array, "b q h d"]:
  """Softmax attention of each head over the tokens, its keys and its values.

  The queries are scaled already. A key's bias, which is left out, would add the same
  to all scores of a query: the softmax does not see it.
  """
  scores = _scores("bqhd,bnd->bqhn", q, tokens)
  weights = jax.nn.softmax(scores, axis=-1).astype(tokens.dtype)
  return jnp.einsum("bqhn,bnd->bqhd", weights, tokens)


def _scores(pattern: str, queries: Array, keys: Array) -> Array:
  """Returns dot products in float32 at least, for the softmax."""
  dtype = jnp.promote_types(queries.dtype, jnp.float32)
  return jnp.einsum(pattern, queries, keys, preferred_element_type=dtype)


def join(x: Array, extra: Array) -> Array:
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


class MAPHead(nn.Module):
  """Pools tokens by attention from one trained probe.

  Source: Zhai et al. 2022, "Scaling Vision Transformers", section 3.2.
  """

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  absorb: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """Returns one feature per image."""
    width = x.shape[-1]
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(self.dtype)
    attention = Attention(
      self.num_heads, self.dtype, self.absorb, name="MultiHeadDotProductAttention_0"
    )
    x = attention(probe, keys=x)
    y = nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name="LayerNorm_0")(x)
    x = x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y)
    return x[:, 0]
