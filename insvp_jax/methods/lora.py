"""LoRA: low-rank updates beside the projections of the attention.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3; on
ViTs as in NOAH (Zhang et al. 2022: one down projection for query, key and value, rank
8, no scale) and PETL-ViT (query and value apart, with a scale).

Per block, with a the block's normalised input: target += scale * (a D) U, D [d, r] and
U [r, d]. Parameters: l * targets * 2 d r, of the fused form l * 4 d r.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.dropout import block_keys, drop_tokens
from insvp_jax.methods.ops.initializers import torch_uniform
from insvp_jax.methods.ops.stacked import StackedDense, dense

TARGETS = ("query", "key", "value", "out", "fc1", "fc2")
# The targets of the fused form, in the order of its up projection's outputs.
_FUSED = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class LoRAHooks(Hooks):
  """Adds the updates after the targets."""

  fused: bool = False

  def after(self, p, name, x, y):
    layers, key = p.block["qkv" if self.fused else name], p.block["dropout_key"]
    up = layers["up"]["kernel"]
    if self.fused:
      up = jnp.split(up, len(_FUSED), axis=1)[_FUSED.index(name)]
    elif key is not None:
      key = jax.random.fold_in(key, self.at.index(name))
    hidden = drop_tokens(key, p.shared["dropout"], dense(layers["down"], x))
    return y + p.shared["scale"] * (hidden @ up)


class LoRA(Method):
  """Low-rank updates of linear layers; they start at zero and can be merged."""

  targets: tuple[str, ...] = field(
    ("query", "value"),
    f"what is updated: some of {', '.join(TARGETS)}",
    check=checks.some_of(*TARGETS),
  )
  rank: int = field(8, "rank r of each update", check=checks.below_width)
  scale: float | int = field(
    1.0, "factor of the updates", check=checks.finite_number, hparam=True
  )
  fused: bool = field(
    False,
    "one down projection for query, key and value, which are the targets then",
    check=checks.boolean,
  )
  dropout: float | int = field(
    0.0, "rate on the r hidden values", check=checks.rate, hparam=True
  )

  @nn.nowrap
  def hooks(self) -> Hooks:
    return LoRAHooks(at=_FUSED if self.fused else self.targets, fused=self.fused)

  @nn.nowrap
  def _sizes(self, target: str) -> tuple[int, int]:
    """Returns (in, out) of a target."""
    width, hidden = self.spec.width, self.spec.mlp_dim
    return {"fc1": (width, hidden), "fc2": (hidden, width)}.get(target, (width, width))

  def setup(self) -> None:
    """Creates the projections of all blocks."""
    depth, rank = self.spec.depth, self.rank

    def layer(features_in: int, features_out: int, init) -> StackedDense:
      return StackedDense(depth, (features_in, features_out), init, bias_init=None)

    def pair(features_in: int, features_out: int) -> dict[str, StackedDense]:
      # As PyTorch's linear layers start; the update itself starts at zero.
      return {
        "down": layer(features_in, rank, torch_uniform(features_in)),
        "up": layer(rank, features_out, nn.initializers.zeros),
      }

    if self.fused:
      self.qkv = pair(self.spec.width, 3 * self.spec.width)
    else:
      for target in self.targets:
        setattr(self, target, pair(*self._sizes(target)))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed
    rate = self.hparam("dropout")
    blocks = {
      target: {name: layer() for name, layer in getattr(self, target).items()}
      for target in (("qkv",) if self.fused else self.targets)
    }
    blocks["dropout_key"] = block_keys(self, self.spec.depth, rate, train)
    return Adaptation(
      blocks=blocks, shared={"scale": self.hparam("scale"), "dropout": rate}
    )

  @nn.nowrap
  def merge(self, params: Mapping[str, Any], sites):
    """Returns the operations with W + scale * D U in place of W."""
    sites = dict(sites)
    for target in self.hooks().at:
      layers = "qkv" if self.fused else target
      down, up = (params[f"{layers}_{name}"]["kernel"] for name in ("down", "up"))
      if self.fused:
        up = np.split(up, len(_FUSED), axis=2)[_FUSED.index(target)]
      kernel = sites[target]["kernel"] + self.scale * (down @ up)
      sites[target] = {**sites[target], "kernel": kernel}
    return sites
