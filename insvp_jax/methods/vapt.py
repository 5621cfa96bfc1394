"""VAPT: prompts that each block makes from the patch tokens that enter it.

Source: "VAPT", ICLR 2026, published code (github.com/Minhchuyentoancbn/VAPT).

The first k blocks have prompts as VPT-Deep. In a later one, with u its patch tokens
after a norm of its own (eps 1e-5) on their grid: one K x K kernel convolves every
channel (no padding), dropout takes whole channels, a dense layer over the positions
makes p vectors v of them, and prompts = v + U relu(D v), with D [d, r] and U [r, d]
shared by the blocks. Dropout once more, on all prompts.

Convolution and dense layer are both linear over positions, and alike for all channels.
So the first is applied to the weights of the second: of each image there is one product
left, over patches.

At the start the dense layers are zero, and so are the prompts of these blocks. In the
first step they alone have a gradient, and it is large: the backbone's norm scales a
token of zeros by eps^-1/2 = 1000. Norms, convolutions, D and U follow in the second.

Parameters, for g x g patches: k p d + (l - k) (2 d + K^2 + p (g - K + 1)^2 + p)
+ 2 d r.
"""

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.dropout import block_keys, drop
from insvp_jax.methods.ops.initializers import (
  torch_uniform,
  vpt_uniform,
)
from insvp_jax.methods.ops.stacked import StackedDense

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class VAPTHooks(Hooks):
  """Makes a block's prompts as it is entered.

  Attributes:
    first, stop: which tokens are patches.
  """

  makes_prompts: bool = True
  first: int = 1
  stop: int = 197

  def enter(self, p, x, prompts):
    del prompts
    block, key, rate = p.block, p.block["key"], p.shared["dropout"]
    channel_key, prompt_key = (None, None) if key is None else jax.random.split(key)
    patches = x[:, self.first : self.stop]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    patches = jax.nn.standardize(patches.astype(dtype), axis=-1, epsilon=NORM_EPS)
    patches = patches.astype(x.dtype) * block["scale"] + block["bias"]
    made = jnp.einsum("bnd,np->bpd", patches, block["mixing"])
    made *= drop(channel_key, rate, jnp.ones_like(made[:, :1]))
    made += block["offset"][:, None]
    hidden = jax.nn.relu(made @ p.shared["down"])
    made += hidden @ p.shared["up"]
    made = jnp.where(block["is_static"], block["static"], made)
    return x, drop(prompt_key, rate, made)


def convolved_weights(
  kernel: Float[Array, "l k k"], weights: Float[Array, "l i i p"]
) -> Float[Array, "l g g p"]:
  """Returns the weights over positions that a convolution and a dense layer make.

  Args:
    kernel: of the convolution, a cross-correlation without padding.
    weights: of the layer over its i x i outputs; g = i + k - 1.
  """
  size = kernel.shape[1]
  total = 0.0
  for row, column in itertools.product(range(size), repeat=2):
    pads = [(0, 0), *((at, size - 1 - at) for at in (row, column)), (0, 0)]
    total += kernel[:, row, column, None, None, None] * jnp.pad(weights, pads)
  return total


class VAPT(Method):
  """Prompts of the first blocks are learned, those of later blocks made."""

  prompt_length: int = field(10, "prompt tokens p per block", check=checks.positive_int)
  static_blocks: int = field(
    1, "the first blocks, whose prompts are learned as such", check=checks.block_count
  )
  kernel: int = field(
    2, "side of the convolution's kernel, in patches", check=checks.positive_int
  )
  hidden: int = field(8, "hidden width r of the projector", check=checks.below_width)
  dropout: float | int = field(
    0.1, "rate on channels of patches, and on prompts", check=checks.rate, hparam=True
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    if resolved["static_blocks"] == spec.depth:
      raise ValueError(
        f"static_blocks is {spec.depth}, all of the backbone's blocks; expected fewer, "
        "so that one makes prompts. With none that does this is vpt_deep."
      )
    if resolved["kernel"] > spec.grid:
      raise ValueError(
        f"kernel is {resolved['kernel']}, but an image has {spec.grid} x {spec.grid} "
        f"patches; expected an integer from 1 to {spec.grid}."
      )
    return resolved

  @nn.nowrap
  def hooks(self) -> Hooks:
    first = self.spec.num_prefix
    return VAPTHooks(first=first, stop=first + self.spec.num_patches)

  def setup(self) -> None:
    """Creates the prompts of the first blocks and the makers of the others."""
    spec, size, length = self.spec, self.kernel, self.prompt_length
    made, side = spec.depth - self.static_blocks, spec.grid - self.kernel + 1
    init = vpt_uniform(spec.patch_size, spec.width)
    shape = (self.static_blocks, length, spec.width)
    self.common_prompt = self.param("common_prompt", init, shape)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    self.norm_scale = self.param("norm_scale", ones, (made, spec.width))
    self.norm_bias = self.param("norm_bias", zeros, (made, spec.width))
    shape = (made, size, size)
    self.conv_kernel = self.param("conv_kernel", nn.initializers.normal(1.0), shape)
    self.positions = StackedDense(made, (side**2, length), zeros)
    down, up = (spec.width, self.hidden), (self.hidden, spec.width)
    self.projector_down = self.param("projector_down", torch_uniform(down[0]), down)
    self.projector_up = self.param("projector_up", torch_uniform(up[0]), up)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed
    depth, rate = self.spec.depth, self.hparam("dropout")
    made = depth - self.static_blocks

    def of_made(leaf: Array) -> Array:
      # All blocks have the same arrays: those that they do not use are zero.
      return jnp.pad(leaf, [(self.static_blocks, 0), *[(0, 0)] * (leaf.ndim - 1)])

    dense, side = self.positions(), self.spec.grid - self.kernel + 1
    weights = dense["kernel"].reshape(made, side, side, self.prompt_length)
    mixing = convolved_weights(self.conv_kernel, weights)
    blocks = {
      "static": jnp.pad(self.common_prompt, [(0, made), (0, 0), (0, 0)]),
      "is_static": jnp.arange(depth) < self.static_blocks,
      "scale": of_made(self.norm_scale),
      "bias": of_made(self.norm_bias),
      "mixing": of_made(mixing.reshape(made, -1, self.prompt_length)),
      "offset": of_made(dense["bias"]),
      "key": block_keys(self, depth, rate, train),
    }
    shared = {"down": self.projector_down, "up": self.projector_up, "dropout": rate}
    return Adaptation(blocks=blocks, shared=shared)
