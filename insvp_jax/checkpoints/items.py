"""A train state as the items of a checkpoint: names, leaves and numbers."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import re
from typing import Any

import jax
import numpy as np

from insvp_jax import trees
from insvp_jax.checkpoints.files import Damaged, sharding_of, short

ALWAYS_STORED = r"(prompter|head)/.*"


def stored_names(mask: Mapping[str, Any]) -> list[str]:
  """Returns the names of the parameters that a checkpoint's `adapter` holds."""
  return [
    name
    for name, trainable in trees.flatten(mask).items()
    if trainable or re.fullmatch(ALWAYS_STORED, name)
  ]


def _rest(state: Any) -> dict[str, Any]:
  """Returns the fields that have no item of their own: the optimizer's state."""
  names = [field.name for field in dataclasses.fields(state)]
  return {n: getattr(state, n) for n in names if n not in ("step", "params", "rng")}


def flatten_rest(state: Any) -> dict[str, Any]:
  """Returns {'/'-joined path: leaf} of a state's `opt_state` and further fields."""
  # optax nests namedtuples and empty nodes, which a dict of leaves leaves behind.
  leaves = jax.tree_util.tree_leaves_with_path(_rest(state))
  return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def unflatten_rest(flat: Mapping[str, Any], state: Any) -> dict[str, Any]:
  """Returns the fields of which `flatten_rest` of such a state has the leaves."""
  leaves = [flat[name] for name in flatten_rest(state)]
  return jax.tree.unflatten(jax.tree.structure(_rest(state)), leaves)


def as_array(leaf: Any) -> jax.Array:
  """Returns a leaf as what Orbax checks the shape of."""
  # Orbax does not check the shape of a numpy leaf when it is restored. (`jnp.asarray`
  # would compile a program for each shape.)
  return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)


def encode_key(key: jax.Array) -> dict[str, Any]:
  """Returns a typed key as JSON values."""
  data = np.asarray(jax.random.key_data(key))
  return {"impl": str(jax.random.key_impl(key)), "data": data.tolist()}


def decode_key(stored: Any, like: Any, where: Path) -> jax.Array:
  """Returns the key that `encode_key` was given.

  Args:
    stored: its JSON values.
    like: a key, or a `jax.ShapeDtypeStruct` with a sharding, that it replaces.
    where: the checkpoint, for the message.

  Raises:
    Damaged: there is no key in it.
    ValueError: it is of another kind or shape.
  """
  try:
    # Numbers, unlike keys, can be put on devices of which this process owns a part.
    data = jax.device_put(np.asarray(stored["data"], np.uint32), sharding_of(like))
    key = jax.random.wrap_key_data(data, impl=stored["impl"])
  except (TypeError, ValueError, KeyError, OverflowError) as error:
    raise Damaged(
      f"{where} is damaged: its progress has the random key {short(stored)}."
    ) from error
  if key.dtype != like.dtype or key.shape != like.shape:
    raise ValueError(
      f"the random key of the checkpoint {where} is {key.dtype}{list(key.shape)}, "
      f"expected {like.dtype}{list(like.shape)}. Set jax_default_prng_impl as then."
    )
  return key
