"""Convpass: convolutional bypasses beside the attention and the MLP.

Source: Jie and Deng 2022, "Convolutional Bypasses Are Better Vision Transformer
Adapters", section 3.2.

Per branch, with x what the branch computes on, its output gets scale * B(x) more,
B(x) = U g(conv(g(D x))), g the quick GELU, D [d, h], U [h, d] and a 3 x 3 convolution
over the grid of patches, padded with zeros. The class token, and prompts, are images of
1 x 1 of their own. Parameters: l * branches * (2 d h + 9 h^2 + 2 h + d).
"""

from collections.abc import Mapping
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import BRANCHES, Adaptation, Hooks
from insvp_jax.methods.ops.bottleneck import quick_gelu
from insvp_jax.methods.ops.dropout import block_keys, drop_tokens
from insvp_jax.methods.ops.initializers import Initializer
from insvp_jax.methods.ops.stacked import StackedDense, dense


def convolve_tokens(
  layer: Mapping[str, Array],
  x: Float[Array, "b m c"],
  num_prefix: int,
  grid: tuple[int, int],
) -> Float[Array, "b m o"]:
  """Returns the tokens after a 3 x 3 convolution over the grid of patches.

  It is one matrix product over each patch's neighbourhood: with few channels as fast on
  CPUs as XLA's convolution (32 images of 14 x 14 with 8 channels, forward and gradient:
  0.6 ms to 0.8; nine shifted products: 1.9), and 27 times as fast where a population's
  members have a kernel each.

  Args:
    layer: "kernel" [3, 3, c, o] and "bias" [o].
    x: prefix, patches, prompts; or the prefix alone.
    num_prefix: tokens before the patches.
    grid: rows and columns of patches.
  """
  kernel, (rows, columns) = layer["kernel"], grid
  # No neighbours: the kernel's centre.
  alone = x @ kernel[1, 1]
  if x.shape[1] > num_prefix:
    end = num_prefix + rows * columns
    patches = x[:, num_prefix:end].reshape(x.shape[0], rows, columns, -1)
    padded = jnp.pad(patches, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.concatenate(
      [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], -1
    )
    patches = neighbours.reshape(x.shape[0], rows * columns, -1) @ jnp.reshape(
      kernel, (-1, kernel.shape[-1])
    )
    alone = jnp.concatenate([alone[:, :num_prefix], patches, alone[:, end:]], axis=1)
  return alone + layer["bias"]


@dataclasses.dataclass(frozen=True)
class ConvpassHooks(Hooks):
  """Adds the bypasses to the branches.

  What becomes of the prefix depends on no other token, so where the prefix alone is
  read, as in the last block, the patches need not be computed.
  """

  num_prefix: int = 1

  def branch(self, p, name, stream, normed, out):
    del stream
    layers, key = p.block[name], p.block["dropout_key"]
    if key is not None:
      key = jax.random.fold_in(key, self.at.index(name))
    hidden = quick_gelu(dense(layers["down"], normed))
    hidden = quick_gelu(
      convolve_tokens(layers["conv"], hidden, self.num_prefix, p.shared["grid"].shape)
    )
    hidden = drop_tokens(key, p.shared["dropout"], hidden)
    return out + p.shared["scale"] * dense(layers["up"], hidden)


def _centre(key, shape, dtype=jnp.float32):
  """Initialises a 3 x 3 convolution as the identity."""
  del key
  return jnp.zeros(shape, dtype).at[1, 1].set(jnp.eye(shape[-1], dtype=dtype))


_CONV_INITS: dict[str, Initializer] = {
  "identity": _centre,
  "xavier": nn.initializers.xavier_uniform(),
}


class Convpass(Method):
  """Convolutional bottlenecks beside the branches of each block; they start at zero."""

  branches: tuple[str, ...] = field(
    BRANCHES,
    f"what has a bypass: some of {', '.join(BRANCHES)}",
    check=checks.some_of(*BRANCHES),
  )
  hidden: int = field(8, "channels h of the convolution", check=checks.below_width)
  scale: float | int = field(
    1.0, "factor of the bypasses", check=checks.finite_number, hparam=True
  )
  dropout: float | int = field(
    0.1, "rate on the h convolved values", check=checks.rate, hparam=True
  )
  conv_init: str = field(
    "identity",
    f"of the convolution: {', '.join(_CONV_INITS)}",
    check=checks.one_of(*_CONV_INITS),
  )

  @nn.nowrap
  def hooks(self) -> Hooks:
    return ConvpassHooks(at=self.branches, num_prefix=self.spec.num_prefix)

  def setup(self) -> None:
    """Creates the layers of all blocks."""
    depth, width, hidden = self.spec.depth, self.spec.width, self.hidden
    xavier, conv = nn.initializers.xavier_uniform(), _CONV_INITS[self.conv_init]
    for branch in self.branches:
      layers = {
        "down": StackedDense(depth, (width, hidden), xavier),
        "conv": StackedDense(depth, (3, 3, hidden, hidden), conv),
        "up": StackedDense(depth, (hidden, width), nn.initializers.zeros),
      }
      setattr(self, branch, layers)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, embed
    rate = self.hparam("dropout")
    blocks = {
      branch: {name: layer() for name, layer in getattr(self, branch).items()}
      for branch in self.branches
    }
    blocks["dropout_key"] = block_keys(self, self.spec.depth, rate, train)
    # An array whose shape is the grid: another method may change the images' size.
    grid = jnp.zeros([length // self.spec.patch_size for length in prompted.shape[1:3]])
    return Adaptation(
      blocks=blocks,
      shared={"scale": self.hparam("scale"), "dropout": rate, "grid": grid},
    )
