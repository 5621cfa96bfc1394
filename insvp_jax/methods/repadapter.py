"""RepAdapter: linear adapters after the norms, which can be merged.

Source: Luo et al. 2023, "Towards Efficient Visual Adaption via Structural
Re-parameterization", eq. 4 to 9.

Per block, the output x of the norm before the attention, and of that before the MLP,
becomes x + scale * (B (A x + a) + b), A [d, h]; B [h / g, d] has g groups: output o
reads the hidden units of group o div (d / g).
Parameters: l * branches * (d h + h + d h / g + d).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import BRANCHES, Adaptation, Hooks
from insvp_jax.methods.ops.dropout import block_keys, drop_tokens
from insvp_jax.methods.ops.stacked import StackedDense, dense

# The norm that each branch computes on.
_NORMS = {"attn": "norm1", "mlp": "norm2"}


def _ungrouped(kernel: Any, groups: int) -> Any:
  """Returns a grouped kernel [..., h / g, d], of NumPy or JAX, as [..., h, d].

  One product with the zeros in it is faster than a small one for each group.
  """
  *lead, rows, width = kernel.shape
  mask = np.repeat(np.eye(groups, dtype=bool), width // groups, axis=1)  # [g, d]
  kernel = kernel[..., None, :, :] * mask[:, None]
  return kernel.reshape(*lead, groups * rows, width)


@dataclasses.dataclass(frozen=True)
class RepAdapterHooks(Hooks):
  """Adds the adapters' outputs to the norms'."""

  groups: int = 1

  def after(self, p, name, x, y):
    del x
    layers, key = p.block[name], p.block["dropout_key"]
    if key is not None:
      key = jax.random.fold_in(key, self.at.index(name))
    hidden = drop_tokens(key, p.shared["dropout"], dense(layers["down"], y))
    up = {**layers["up"], "kernel": _ungrouped(layers["up"]["kernel"], self.groups)}
    return y + p.shared["scale"] * dense(up, hidden)


class RepAdapter(Method):
  """Linear adapters before the branches of each block; they start at zero."""

  branches: tuple[str, ...] = field(
    BRANCHES,
    f"before what: some of {', '.join(BRANCHES)}",
    check=checks.some_of(*BRANCHES),
  )
  hidden: int = field(8, "hidden units h", check=checks.below_width)
  groups: int = field(
    2, "groups of the up projection; divides h and d", check=checks.positive_int
  )
  scale: float | int = field(
    1.0, "factor of the adapters", check=checks.finite_number, hparam=True
  )
  dropout: float | int = field(
    0.1, "rate on the h hidden values", check=checks.rate, hparam=True
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields; see `Method.resolve`."""
    resolved = super().resolve(spec, values)
    groups, hidden = resolved["groups"], resolved["hidden"]
    if hidden % groups or spec.width % groups:
      raise ValueError(
        f"groups is {groups}, but it must divide hidden ({hidden}) and the width of "
        f"the backbone ({spec.width})."
      )
    return resolved

  @nn.nowrap
  def _norms(self) -> tuple[str, ...]:
    return tuple(_NORMS[branch] for branch in self.branches)

  @nn.nowrap
  def hooks(self) -> Hooks:
    return RepAdapterHooks(at=self._norms(), groups=self.groups)

  def setup(self) -> None:
    """Creates the layers of all blocks."""
    depth, width, hidden = self.spec.depth, self.spec.width, self.hidden
    for norm in self._norms():
      layers = {
        "down": StackedDense(depth, (width, hidden), nn.initializers.xavier_uniform()),
        "up": StackedDense(
          depth, (hidden // self.groups, width), nn.initializers.zeros
        ),
      }
      setattr(self, norm, layers)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed
    rate = self.hparam("dropout")
    blocks = {
      norm: {name: layer() for name, layer in getattr(self, norm).items()}
      for norm in self._norms()
    }
    blocks["dropout_key"] = block_keys(self, self.spec.depth, rate, train)
    return Adaptation(
      blocks=blocks, shared={"scale": self.hparam("scale"), "dropout": rate}
    )

  @nn.nowrap
  def merge(self, params: Mapping[str, Any], sites):
    """Returns the operations with a matrix in place of a norm's scale.

    x * gamma + beta becomes (x * gamma + beta) R + r, R = I + scale A B and
    r = scale (a B + b).
    """
    sites = dict(sites)
    for norm in self._norms():
      down, up = params[f"{norm}_down"], params[f"{norm}_up"]
      up_kernel = self.scale * _ungrouped(up["kernel"], self.groups)
      matrix = np.eye(self.spec.width) + down["kernel"] @ up_kernel
      shift = (down["bias"][:, None] @ up_kernel)[:, 0] + self.scale * up["bias"]
      site = sites[norm]
      kernel = site.get("kernel")
      if kernel is None:
        kernel = site["scale"][..., None] * np.eye(self.spec.width)
      bias = (site["bias"][:, None] @ matrix)[:, 0] + shift
      sites[norm] = {"kernel": kernel @ matrix, "bias": bias}
    return sites
