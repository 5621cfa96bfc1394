"""Dropout that draws fast, and at a rate that may be data of the compiled step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A constant of the compiled step, or data of it.
Rate = float | int | Float[Array, ""]


def is_off(rate: Rate) -> bool:
  """Returns whether no dropout is compiled at all; never for a rate that is data."""
  return isinstance(rate, float | int) and rate == 0


class Dropout(nn.Module):
  """Zeroes each value with the given probability and scales the others up.

  Draws what `nn.Dropout` draws, bit for bit, but in one row: compilers make slow code
  of random numbers in arrays with few channels. And that one only takes constants.

  Attributes:
    rate: the probability, in [0, 1).
  """

  rate: Rate

  @nn.compact
  def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
    """Returns x as it is unless training, which needs the rng "dropout"."""
    if not train or is_off(self.rate):
      return x
    return drop(self.make_rng("dropout"), self.rate, x)


def drop_per_sample(
  dropout: Dropout, tokens: Float[Array, "l 1 p d"], num_samples: Any, *, train: bool
) -> Float[Array, "l b_or_1 p d"]:
  """Returns prompts that all images share, with dropout drawn for each image.

  The batch axis stays 1 where nothing is dropped.

  Args:
    dropout: draws.
    tokens: the prompts.
    num_samples: images; a symbol in a program that is exported for any number of them.
    train: whether dropout is on.
  """
  if not train or is_off(dropout.rate):
    return tokens
  return dropout(jnp.repeat(tokens, num_samples, axis=1), train=True)


def block_keys(module: nn.Module, num_blocks: int, rate: Rate, train: bool):
  """Returns a random key for each block, as a leaf of `Adaptation.blocks`, or None.

  None stands for no dropout: without training, or at the constant rate 0.
  """
  if not train or is_off(rate):
    return None
  return jax.random.split(module.make_rng("dropout"), num_blocks)


def drop(
  key: jax.Array | None, rate: Rate, x: Float[Array, "..."]
) -> Float[Array, "..."]:
  """Returns x with values zeroed and the others scaled up; as it is without a key."""
  if key is None:
    return x
  keep = 1.0 - rate
  is_kept = jax.random.bernoulli(key, keep, (x.size,))
  # Drawn once: the compiler would rather draw again in the backward pass.
  is_kept = jax.lax.optimization_barrier(is_kept).reshape(x.shape)
  return jnp.where(is_kept, x / keep, jnp.zeros_like(x))


def drop_tokens(
  key: jax.Array | None, rate: Rate, x: Float[Array, "b m h"]
) -> Float[Array, "b m h"]:
  """As `drop`, where a token's draw does not depend on how many tokens come after it.

  So a block that only computes the tokens that are read, the first ones, trains like
  one that computes all.
  """
  if key is None:
    return x
  return jnp.swapaxes(drop(key, rate, jnp.swapaxes(x, 0, 1)), 0, 1)


def drop_path(
  key: jax.Array | None, rate: Rate, x: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
  """Returns x with whole samples zeroed and the others scaled up; see `drop`."""
  if key is None:
    return x
  return x * drop(key, rate, jnp.ones((len(x),) + (1,) * (x.ndim - 1), x.dtype))
