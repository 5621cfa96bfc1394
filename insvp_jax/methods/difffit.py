"""DiffFit: biases, LayerNorms and a scale on every branch train.

Source: Xie et al. 2023, "DiffFit: Unlocking Transferability of Large Diffusion Models
via Simple Parameter-Efficient Fine-Tuning", section 3.2; on ViTs as in Mai et al. 2025.
Per block: y = x + g1 * MSA(.), z = y + g2 * MLP(.), g [d] from ones. Parameters: those
of bias tuning, (2 l + 1) d scales of norms, 2 l d factors; 140,544 on ViT-B/16.
"""

import dataclasses

import flax.linen as nn

from insvp_jax.methods.base import Method
from insvp_jax.methods.bias import BIASES
from insvp_jax.methods.hooks import BRANCHES, Adaptation, Hooks


@dataclasses.dataclass(frozen=True)
class DiffFitHooks(Hooks):
  """Scales the branches."""

  def branch(self, p, name, stream, normed, out):
    return out * p.block[name]


class DiffFit(Method):
  """Trains biases, norms and a factor for each channel of each branch."""

  @nn.nowrap
  def hooks(self) -> Hooks:
    return DiffFitHooks(at=BRANCHES)

  def setup(self) -> None:
    """Creates the factors [l, d] of both branches."""
    shape = (self.spec.depth, self.spec.width)
    self.scales = {
      name: self.param(f"{name}_scale", nn.initializers.ones, shape)
      for name in BRANCHES
    }

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed, train
    return Adaptation(blocks=dict(self.scales))

  @nn.nowrap
  def merge(self, params, sites):
    """Returns the operations with the factors in the last layer of each branch."""
    merged = dict(sites)
    for name, site in zip(BRANCHES, ("out", "fc2"), strict=True):
      scale = params[f"{name}_scale"]
      merged[site] = {
        "kernel": sites[site]["kernel"] * scale[:, None],
        "bias": sites[site]["bias"] * scale,
      }
    return merged

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of biases, norms, factors and the head."""
    return (BIASES, *self.spec.norm_patterns, "prompter/.*", "head/.*")
