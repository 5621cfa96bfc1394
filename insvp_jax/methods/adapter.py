"""Adapter: a bottleneck after the MLP of each block.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", figure 2;
one for each block as in Pfeiffer et al. 2021 and in the baseline of Jia et al. 2022,
"Visual Prompt Tuning" (hidden d / 8; "quick_gelu" and 8 hidden units: NOAH).

Per block, with m the output of the MLP, before it joins the stream:
m += U act(D m + b_D) + b_U, D [d, h], U [h, d]. Parameters: l * (2 d h + h + d).
"""

import dataclasses

import flax.linen as nn

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.bottleneck import ACTIVATIONS, bottleneck
from insvp_jax.methods.ops.initializers import Initializer, torch_uniform
from insvp_jax.methods.ops.stacked import StackedDense

INITS = ("houlsby", "lora", "vpt_zero")


@dataclasses.dataclass(frozen=True)
class AdapterHooks(Hooks):
  """Adds the bottleneck of the MLP's output to it."""

  activation: str = "gelu"

  def branch(self, p, name, stream, normed, out):
    del name, stream, normed
    return out + bottleneck(p.block, self.activation, out)


class Adapter(Method):
  """A bottleneck on the output of each block's MLP."""

  reduction: int = field(
    8, "the width d over the hidden units h", check=checks.below_width
  )
  hidden: int | None = field(
    None, "hidden units h; None: d / reduction", check=checks.below_width
  )
  activation: str = field(
    "gelu",
    f"between the layers: {', '.join(ACTIVATIONS)}",
    check=checks.one_of(*ACTIVATIONS),
  )
  adapter_init: str = field(
    "houlsby",
    "houlsby: near the identity; lora: the identity; vpt_zero: as VPT's code, where "
    "all is zero, so that the last bias alone ever trains",
    check=checks.one_of(*INITS),
  )

  @nn.nowrap
  def hooks(self) -> Hooks:
    return AdapterHooks(at=("mlp",), activation=self.activation)

  @nn.nowrap
  def _inits(self) -> tuple[Initializer, Initializer]:
    """Returns the initializers of (D, U); biases start at zero."""
    zeros = nn.initializers.zeros
    # Of its own two standard deviations, as published.
    normal = nn.initializers.truncated_normal(0.01)
    return {
      "houlsby": (normal, normal),
      "lora": (torch_uniform(self.spec.width), zeros),
      "vpt_zero": (zeros, zeros),
    }[self.adapter_init]

  def setup(self) -> None:
    """Creates the layers of all blocks."""
    depth, width = self.spec.depth, self.spec.width
    hidden = self.hidden or width // self.reduction
    down, up = self._inits()
    self.down = StackedDense(depth, (width, hidden), down)
    self.up = StackedDense(depth, (hidden, width), up)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed, train
    return Adaptation(blocks={"down": self.down(), "up": self.up()})
