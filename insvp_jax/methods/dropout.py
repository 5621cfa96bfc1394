"""Dropout whose random numbers cost a third, and are the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Dropout(nn.Module):
  """Zeroes each value with the given probability and scales the others up.

  Draws what `nn.Dropout` draws, bit for bit, but in one row: compilers make slow code
  of random numbers in arrays with few channels.

  Attributes:
    rate: the probability, in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
    """Returns x as it is unless training, which needs the rng "dropout"."""
    if not train or self.rate == 0:
      return x
    keep = 1 - self.rate
    drawn = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.size,))
    # Drawn once: the compiler would rather draw again in the backward pass.
    kept = jax.lax.optimization_barrier(drawn).reshape(x.shape)
    return jnp.where(kept, x / keep, jnp.zeros_like(x))
