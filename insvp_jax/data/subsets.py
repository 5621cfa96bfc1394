"""Which images of a training set train and which choose: the named rules.

A rule is a function of labels and names (in the order of the source) and returns
positions. TFDS orders examples by a hash, so rules that speak of the order of the
original files sort by name first.
"""

from collections.abc import Sequence
import hashlib
import random

from jaxtyping import Int
import numpy as np

from insvp_jax.data.stratify import stratified_choice
from insvp_jax.data.tasks import Subset, Task

# InsVP's release seeds Python's generator with it.
SHUFFLE_SEED = 3407
# CIFAR's images per class, of which a long tail keeps a part.
_LARGEST_CLASS = 500


def draw(
  task: Task,
  subset: Subset,
  labels: Int[np.ndarray, "n"],
  names: Sequence[str] | None,
  split_seed: int,
) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
  """Returns the positions of (train, val) in a task's training images.

  Args:
    task: named in errors.
    subset: one of `task.subsets` whose rule draws: "stratified", "first",
      "shuffled" or "long_tail".
    labels: of all training images.
    names: what the original files are ordered by, zero-padded where numbers;
      needed by all rules but "stratified".
    split_seed: of what is drawn by us rather than by a paper.

  Raises:
    ValueError: too few images, or no names where the rule needs them.
  """
  total = len(labels)
  if subset.rule == "stratified":
    # Published sizes where the set is the published one, else their share.
    num_val = round(subset.val * total / (subset.train + subset.val))
    chosen = stratified_choice(labels, num_val, split_seed)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
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
  order = np.array(sorted(range(total), key=lambda i: names[i]), np.int64)
  if subset.rule == "long_tail":
    return _tail(labels, order, subset, split_seed)
  if subset.rule == "shuffled":
    shuffled = order.tolist()
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    order = np.array(shuffled, np.int64)
  num_train = subset.train * total // (subset.train + subset.val)
  return order[:num_train], order[num_train:]


def _tail(labels, order, subset: Subset, split_seed: int):
  kept = order[long_tail(labels[order], subset.imbalance)]
  num_val = len(kept) * subset.val // (subset.train + subset.val)
  val = stratified_choice(labels[kept], num_val, split_seed)
  return kept[~val], kept[val]


def tail_sizes(num_classes: int, imbalance: int) -> list[int]:
  """Returns how many images of each class an exponential long tail keeps.

  Source: LDAM-DRW (Cao et al. 2019), `imbalance_cifar.py`: rounded down.
  """
  last = max(num_classes - 1, 1)
  return [
    int(_LARGEST_CLASS * (1 / imbalance) ** (c / last)) for c in range(num_classes)
  ]


def long_tail(labels: Int[np.ndarray, "n"], imbalance: int) -> Int[np.ndarray, "m"]:
  """Returns the positions that the standard long tail keeps, class by class.

  Args:
    labels: in the order of the original files, 500 of each class.
    imbalance: largest over smallest class.

  Raises:
    ValueError: a class has too few images.

  Source: LDAM-DRW (Cao et al. 2019), `imbalance_cifar.py`.
  """
  num_classes = int(labels.max()) + 1
  # The published selection is drawn by the legacy generator.
  rng = np.random.RandomState(0)
  kept = []
  for label, size in enumerate(tail_sizes(num_classes, imbalance)):
    members = np.flatnonzero(labels == label)
    if len(members) < size:
      raise ValueError(
        f"class {label} has {len(members)} images, the long tail needs {size} of it; "
        f"is this the whole training set?"
      )
    rng.shuffle(members)
    kept.append(members[:size])
  return np.concatenate(kept)


def tfds_order(split: str, keys: Sequence[int | str]) -> list[int]:
  """Returns the positions of keys in the order in which TFDS stores a split.

  TFDS sorts the examples of a split by the md5 of its name and each example's key,
  whatever the number of shards. For sets whose keys are the row numbers of the
  original files this tells which rows a slice holds, without any data.

  Args:
    split: name of the split, "train".
    keys: of its examples, in the order of the original files.
  """
  digests = [hashlib.md5(f"{split}{key}".encode()).digest() for key in keys]
  return sorted(range(len(keys)), key=lambda i: digests[i])
