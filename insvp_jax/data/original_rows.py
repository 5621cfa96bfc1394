"""Which rows of the original files a task's images are, told without any data.

TFDS orders the examples of a split by a hash of their keys, and some data sets have
keys that are made of the row number. So the splits of VTAB-1k can be made from a data
set's own files, without TFDS.
"""

import functools
import re

from insvp_jax.data import downloads, subsets
from insvp_jax.data.tasks import TASKS, Task

SPLITS = ("train", "val", "test")
_SLICE = re.compile(r"(\w+)(?:\[(\d+)?(%)?:(\d+)?(%)?\])?")


def rows(task: Task, split: str, subset: str = "") -> tuple[str, list[int]]:
  """Returns the rows of a split, in its order.

  Args:
    task: one whose keys are made of row numbers.
    split: "train", "val" or "test".
    subset: as `config.data.subset`.

  Returns:
    TFDS's name of the original split, and row numbers in it, from 0.

  Raises:
    ValueError: the keys are no row numbers, or the split is drawn by labels.
  """
  if task.name not in known():
    raise ValueError(
      f"TFDS orders the images of {task.name} by names of files, not by row numbers; "
      f"row numbers are known for {', '.join(known())}."
    )
  chosen = task.subset(subset)
  if split == "test" or chosen.rule == "slices":
    return _slice(downloads.builder_name(task), getattr(task, split))
  if chosen.rule != "first":
    drawn = [name for name, other in task.subsets.items() if other.rule == "first"]
    instead = f", or choose --subset={drawn[0]}" if drawn else ""
    raise ValueError(
      f"the {split} split of {task.name} is drawn by the images' labels, which takes "
      f"the data; ask for --split test{instead}."
    )
  size, _ = downloads.builder(task).keys[task.train]
  num_train = size * chosen.train // (chosen.train + chosen.val)
  part = range(num_train) if split == "train" else range(num_train, size)
  return task.train, list(part)


def known() -> list[str]:
  """Returns the names of the tasks whose rows are known."""
  return [task.name for task in TASKS.values() if downloads.builder(task).keys]


def _slice(name: str, expression: str) -> tuple[str, list[int]]:
  """Returns the rows of a TFDS expression such as "test[50%:]"."""
  match = _SLICE.fullmatch(expression)
  if match is None:
    raise ValueError(f"expected one slice of one split, got {expression!r}.")
  source, start, start_percent, stop, stop_percent = match.groups()
  order = _order(name, source)

  def bound(number: str | None, percent: str | None, default: int) -> int:
    if number is None:
      return default
    return round(int(number) * len(order) / 100) if percent else int(number)

  first = bound(start, start_percent, 0)
  last = bound(stop, stop_percent, len(order))
  return source, list(order[first:last])


@functools.lru_cache(maxsize=4)
def _order(name: str, source: str) -> tuple[int, ...]:
  size, form = downloads.BUILDERS[name].keys[source]
  return tuple(subsets.tfds_order(source, [form.format(i) for i in range(size)]))
