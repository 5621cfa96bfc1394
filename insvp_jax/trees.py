"""Parameters as one tree with '/'-joined names: masks, splits, comparisons.

A name is the path of a leaf, e.g. `backbone/Transformer/encoder_norm/scale`.
Names are what patterns, checkpoints and error messages speak of.
"""

from collections.abc import Iterable, Mapping, Sequence
import difflib
import hashlib
import re
from typing import Any

from flax import traverse_util
import numpy as np


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'/'-joined name: leaf} of a nested dict; empty dicts vanish."""
  return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict of a flat one; the inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(flat), sep="/")


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns ' Did you mean 'x'?' for the nearest known name, or ''."""
  close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
  """Returns `table[name]`.

  Raises:
    ValueError: the name is unknown; the message lists the known ones.
  """
  if name not in table:
    raise ValueError(
      f"unknown {what} {name!r}.{did_you_mean(name, table)} "
      f"Known: {', '.join(sorted(table))}."
    )
  return table[name]


def mask(params: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
  """Returns a tree of bools: True where a pattern matches the leaf's full name.

  Args:
    params: nested dict of parameters.
    patterns: regular expressions, matched against the whole '/'-joined name.

  Raises:
    ValueError: a pattern matches no parameter. A typo would otherwise leave a
      part of the model untrained without a word.
  """
  names = list(flatten(params))
  selected = set()
  for pattern in patterns:
    hits = [name for name in names if re.fullmatch(pattern, name)]
    if not hits:
      raise ValueError(
        f"the pattern {pattern!r} matches no parameter.{did_you_mean(pattern, names)} "
        f"Top-level groups: {', '.join(sorted({n.split('/')[0] for n in names}))}."
      )
    selected.update(hits)
  return unflatten({name: name in selected for name in names})


def split(
  params: Mapping[str, Any], mask: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into (trainable, frozen) flat dicts; see `merge`."""
  chosen = flatten(mask)
  flat = flatten(params)
  trainable = {name: leaf for name, leaf in flat.items() if chosen[name]}
  frozen = {name: leaf for name, leaf in flat.items() if not chosen[name]}
  return trainable, frozen


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested tree of two flat dicts; the inverse of `split`."""
  return unflatten({**frozen, **trainable})


def count(tree: Mapping[str, Any]) -> int:
  """Returns the number of scalars in a tree of arrays or shape structs."""
  return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def digest(tree: Mapping[str, Any]) -> str:
  """Returns the sha256 (hex) of a tree's names, shapes and float32 values."""
  sha = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    array = np.ascontiguousarray(np.asarray(leaf, np.float32))
    sha.update(f"{name}{array.shape}".encode())
    sha.update(array.tobytes())
  return sha.hexdigest()
