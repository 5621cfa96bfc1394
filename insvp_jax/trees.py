"""Parameters as one tree with '/'-joined names: masks, splits, counts, digests.

A tree is a nested dict whose leaves are arrays or shape structs. A leaf's name is its
path, e.g. `backbone/Transformer/encoder_norm/scale`: patterns, checkpoints and error
messages speak of names. A flat dict maps names to leaves.
"""

from collections.abc import Iterable, Mapping, Sequence
import difflib
import hashlib
import re
from typing import Any

from flax import traverse_util
import numpy as np


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the flat dict {name: leaf} of a nested dict; empty dicts vanish."""
  return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict of a flat dict; the inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(flat), sep="/")


# A message lists at most so many known names; of longer tables it names the nearest.
_MOST_LISTED = 12
_NUM_NEAREST = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns an addition to a message about an unknown name.

  Args:
    name: the unknown name.
    known: the names that are known.

  Returns:
    " Did you mean 'x'?" for the nearest known name; "" if none is near.
  """
  close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def known_names(name: str, known: Iterable[str], all_in: str = "") -> str:
  """Returns the end of a message about an unknown name: which names there are.

  Args:
    name: the unknown name.
    known: the names that are known.
    all_in: where all of them are to be seen, e.g. a command; "" for nowhere.

  Returns:
    " Did you mean 'x'? Known: v, x, y." or, where they are many, " Nearest: x, y, ...;
    all of them: <all_in>."
  """
  known = [str(k) for k in known]
  if len(known) <= _MOST_LISTED:
    return f"{did_you_mean(name, known)} Known: {', '.join(sorted(known))}."
  # Without a cutoff, so that there are always as many.
  nearest = difflib.get_close_matches(str(name), known, n=_NUM_NEAREST, cutoff=0.0)
  others = f"all of them: {all_in}" if all_in else f"{len(known)} are known"
  return f" Nearest: {', '.join(nearest)}; {others}."


def lookup(table: Mapping[str, Any], name: str, what: str, all_in: str = "") -> Any:
  """Returns `table[name]`.

  Args:
    table: the known names and what they stand for.
    name: a name that a user gave.
    what: what the name is of, for the message, e.g. "preset".
    all_in: where all names are to be seen, for the message; see `known_names`.

  Raises:
    ValueError: if the name is unknown; the message lists the known ones or, of a long
      table, the nearest.
  """
  if name not in table:
    raise ValueError(f"unknown {what} {name!r}.{known_names(name, table, all_in)}")
  return table[name]


def mask(params: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
  """Returns a tree of bools: True where a pattern matches a leaf's whole name.

  Args:
    params: nested dict of parameters.
    patterns: regular expressions, each matched against the whole name.

  Returns:
    A nested dict like `params`; True where a parameter is trainable.

  Raises:
    ValueError: if a pattern matches no parameter.
  """
  names = list(flatten(params))
  selected = set()
  # Pattern by pattern, so that each has to match: a typo would otherwise leave a part
  # of the model untrained without a word.
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
  """Splits parameters by a mask; the inverse is `merge`.

  Args:
    params: nested dict of parameters.
    mask: nested dict of bools, True where trainable, from `mask`.

  Returns:
    (trainable, frozen), both flat dicts.
  """
  # Flat, so that gradients and optimizer states are dicts of just the trainable leaves.
  is_trainable = flatten(mask)
  flat = flatten(params)
  trainable = {name: leaf for name, leaf in flat.items() if is_trainable[name]}
  frozen = {name: leaf for name, leaf in flat.items() if not is_trainable[name]}
  return trainable, frozen


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict of two flat dicts; the inverse of `split`."""
  return unflatten({**frozen, **trainable})


def count(tree: Mapping[str, Any]) -> int:
  """Returns the number of scalars in all leaves of a tree."""
  return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def digest(tree: Mapping[str, Any]) -> str:
  """Returns the sha256 (hex) of a tree's names, shapes and float32 values."""
  # Sorted by name, so that the order of the dicts does not matter; as float32, so that
  # the digest does not depend on the precision that equal values are stored in.
  sha = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    array = np.ascontiguousarray(np.asarray(leaf, np.float32))
    sha.update(f"{name}{array.shape}".encode())
    sha.update(array.tobytes())
  return sha.hexdigest()
