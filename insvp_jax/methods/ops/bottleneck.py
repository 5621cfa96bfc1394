"""The bottleneck of adapters: down, an activation, up."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from insvp_jax.methods.ops.dropout import Rate, drop_tokens
from insvp_jax.methods.ops.stacked import dense


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns the GELU as CLIP approximates it: x * sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "quick_gelu": quick_gelu,
  "relu": jax.nn.relu,
}


def bottleneck(
  layers: Mapping[str, Any],
  activation: str,
  x: Float[Array, "b m d"],
  key: jax.Array | None = None,
  rate: Rate = 0.0,
) -> Float[Array, "b m d"]:
  """Returns U drop(activation(D x)).

  Args:
    layers: one block's "down" and "up", as `dense` takes them.
    activation: a key of `ACTIVATIONS`.
    x: tokens.
    key: for the dropout of hidden values; None for none.
    rate: of the dropout.
  """
  hidden = ACTIVATIONS[activation](dense(layers["down"], x))
  return dense(layers["up"], drop_tokens(key, rate, hidden))
