"""Dropout whose rate may be data: one compiled step then serves several rates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A number of a method: a constant of the compiled step, or data of it.
Number = float | int | Float[Array, ""]


def is_off(rate: Number) -> bool:
  """Returns whether no dropout is compiled at all; never for a rate that is data."""
  return isinstance(rate, float | int) and rate == 0


class Dropout(nn.Module):
  """As `nn.Dropout`, with the same draws; that one only takes constants.

  Attributes:
    rate: share of the inputs that are set to 0, in [0, 1).
  """

  rate: Number

  @nn.compact
  def __call__(
    self, inputs: Float[Array, "..."], *, deterministic: bool
  ) -> Float[Array, "..."]:
    """Returns the inputs, thinned out and scaled to keep their mean."""
    if deterministic or is_off(self.rate):
      return inputs
    keep = 1.0 - self.rate
    kept = jax.random.bernoulli(self.make_rng("dropout"), keep, inputs.shape)
    return jnp.where(kept, inputs / keep, 0.0)
