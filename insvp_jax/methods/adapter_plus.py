"""Adapter+: a bottleneck after each block, with a learned scale for every channel.

Source: Steitz and Roth 2024, "Adapters Strike Back", section 3 (position "post",
channel-wise scaling, Houlsby's initialisation, stochastic depth on the adapter).

Per block, with z its output: z += scale * (U gelu(D z + b_D) + b_U), D [d, h],
U [h, d], scale [d]. Parameters: l * (2 d h + h + 2 d).
"""

import dataclasses

import flax.linen as nn

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.bottleneck import bottleneck
from insvp_jax.methods.ops.dropout import block_keys, drop_path
from insvp_jax.methods.ops.stacked import StackedDense


@dataclasses.dataclass(frozen=True)
class AdapterPlusHooks(Hooks):
  """Adds the bottleneck of a block's output to it, prompts in the sequence included."""

  def leave(self, p, x, prompts, before):
    del before

    def adapted(x):
      # An image loses or keeps the adapter as a whole: the same for all its tokens.
      change = drop_path(
        p.block["drop_path_key"], p.shared["drop_path"], bottleneck(p.block, "gelu", x)
      )
      return x + p.block["scale"] * change

    return adapted(x), None if prompts is None else adapted(prompts), None


class AdapterPlus(Method):
  """A bottleneck on the output of each block."""

  hidden: int = field(8, "hidden units h", check=checks.below_width)
  drop_path: float | int = field(
    0.1,
    "rate at which an image loses a block's adapter",
    check=checks.rate,
    hparam=True,
  )

  @nn.nowrap
  def hooks(self) -> Hooks:
    return AdapterPlusHooks()

  def setup(self) -> None:
    """Creates the layers and scales of all blocks."""
    depth, width = self.spec.depth, self.spec.width
    # Of its own two standard deviations, as published.
    init = nn.initializers.truncated_normal(0.01)
    self.down = StackedDense(depth, (width, self.hidden), init)
    self.up = StackedDense(depth, (self.hidden, width), init)
    self.scale = self.param("scale", nn.initializers.ones, (depth, width))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed
    rate = self.hparam("drop_path")
    keys = block_keys(self, self.spec.depth, rate, train)
    return Adaptation(
      blocks={
        "down": self.down(),
        "up": self.up(),
        "scale": self.scale,
        "drop_path_key": keys,
      },
      shared={"drop_path": rate},
    )
