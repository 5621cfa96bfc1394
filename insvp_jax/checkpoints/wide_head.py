"""Heads with more columns than their task has classes; see `models.heads.Head`.

On the devices a head has `config.head_width` columns, of which those beyond the task's
classes are 0 and stay 0: they get no gradient, and nothing else moves a zero. Wherever
a run is stored, it has the columns of its classes alone.
"""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The parameters, and what an optimizer keeps of each; not a method's or backbone's own.
_LEAVES = r"(?!.*(backbone|prompter)/)(.*/)?head/(kernel|bias)"


def widen(params: Mapping[str, Any], width: int) -> dict[str, Any]:
  """Returns host parameters whose head has `width` columns, the new ones of zeros.

  Args:
    params: {"head": {"kernel": [d, k], "bias": [k]}, ...}, numpy arrays.
    width: at least k.
  """
  head = {name: np.pad(x, _margin(x, width)) for name, x in params["head"].items()}
  return {**params, "head": head}


def narrow(flat: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
  """Returns leaves without the columns beyond the classes, as they are stored.

  Args:
    flat: leaves by '/'-joined path, of parameters or of an optimizer's state: arrays on
      the devices, or `jax.ShapeDtypeStruct`.
    num_classes: k.
  """

  def cut(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(shape=(*leaf.shape[:-1], num_classes))
    return _resize(num_classes, leaf.sharding)(leaf)

  return {
    name: cut(leaf)
    if re.fullmatch(_LEAVES, name) and leaf.shape[-1] > num_classes
    else leaf
    for name, leaf in flat.items()
  }


def widen_as(flat: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns leaves that `narrow` gave as wide as they were before.

  Args:
    flat: arrays on the devices, by '/'-joined path.
    like: leaves of the former shapes.
  """
  return {
    name: leaf
    if leaf.shape == like[name].shape
    else _resize(like[name].shape[-1], leaf.sharding)(leaf)
    for name, leaf in flat.items()
  }


@functools.cache
def _resize(width: int, sharding: jax.sharding.Sharding) -> Callable:
  """Returns what cuts or fills the last axis of arrays, compiled once for them all."""

  def resize(leaf: jax.Array) -> jax.Array:
    leaf = leaf[..., :width]
    return jnp.pad(leaf, _margin(leaf, width))

  return jax.jit(resize, out_shardings=sharding)


def _margin(leaf: Any, width: int) -> list[tuple[int, int]]:
  return [*[(0, 0)] * (leaf.ndim - 1), (0, width - leaf.shape[-1])]
