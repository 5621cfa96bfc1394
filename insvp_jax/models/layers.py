"""The layers of the Vision Transformer, with big_vision's parameter names."""

from collections.abc import Callable
import functools
import math
from typing import Any

import einops
import flax.linen as nn
import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.models.quantized import Dense, DenseGeneral, matmul, promote_dtype

LAYER_NORM_EPS = 1e-6
MLPS = ("gelu", "swiglu")
# `(name, input, output) -> output`: `Hooks.after` with its arrays; None where no method
# changes an operation.
After = Callable[[str, Array, Array], Array] | None


def activation(
  function: Callable[[Array], Array],
  derivative: Callable[[Array], Array],
  fast: Callable[[Array], Array] | None = None,
) -> Callable[[Array], Array]:
  """Returns an elementwise function whose gradient needs its input alone, in 16 bits.

  JAX would keep another array of that size, the largest of a block. A GPU computes the
  derivative in less time than it takes to write and read that. In 32 bits XLA finds
  what function and derivative have in common, and keeps it anyway.

  Args:
    function: of numbers of any floating-point type.
    derivative: of the function, on float32.
    fast: the function in another form, which 16 bits are computed by, on float32;
      None: the same.
  """

  @jax.custom_vjp
  def in_16_bits(x: Array) -> Array:
    return (fast or function)(x.astype(jnp.float32)).astype(x.dtype)

  def backward(x: Array, gradient: Array) -> tuple[Array]:
    return ((gradient * derivative(x.astype(jnp.float32))).astype(x.dtype),)

  in_16_bits.defvjp(lambda x: (in_16_bits(x), x), backward)
  return lambda x: (in_16_bits if x.dtype.itemsize == 2 else function)(x)


# Twice what the tanh of a GELU multiplies x by: 0.5 (1 + tanh(y)) = sigmoid(2 y), and
# GPUs compute a tanh more slowly.
_TANH_SLOPE = 2 * math.sqrt(2 / math.pi)


def _tanh_share(x: Array) -> Array:
  return jax.nn.sigmoid(_TANH_SLOPE * x * (1 + 0.044715 * x**2))


def _tanh_derivative(x: Array) -> Array:
  share = _tanh_share(x)
  slope = _TANH_SLOPE * (1 + 3 * 0.044715 * x**2)
  return share * (1 + x * (1 - share) * slope)


def _exact_derivative(x: Array) -> Array:
  density = jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
  return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2))) + x * density


def _quick_derivative(x: Array) -> Array:
  share = jax.nn.sigmoid(1.702 * x)
  return share * (1 + 1.702 * x * (1 - share))


GELUS = {
  "tanh": activation(nn.gelu, _tanh_derivative, lambda x: x * _tanh_share(x)),
  "exact": activation(functools.partial(nn.gelu, approximate=False), _exact_derivative),
  # CLIP's: x sigmoid(1.702 x).
  "quick": activation(lambda x: x * jax.nn.sigmoid(1.702 * x), _quick_derivative),
}


def image_by_image(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
  """Keeps the tokens of an image together in memory, where a single GPU trains.

  XLA would lay the tokens of all blocks out as the head's gradient reads the feature,
  with the batch innermost, and transpose them before and after each product.
  """
  # Of several devices each would get the whole batch first, up to jax 0.10.
  if jax.default_backend() != "gpu" or jax.device_count() > 1:
    return x
  return _held(x)


def _row_major(x: Array) -> Array:
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


@jax.custom_vjp
def _held(x: Array) -> Array:
  # Without a gradient there is nothing to hold, and programs for other machines cannot
  # be exported with a layout in them.
  return x


_held.defvjp(
  lambda x: (_row_major(x), None), lambda _, gradient: (_row_major(gradient),)
)


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
    """Returns one token per whole patch, row by row."""
    size = self.patch_size
    height, width = (length - length % size for length in images.shape[1:3])
    images = images[:, :height, :width]
    shape = (size, size, images.shape[-1], self.width)
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    # [b, n, p * p * c] @ [p * p * c, d]
    patches = einops.rearrange(
      images, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size
    )
    patches, kernel, bias = promote_dtype(
      patches, kernel.reshape(-1, self.width), bias, dtype=self.dtype
    )
    return matmul(patches, kernel) + bias


class Attention(nn.Module):
  """Multi-head attention whose keys and values may include prompts.

  Prompts given here are keys and values only. The outputs are those of a sequence with
  the prompts in it, without the prompts' own. Prompts that all images share are
  projected once, not once per image; but fused attention gets few prompts by
  `even_rows`, since GPUs take longer to join keys and values than to project them.

  Attributes:
    num_heads: number of heads; divides the width.
    dtype: of the computation.
    fused: attend by `attend_fused` instead of `attend`.
  """

  num_heads: int
  dtype: Any
  fused: bool = False

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, "b q d"],
    inputs_kv: Float[Array, "b n d"],
    prompts: Float[Array, "b_or_1 p d"] | None = None,
    after: After = None,
    change_qkv: Callable[[Array, Array, Array], tuple[Array, Array, Array]]
    | None = None,
  ) -> Float[Array, "b q d"]:
    """Returns one output per query.

    Args:
      inputs_q: tokens that attend.
      inputs_kv: tokens that are attended to.
      prompts: tokens that are attended to as well.
      after: called on each projection, flat: [b, n, d].
      change_qkv: called on queries, keys and values, [b, n, h, e].
    """
    width = inputs_q.shape[-1]

    def projection(name: str) -> Callable[[Array], Array]:
      # From [b, n, d] to [b, n, num_heads, d / num_heads].
      dense = DenseGeneral(
        (self.num_heads, width // self.num_heads),
        kernel_init=nn.initializers.xavier_uniform(),
        dtype=self.dtype,
        name=name,
      )

      def project(x: Array) -> Array:
        y = dense(x)
        if after is None:
          return y
        return after(name, x, y.reshape(x.shape)).reshape(y.shape)

      return project

    query, key, value = projection("query"), projection("key"), projection("value")
    num_queries, num_keys = inputs_q.shape[1], None
    inputs_k = inputs_v = inputs_kv
    is_plain = after is None and change_qkv is None
    if self.fused and is_plain and _are_few(prompts, inputs_kv):
      rows, num_keys = even_rows(inputs_kv, prompts)
      # The outputs of prompts and padding are dropped at the end: GPUs take longer to
      # copy the other queries than to compute these.
      queries = rows if inputs_q is inputs_kv else inputs_q
      # XLA would make one product of all three, and add their biases afterwards.
      inputs_q, inputs_k, inputs_v = jax.lax.optimization_barrier((queries, rows, rows))
      prompts = None
    # Not "> 1": a program for any number of images does not know how many there are.
    elif prompts is not None and prompts.shape[0] != 1 and after is None:
      # Once as inputs, in place of keys and values apart.
      inputs_k = inputs_v = join(inputs_kv, prompts)
      prompts = None
    q, k, v = query(inputs_q), key(inputs_k), value(inputs_v)
    if prompts is not None:
      # From n to n + p keys and values.
      k = join(k, key(prompts))
      v = join(v, value(prompts))
    if change_qkv is not None:
      q, k, v = change_qkv(q, k, v)
    y = attend_fused(q, k, v, num_keys) if self.fused else attend(q, k, v)
    out = DenseGeneral(
      width,
      axis=(-2, -1),
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="out",
    )(y)
    if after is not None:
      return after("out", y.reshape(out.shape), out)
    return out[:, :num_queries]


def attend(
  q: Float[Array, "b q h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"]
) -> Float[Array, "b q h e"]:
  """Softmax attention of h heads of width e, with the softmax in float32.

  Heads stand before tokens while it computes: on CPUs the gradient takes two thirds
  of the time of `jax.nn.dot_product_attention` (benchmarks/attention.py).
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  # In float32 at least.
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("bhqe,bhne->bhqn", q, k, preferred_element_type=dtype)
  probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum("bhqn,bhne->bhqe", probs, v), 1, 2)


def attend_fused(
  q: Float[Array, "b q h e"],
  k: Float[Array, "b n h e"],
  v: Float[Array, "b n h e"],
  num_keys: int | None = None,
) -> Float[Array, "b q h e"]:
  """Softmax attention by `jax.nn.dot_product_attention`.

  On NVIDIA GPUs and in 16 bits that is cuDNN's flash attention, which never stores the
  logits; elsewhere it is XLA's.

  Args:
    q, k, v: queries, keys and values.
    num_keys: the number of keys that are attended to, the first ones; None: all.

  Raises:
    NotImplementedError: cuDNN does not support the shape; the message has its reason.
  """
  on_cudnn = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
  return attend_padded(q, k, v, "cudnn" if on_cudnn else "xla", num_keys)


def attend_padded(
  q: Float[Array, "b q h e"],
  k: Float[Array, "b n h e"],
  v: Float[Array, "b n h e"],
  implementation: str,
  num_keys: int | None = None,
) -> Float[Array, "b q h e"]:
  """Softmax attention of sequences padded to even lengths; padded keys are masked.

  The class token makes a ViT's sequences odd, and cuDNN has no gradient of those.

  Args:
    q, k, v: queries, keys and values.
    implementation: of `jax.nn.dot_product_attention`.
    num_keys: the number of keys that are attended to, the first ones; None: all.
  """

  def padded(x: Array) -> Array:
    return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)])

  def lengths(number: int) -> Array:
    return jnp.full(q.shape[:1], number, jnp.int32)

  num_queries, num_keys = q.shape[1], num_keys or k.shape[1]
  q, k, v = padded(q), padded(k), padded(v)
  masked = {}
  if num_keys < k.shape[1]:
    # All queries: what is computed of padding is dropped.
    masked["query_seq_lengths"] = lengths(q.shape[1])
    masked["key_value_seq_lengths"] = lengths(num_keys)
  y = jax.nn.dot_product_attention(q, k, v, implementation=implementation, **masked)
  return y[:, :num_queries]


def _are_few(prompts: Array | None, tokens: Array) -> bool:
  """Returns whether prompts cost less as queries than tokens to be copied."""
  return prompts is None or 4 * prompts.shape[1] <= tokens.shape[1]


def even_rows(
  x: Float[Array, "b n d"], prompts: Float[Array, "b_or_1 p d"] | None
) -> tuple[Float[Array, "b m d"], int]:
  """Joins prompts to tokens, and zeros where the number of both is odd.

  Returns:
    the rows, and how many of them are tokens or prompts, the first ones.
  """
  number = x.shape[1] + (0 if prompts is None else prompts.shape[1])
  # Together with what made the tokens; a concatenation of both takes XLA's code for
  # GPUs four times as long as to write them.
  rows = jnp.pad(x, [(0, 0), (0, number + number % 2 - x.shape[1]), (0, 0)])
  if prompts is not None:
    rows = jax.lax.optimization_barrier(rows)
    start = (0, x.shape[1], 0)
    rows = jax.lax.dynamic_update_slice(rows, _as_of_each(x, prompts), start)
  return rows, number


def join(x: Array, prompts: Array) -> Array:
  """Appends prompts to x [b, n, ...] on axis 1; those shared by all are repeated."""
  return jnp.concatenate([x, _as_of_each(x, prompts)], axis=1)


def _as_of_each(x: Array, prompts: Array) -> Array:
  """Returns prompts for each image of x [b, ...], in its type."""
  return jnp.broadcast_to(prompts, (x.shape[0], *prompts.shape[1:])).astype(x.dtype)


class LayerScale(nn.Module):
  """Multiplies each channel of a branch; starts as DINOv2's.

  Source: Touvron et al. 2021, "Going deeper with Image Transformers", eq. 4.
  """

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Returns the scaled outputs of a branch."""
    scale = self.param("scale", nn.initializers.constant(1e-5), (x.shape[-1],))
    return x * scale.astype(self.dtype)


class MlpBlock(nn.Module):
  """Dense, GELU, dense; or, with mlp "swiglu", a gated one.

  The first layer of the gated one gives 2 `mlp_dim` channels: silu of the first half is
  multiplied by the second one.

  Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
  """

  mlp_dim: int
  gelu: str
  dtype: Any
  mlp: str = "gelu"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], after: After = None
  ) -> Float[Array, "b n d"]:
    """Returns the transformed tokens; `after` is called on both layers' outputs."""
    options = {
      "kernel_init": nn.initializers.xavier_uniform(),
      "bias_init": nn.initializers.normal(1e-6),
      "dtype": self.dtype,
    }
    width = x.shape[-1]
    is_gated = self.mlp == "swiglu"
    hidden = Dense((1 + is_gated) * self.mlp_dim, **options)(x)
    if after is not None:
      hidden = after("fc1", x, hidden)
    if is_gated:
      gate, hidden = jnp.split(hidden, 2, axis=-1)
      hidden = jax.nn.silu(gate) * hidden
    else:
      hidden = GELUS[self.gelu](hidden)
    out = Dense(width, **options)(hidden)
    return out if after is None else after("fc2", hidden, out)


class MAPHead(nn.Module):
  """Pools tokens by attention: one trained probe is the query.

  Source: Zhai et al. 2022, "Scaling Vision Transformers", section 3.2.
  """

  mlp_dim: int
  num_heads: int
  gelu: str
  dtype: Any
  norm_eps: float = LAYER_NORM_EPS

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """Returns one feature per image."""
    width = x.shape[-1]
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(self.dtype)
    attention = Attention(
      self.num_heads, self.dtype, name="MultiHeadDotProductAttention_0"
    )
    x = attention(probe, x)
    y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="LayerNorm_0")(x)
    x = x + MlpBlock(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y)
    return x[:, 0]
