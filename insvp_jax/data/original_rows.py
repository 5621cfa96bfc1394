"""Which rows of a data set's original files a split consists of, told without data.

TFDS orders the examples of a split by a hash of their keys, and some data sets have
keys that are made of the row number. For these the splits of VTAB-1k can be made from
the original files, without TFDS. `tools.prepare_data --list-indices` prints them.
"""

from collections.abc import Sequence
import functools
import hashlib
import re

from insvp_jax.data import downloads
from insvp_jax.data.tasks import TASKS, Task

SPLITS = ("train", "val", "test")
# A TFDS expression of one split or one slice of it: "train", "train[:800]",
# "test[50%:]".
_SLICE = re.compile(r"(\w+)(?:\[(\d+)?(%)?:(\d+)?(%)?\])?")


def tfds_order(split: str, keys: Sequence[int | str]) -> list[int]:
  """Returns the positions of keys in the order in which TFDS stores a split.

  TFDS sorts the examples of a split by the md5 of its name and each example's key,
  whatever the number of shards.

  Args:
    split: TFDS's name of the split, e.g. "train".
    keys: keys of its examples, in the order of the original files.
  """
  digests = [
    hashlib.md5(f"{split}{key}".encode(), usedforsecurity=False).digest()
    for key in keys
  ]
  return sorted(range(len(keys)), key=lambda i: digests[i])


def rows_of_split(task: Task, split: str, subset: str = "") -> tuple[str, list[int]]:
  """Returns the rows of the original files that a split consists of, in its order.

  Args:
    task: a task whose keys are made of row numbers (`tasks_with_rows`).
    split: "train", "val" or "test".
    subset: the choice of training images, as `config.data.subset`.

  Returns:
    TFDS's name of the original split, and row numbers in it, from 0.

  Raises:
    ValueError: if the keys are no row numbers, or the split is drawn by labels.
  """
  if task.name not in tasks_with_rows():
    raise ValueError(
      f"TFDS orders the images of {task.name} by names of files, not by row numbers; "
      f"row numbers are known for {', '.join(tasks_with_rows())}."
    )
  chosen = task.subset(subset)
  if split == "test" or chosen.rule == "slices":
    return _rows_of_slice(downloads.builder_name(task), getattr(task, split))
  if chosen.rule != "first":
    by_order = [name for name, other in task.subsets.items() if other.rule == "first"]
    instead = f", or choose --subset={by_order[0]}" if by_order else ""
    raise ValueError(
      f"the {split} split of {task.name} is drawn by the images' labels, which takes "
      f"the data; ask for --split test{instead}."
    )
  # The rule "first" speaks of the original files' order, so no hash is needed.
  size, _ = downloads.requirements(task).keys[task.train]
  num_train = size * chosen.train // (chosen.train + chosen.val)
  part = range(num_train) if split == "train" else range(num_train, size)
  return task.train, list(part)


def tasks_with_rows() -> list[str]:
  """Returns the names of the tasks whose keys are made of row numbers."""
  return [task.name for task in TASKS.values() if downloads.requirements(task).keys]


def _rows_of_slice(builder_name: str, expression: str) -> tuple[str, list[int]]:
  """Returns (original split, rows) of a TFDS expression such as "test[50%:]"."""
  match = _SLICE.fullmatch(expression)
  if match is None:
    raise ValueError(f"expected one slice of one split, got {expression!r}.")
  split, start, start_percent, stop, stop_percent = match.groups()
  order = _split_order(builder_name, split)

  def bound(number: str | None, percent: str | None, default: int) -> int:
    if number is None:
      return default
    # TFDS rounds percentages to the closest example, too.
    return round(int(number) * len(order) / 100) if percent else int(number)

  first = bound(start, start_percent, 0)
  last = bound(stop, stop_percent, len(order))
  return split, list(order[first:last])


# Hashing 700,000 keys takes a second, and train and val often lie in one split.
@functools.lru_cache(maxsize=4)
def _split_order(builder_name: str, split: str) -> tuple[int, ...]:
  """Returns the rows of an original split in TFDS's order."""
  size, key_format = downloads.REQUIREMENTS[builder_name].keys[split]
  return tuple(tfds_order(split, [key_format.format(i) for i in range(size)]))
