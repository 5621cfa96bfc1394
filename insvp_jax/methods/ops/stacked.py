"""Parameters of all blocks in one leaf, with the blocks as first axis."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.ops.initializers import Initializer


def per_block(init: Initializer) -> Initializer:
  """Returns the initializer that draws each block's leaf on its own.

  Most initializers read their scale off the shape, in which the axis of blocks would
  count as one more dimension of the kernel.
  """

  def stacked(key, shape, dtype=jnp.float32):
    keys = jax.random.split(key, shape[0])
    return jnp.stack([init(k, shape[1:], dtype) for k in keys])

  return stacked


class StackedDense(nn.Module):
  """A dense layer for each of l blocks; gives its parameters, `dense` applies them.

  Attributes:
    num_blocks: l.
    shape: (in, out); of a convolution (height, width, in, out).
    kernel_init: of one block's kernel.
    bias_init: of one block's bias; None for a layer without.
  """

  num_blocks: int
  shape: Sequence[int]
  kernel_init: Initializer
  bias_init: Initializer | None = nn.initializers.zeros

  @nn.compact
  def __call__(self) -> dict[str, Float[Array, "l ..."]]:
    """Returns {"kernel": [l, *shape], "bias": [l, out]}."""
    shape = (self.num_blocks, *self.shape)
    params = {"kernel": self.param("kernel", per_block(self.kernel_init), shape)}
    if self.bias_init is not None:
      shape = (self.num_blocks, self.shape[-1])
      params["bias"] = self.param("bias", per_block(self.bias_init), shape)
    return params


def dense(params: Mapping[str, Array], x: Array) -> Array:
  """Returns x @ kernel + bias, without a bias where there is none."""
  y = x @ params["kernel"]
  return y + params["bias"] if "bias" in params else y
