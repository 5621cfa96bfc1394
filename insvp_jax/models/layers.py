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
      k = join(k, key(context))
      v = join(v, value(context))
    attended = attend(q, k, v)
    return nn.DenseGeneral(
      width,
      axis=(-2, -1),
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="out",
    )(attended)


def attend(
  q: Float[Array, "b q h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"]
) -> Float[Array, "b q h e"]:
  """Softmax attention, with the softmax in float32.

  Heads stand before tokens while it computes: on CPUs the gradient takes two thirds
  of the time of `jax.nn.dot_product_attention` (benchmarks/attention.py).
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  scores = jnp.einsum("bhqe,bhne->bhqn", q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum("bhqn,bhne->bhqe", weights, v), 1, 2)


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
