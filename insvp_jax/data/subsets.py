"""Which images of a training set are train and which are val.

`stratified_mask` and `stratified_parts` draw examples so that classes keep their
shares, `draw_shots` as many of each, `draw_fraction` a share of each. `draw_train_val`
applies the rules that published tasks are drawn by (`tasks.Subset.rule`): a rule is a
function of labels and names, in the order of the source, and returns positions.
"""

from collections.abc import Mapping, Sequence
import random

from absl import logging
from jaxtyping import Bool, Int, Shaped
import numpy as np

from insvp_jax.data.tasks import Subset, Task

# The seed of Python's generator in InsVP's release.
SHUFFLE_SEED = 3407
# CIFAR-100's images per class, of which a long tail keeps a part.
_IMAGES_PER_CLASS = 500


def stratified_mask(
  labels: Int[np.ndarray, "n"], number: int, seed: int
) -> Bool[np.ndarray, "n"]:
  """Chooses `number` examples so that each class keeps its share.

  Shares are rounded down. What is missing then goes one by one to the classes with the
  largest remainders (ties: the lower label).

  Args:
    labels: class of each example.
    number: how many examples to choose, at most n.
    seed: the choice is a pure function of the labels, `number` and `seed`.

  Returns:
    True for the chosen examples.

  Raises:
    ValueError: if `number` is negative or above n.
  """
  if not 0 <= number <= len(labels):
    raise ValueError(f"cannot choose {number} of {len(labels)} examples.")
  classes, counts = np.unique(labels, return_counts=True)
  quota = counts * number / max(len(labels), 1)
  wanted = np.floor(quota).astype(np.int64)
  # Ascending in minus the remainder; a stable sort settles ties by the label.
  largest = np.argsort(wanted - quota, kind="stable")
  wanted[largest[: number - wanted.sum()]] += 1
  # The bit generator is named, because numpy may change that of default_rng.
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

  Of a class of m examples, a part of fraction f > 0 gets f * m, rounded, but at least
  one; train keeps at least one. A class too small for that gives first to train,
  then to the parts of the largest fractions: a single example stays in train. A warning
  names such classes, or the part that no class has enough for.

  Args:
    labels: class of each example.
    fractions: the fraction of each part beside train, in [0, 1), together below 1.
    seed: the result is a pure function of the arguments.
    class_names: how errors name the classes.

  Returns:
    For each example "train" or the part's name.

  Raises:
    ValueError: if fractions are out of range.
  """
  total = sum(fractions.values())
  if any(fraction < 0 for fraction in fractions.values()) or total >= 1:
    wanted = ", ".join(f"{name}_fraction={f}" for name, f in fractions.items())
    raise ValueError(f"{wanted}: each has to be at least 0, together below 1.")
  wanted = {name: fraction for name, fraction in fractions.items() if fraction}
  largest_first = sorted(wanted, key=wanted.__getitem__, reverse=True)
  parts = np.full(len(labels), "train", dtype="<U16")
  rng = np.random.Generator(np.random.PCG64(seed))
  lacking: dict[str, list[str]] = {name: [] for name in wanted}
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    served = largest_first[: len(members) - 1]
    for name in wanted.keys() - set(served):
      lacking[name].append(class_names[label])
    start, left = 0, len(served)
    for name, fraction in wanted.items():
      if name not in served:
        continue
      left -= 1
      # One example stays for each later part and for train.
      room = len(members) - start - left - 1
      # Not round(): it rounds halves to the even neighbour.
      number = min(max(1, int(fraction * len(members) + 0.5)), room)
      parts[members[start : start + number]] = name
      start += number
  for name, classes in lacking.items():
    if len(classes) == len(np.unique(labels)):
      logging.warning(
        "the classes have too few images for one of each in %s, so there is none", name
      )
    elif classes:
      logging.warning(
        "%d of the classes have too few images for one in %s: %s",
        len(classes),
        name,
        ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else ""),
      )
  return parts


def draw_shots(
  labels: Int[np.ndarray, "n"], shots: int, seed: int, class_names: Sequence[str]
) -> Int[np.ndarray, "m"]:
  """Returns the positions of `shots` examples of each class, ascending.

  With one seed, what few shots choose is a part of what more of them do.

  Args:
    labels: class of each example.
    shots: how many of each class.
    seed: the choice is a pure function of the arguments.
    class_names: one name per class.

  Raises:
    ValueError: a class has not so many examples.
  """
  counts = np.bincount(labels, minlength=len(class_names))
  if (fewest := int(counts.min())) < shots:
    raise ValueError(
      f"config.data.shots is {shots}, but train has only {fewest} images of the class "
      f"{class_names[counts.argmin()]!r}; set it to "
      + (f"at most {fewest}." if fewest else "0, which is all images.")
    )
  return _draw_counts(labels, np.full(len(class_names), shots), seed)


def draw_fraction(
  labels: Int[np.ndarray, "n"], fraction: float, seed: int, num_classes: int
) -> Int[np.ndarray, "m"]:
  """Returns the positions of a share of each class's examples, ascending.

  Of m examples fraction * m are drawn, rounded with halves up, but at least one. With
  one seed, what a small share chooses is a part of what a larger one does, and equal
  numbers of each class are those of `draw_shots`.

  Args:
    labels: class of each example.
    fraction: the share, in (0, 1].
    seed: the choice is a pure function of the arguments.
    num_classes: k.
  """
  counts = np.bincount(labels, minlength=num_classes)
  # Not round(): it rounds halves to the even neighbour.
  drawn = np.maximum(1, np.floor(fraction * counts + 0.5)).astype(np.int64)
  return _draw_counts(labels, np.minimum(drawn, counts), seed)


def _draw_counts(
  labels: Int[np.ndarray, "n"], counts: Int[np.ndarray, "k"], seed: int
) -> Int[np.ndarray, "m"]:
  """Returns the positions of so many examples of each class, ascending."""
  rng = np.random.Generator(np.random.PCG64(seed))
  chosen = [
    rng.permutation(np.flatnonzero(labels == label))[:count]
    for label, count in enumerate(counts)
  ]
  return np.sort(np.concatenate(chosen))


def draw_train_val(
  task: Task,
  subset: Subset,
  labels: Int[np.ndarray, "n"],
  names: Sequence[str] | None,
  split_seed: int,
) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
  """Draws train and val from a published task's training images.

  Args:
    task: the task; named in errors.
    subset: one of `task.subsets` whose rule draws: "stratified", "first", "shuffled" or
      "long_tail".
    labels: labels of all training images.
    names: names whose sorted order is that of the original files, so numbers in them
      are zero-padded; needed by all rules but "stratified".
    split_seed: the seed of what is drawn by us rather than by a paper.

  Returns:
    The positions of train and those of val.

  Raises:
    ValueError: if there are too few images, or no names where the rule needs them.
  """
  total = len(labels)
  if subset.rule == "stratified":
    # The published size of val where the set has its published size, else its share.
    num_val = round(subset.val * total / (subset.train + subset.val))
    is_val = stratified_mask(labels, num_val, split_seed)
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)
  if names is None:
    raise ValueError(
      f"the subset of {task.name} is defined by the order of the original files, but "
      f"these images have no names. "
      + (
        f"Prepare a version of {task.spec} with the feature {task.id_feature!r}."
        if task.id_feature
        else "Give config.data.root."
      )
    )
  # TFDS stores examples in the order of a hash; names bring back that of the files.
  order = np.array(sorted(range(total), key=lambda i: names[i]), np.int64)
  if subset.rule == "long_tail":
    return _draw_long_tail(labels, order, subset, split_seed)
  if subset.rule == "shuffled":
    # On a list, as the release does it: shuffling an array draws in another way.
    shuffled = order.tolist()
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    order = np.array(shuffled, np.int64)
  num_train = subset.train * total // (subset.train + subset.val)
  return order[:num_train], order[num_train:]


def _draw_long_tail(labels, order, subset: Subset, split_seed: int):
  """Returns the positions of train and val of a long tail; val has each class's share.

  Args:
    labels: labels of all training images, in the order of the source.
    order: positions of the training images, in the order of the original files.
    subset: the subset, with its imbalance.
    split_seed: the seed of val.
  """
  kept = order[long_tail(labels[order], subset.imbalance)]
  num_val = len(kept) * subset.val // (subset.train + subset.val)
  is_val = stratified_mask(labels[kept], num_val, split_seed)
  return kept[~is_val], kept[is_val]


def long_tail_sizes(num_classes: int, imbalance: int) -> list[int]:
  """Returns how many images of each class an exponential long tail keeps.

  Args:
    num_classes: k.
    imbalance: size of the largest class divided by that of the smallest.

  Source: LDAM-DRW (Cao et al. 2019), `imbalance_cifar.py`: rounded down.
  """
  last = max(num_classes - 1, 1)
  return [
    int(_IMAGES_PER_CLASS * (1 / imbalance) ** (label / last))
    for label in range(num_classes)
  ]


def long_tail(labels: Int[np.ndarray, "n"], imbalance: int) -> Int[np.ndarray, "m"]:
  """Returns the positions that the standard long tail keeps, class by class.

  Args:
    labels: labels in the order of the original files, 500 of each class.
    imbalance: size of the largest class divided by that of the smallest.

  Raises:
    ValueError: if a class has too few images.

  Source: LDAM-DRW (Cao et al. 2019), `imbalance_cifar.py`.
  """
  num_classes = int(labels.max()) + 1
  # The published selection is drawn by numpy's legacy generator with this seed.
  rng = np.random.RandomState(0)
  kept = []
  for label, size in enumerate(long_tail_sizes(num_classes, imbalance)):
    members = np.flatnonzero(labels == label)
    if len(members) < size:
      raise ValueError(
        f"class {label} has {len(members)} images, the long tail needs {size} of it; "
        f"is this the whole training set?"
      )
    rng.shuffle(members)
    kept.append(members[:size])
  return np.concatenate(kept)
