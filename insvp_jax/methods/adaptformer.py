"""AdaptFormer: a bottleneck beside the MLP of each block.

Source: Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual
Recognition", eq. 2 and 3. As in its code, the bottleneck reads the stream before its
norm and has no norm of its own. The BatchNorm before its head is left out.

Per block, with y the stream after the attention, y + MLP(LN(y)) becomes
y + MLP(LN(y)) + scale * (U relu(D y + b_D) + b_U), D [d, h], U [h, d].
Parameters: l * (2 d h + h + d).
"""

import dataclasses

import flax.linen as nn

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.bottleneck import bottleneck
from insvp_jax.methods.ops.dropout import block_keys
from insvp_jax.methods.ops.initializers import torch_uniform
from insvp_jax.methods.ops.stacked import StackedDense


@dataclasses.dataclass(frozen=True)
class AdaptFormerHooks(Hooks):
  """Adds the bottleneck of the stream to the MLP's output."""

  def branch(self, p, name, stream, normed, out):
    del name, normed
    key, rate = p.block["dropout_key"], p.shared["dropout"]
    return out + p.shared["scale"] * bottleneck(p.block, "relu", stream, key, rate)


class AdaptFormer(Method):
  """A bottleneck parallel to each block's MLP; it starts at zero."""

  hidden: int | None = field(
    lambda spec: min(64, spec.width),
    "hidden units h; None: 64, or d where that is less",
    check=checks.below_width,
  )
  scale: float | int = field(
    0.1, "factor of the bottleneck", check=checks.finite_number, hparam=True
  )
  dropout: float | int = field(
    0.1, "rate on the h hidden values", check=checks.rate, hparam=True
  )

  @nn.nowrap
  def hooks(self) -> Hooks:
    return AdaptFormerHooks(at=("mlp",))

  def setup(self) -> None:
    """Creates the layers of all blocks."""
    depth, width = self.spec.depth, self.spec.width
    self.down = StackedDense(depth, (width, self.hidden), torch_uniform(width))
    self.up = StackedDense(depth, (self.hidden, width), nn.initializers.zeros)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed
    rate = self.hparam("dropout")
    keys = block_keys(self, self.spec.depth, rate, train)
    return Adaptation(
      blocks={"down": self.down(), "up": self.up(), "dropout_key": keys},
      shared={"scale": self.hparam("scale"), "dropout": rate},
    )
