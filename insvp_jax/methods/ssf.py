"""SSF: a scale and a shift of the output of every operation.

Source: Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for
Efficient Model Tuning", eq. 3 and 4; both can be merged (eq. 5).

Every y = op(x) becomes y * scale + shift: of the patch embedding, of each block's norms
and dense layers, and of the last norm. Parameters, with m the width of the MLP:
2 l (7 d + m) + 4 d, twice the outputs of all operations.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from insvp_jax.methods.base import Method
from insvp_jax.methods.hooks import OPERATIONS, Adaptation, Hooks
from insvp_jax.methods.ops.initializers import Initializer

# The operations outside of blocks.
_OUTSIDE = ("embedding", "encoder_norm")


@dataclasses.dataclass(frozen=True)
class SSFHooks(Hooks):
  """Scales and shifts the outputs."""

  def after(self, p, name, x, y):
    del x
    site = (p.shared if p.block is None else p.block)[name]
    return y * site["scale"] + site["shift"]


def _normal(mean: float) -> Initializer:
  def init(key, shape, dtype=float):
    return mean + 0.02 * jax.random.normal(key, shape, dtype)

  return init


class ScaleShift(nn.Module):
  """The scale and the shift of one operation.

  Attributes:
    shape: [d], or [l, d] for all blocks.
  """

  shape: Sequence[int]

  @nn.compact
  def __call__(self) -> dict[str, Float[Array, "..."]]:
    """Returns {"scale", "shift"}."""
    return {
      name: self.param(name, _normal(mean), tuple(self.shape))
      for name, mean in (("scale", 1.0), ("shift", 0.0))
    }


class SSF(Method):
  """Scales and shifts after every operation, near the identity at the start."""

  @nn.nowrap
  def hooks(self) -> Hooks:
    return SSFHooks(at=OPERATIONS)

  def setup(self) -> None:
    """Creates the scales and shifts."""
    for name in OPERATIONS:
      width = self.spec.mlp_dim if name == "fc1" else self.spec.width
      blocks = () if name in _OUTSIDE else (self.spec.depth,)
      setattr(self, name, ScaleShift((*blocks, width)))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed, train
    sites = {name: getattr(self, name)() for name in OPERATIONS}
    shared = {name: sites.pop(name) for name in _OUTSIDE}
    return Adaptation(blocks=sites, shared=shared)

  @nn.nowrap
  def merge(self, params: Mapping[str, Any], sites):
    """Returns the operations with their outputs scaled and shifted."""
    merged = {}
    for name, site in sites.items():
      scale, shift = params[name]["scale"], params[name]["shift"]
      merged[name] = {
        # Over the outputs: a kernel's last axis.
        leaf: value * (scale[..., None, :] if leaf == "kernel" else scale)
        for leaf, value in site.items()
      }
      merged[name]["bias"] = merged[name]["bias"] + shift
    return merged
