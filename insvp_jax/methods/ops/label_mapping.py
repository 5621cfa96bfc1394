"""Label mappings: which source classes stand for each target class.

A mapping is int32 [k, m]: the m source classes of each of the k target classes. No
source class is used twice. All functions run on the host and are deterministic.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


def count_predictions(
  predictions: Int[np.ndarray, "n"],
  labels: Int[np.ndarray, "n"],
  num_source: int,
  num_target: int,
) -> Int[np.ndarray, "s k"]:
  """Returns how many images of each target class are predicted as each source class."""
  counts = np.zeros((num_source, num_target), np.int64)
  np.add.at(counts, (np.asarray(predictions, int), np.asarray(labels, int)), 1)
  return counts


def greedy_mapping(
  counts: Int[np.ndarray, "s k"],
  sources_per_target: int = 1,
  *,
  ascending: bool = False,
) -> Int[np.ndarray, "k m"]:
  """Returns the mapping that takes the largest count again and again.

  The target class of the largest entry gets its source class, which is then used up; a
  target class with m of them is closed. Ties go to the first entry, row by row. Where
  nothing was counted, source classes are so handed out in ascending order.

  That is one sort of the entries that are not zero, and no search over all of them for
  every pair: 21,843 source classes take milliseconds.

  Source: Chen et al. 2023, "Understanding and Improving Visual Prompting: A
  Label-Mapping Perspective" (m = 1), and Tsao et al. 2024, "AutoVP" (any m).

  Args:
    counts: from `count_predictions`.
    sources_per_target: m.
    ascending: whether a target's source classes are sorted; else they are in the order
      in which they were found.

  Raises:
    ValueError: there are fewer than m k source classes.
  """
  num_source, num_target = counts.shape
  check_enough(num_source, num_target, sources_per_target)
  found: list[list[int]] = [[] for _ in range(num_target)]
  is_free = np.ones(num_source, bool)
  rows, columns = np.nonzero(counts)
  # Stable, so that ties keep the order of `nonzero`, row by row.
  for i in np.argsort(-counts[rows, columns], kind="stable"):
    source, target = rows[i], columns[i]
    if is_free[source] and len(found[target]) < sources_per_target:
      found[target].append(int(source))
      is_free[source] = False
  # All that is left are zeros: the first free row with the first open column.
  free = iter(np.flatnonzero(is_free).tolist())
  for sources in found:
    while len(sources) < sources_per_target:
      sources.append(next(free))
  mapping = np.asarray(found, np.int32)
  return np.sort(mapping, axis=1) if ascending else mapping


def semantic_mapping(
  source: Float[np.ndarray, "s e"],
  target: Float[np.ndarray, "k f"],
  sources_per_target: int = 1,
) -> Int[np.ndarray, "k m"]:
  """Returns the mapping of the classes whose embeddings are most alike, by cosine.

  In each of m rounds the target classes, in their order, take the source class that is
  most like them and still free.

  Source: Tsao et al. 2024, "AutoVP: An Automated Visual Prompting Framework".

  Raises:
    ValueError: there are fewer than m k source classes, or embeddings of other widths.
  """
  source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
  if source.shape[1] != target.shape[1]:
    raise ValueError(
      f"embeddings of source classes are {source.shape[1]} wide and those of target "
      f"classes {target.shape[1]}; both have to come from one model."
    )
  check_enough(len(source), len(target), sources_per_target)
  source, target = (
    x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    for x in (source, target)
  )
  similarity = target @ source.T  # [k, s]
  mapping = np.zeros((len(target), sources_per_target), np.int32)
  for i in range(sources_per_target):
    for k, row in enumerate(similarity):
      mapping[k, i] = np.argmax(row)
      similarity[:, mapping[k, i]] = -np.inf
  return mapping


def map_logits(
  source_logits: Float[Array, "b s"],
  mapping: Int[Array, "k m"] | Int[np.ndarray, "k m"],
) -> Float[Array, "b k"]:
  """Returns target logits: each the mean of those of its source classes."""
  return jnp.mean(source_logits[:, mapping], axis=-1)


def check_enough(num_source: int, num_target: int, sources_per_target: int) -> None:
  """Checks that each target class can have its own source classes.

  Raises:
    ValueError: it cannot.
  """
  if num_source < num_target * sources_per_target:
    raise ValueError(
      f"{num_target} target classes with {sources_per_target} source classes each need "
      f"{num_target * sources_per_target} of them, but the backbone's head has "
      f"{num_source}; take fewer, or a backbone that was trained on more classes."
    )
