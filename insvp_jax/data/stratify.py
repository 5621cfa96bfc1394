"""Seeded choices that keep the shares of the classes."""

from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Int, Shaped
import numpy as np


def stratified_choice(
  labels: Int[np.ndarray, "n"], number: int, seed: int
) -> Bool[np.ndarray, "n"]:
  """Chooses `number` examples so that each class keeps its share.

  Shares are rounded down; what is missing goes one by one to the classes with
  the largest remainders (ties: the lower label).

  Args:
    labels: class of each example.
    number: how many to choose, at most n.
    seed: the choice is a pure function of the labels, `number` and `seed`.

  Returns:
    True for the chosen examples.
  """
  if not 0 <= number <= len(labels):
    raise ValueError(f"cannot choose {number} of {len(labels)} examples.")
  classes, counts = np.unique(labels, return_counts=True)
  quota = counts * number / max(len(labels), 1)
  wanted = np.floor(quota).astype(np.int64)
  largest = np.argsort(wanted - quota, kind="stable")
  wanted[largest[: number - wanted.sum()]] += 1
  rng = np.random.Generator(np.random.PCG64(seed))
  chosen = np.zeros(len(labels), bool)
  for label, count in zip(classes, wanted, strict=True):
    members = rng.permutation(np.flatnonzero(labels == label))
    chosen[members[:count]] = True
  return chosen


def stratified_parts(
  labels: Int[np.ndarray, "n"],
  fractions: Mapping[str, float],
  seed: int,
  class_names: Sequence[str],
) -> Shaped[np.ndarray, "n"]:
  """Divides examples into train and other parts, class by class.

  Of a class of m examples, a part of fraction f > 0 gets f * m, rounded, but at
  least one; train keeps at least one.

  Args:
    labels: class of each example.
    fractions: of each part beside train, in [0, 1), together below 1.
    seed: the result is a pure function of the arguments.
    class_names: for messages.

  Returns:
    For each example "train" or the part's name.

  Raises:
    ValueError: fractions out of range, or a class that is too small.
  """
  total = sum(fractions.values())
  if any(fraction < 0 for fraction in fractions.values()) or total >= 1:
    wanted = ", ".join(f"{name}_fraction={f}" for name, f in fractions.items())
    raise ValueError(f"{wanted}: each has to be at least 0, together below 1.")
  wanted = {name: fraction for name, fraction in fractions.items() if fraction}
  parts = np.full(len(labels), "train", dtype="<U16")
  rng = np.random.Generator(np.random.PCG64(seed))
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    if len(members) < 1 + len(wanted):
      raise ValueError(
        f"the class {class_names[label]!r} has {len(members)} images, but one each "
        f"is needed for {', '.join(['train', *wanted])}. Add images, or set the "
        f"fraction of a split to 0 to do without it."
      )
    start, left = 0, len(wanted)
    for name, fraction in wanted.items():
      left -= 1
      room = len(members) - start - left - 1  # one for each later part and train
      number = min(max(1, int(fraction * len(members) + 0.5)), room)
      parts[members[start : start + number]] = name
      start += number
  return parts
