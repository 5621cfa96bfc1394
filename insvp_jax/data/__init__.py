"""Data: from a task's name to splits that can be trained and evaluated on."""

from collections.abc import Callable
from typing import Any

import ml_collections

from insvp_jax import trees
from insvp_jax.data.arrays import ArraySplit, TaskData
from insvp_jax.data.preprocess import get_preset
from insvp_jax.data.sources import cifar_npz, digits, folder, gtsrb, listed, noah, tfds
from insvp_jax.data.splits import Split, StreamSplit
from insvp_jax.data.tasks import GROUPS, TASKS

__all__ = [
  "GROUPS",
  "TASKS",
  "ArraySplit",
  "Split",
  "StreamSplit",
  "TaskData",
  "check_data",
  "load_data",
]

# Tasks that are no row of `TASKS`.
_SOURCES: dict[str, Callable[[ml_collections.ConfigDict, int], TaskData]] = {
  "folder": folder.load,
  "digits": digits.load,
  "cifar10_npz": cifar_npz.load,
}
# How a row of `TASKS` is read where config.data.root names its files.
_FOLDERS: dict[str, Callable[[Any, ml_collections.ConfigDict, int], TaskData]] = {
  "noah": noah.load,
  "lists": listed.load,
  "gtsrb": gtsrb.load,
}


def load_data(
  task: str, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Opens a task: split, resized to the preset's stored size.

  Small splits are decoded into memory, large ones are decoded as they are read.

  Args:
    task: "folder" (one's own images), "digits" (scikit-learn's), "cifar10_npz"
      or a name in `tasks.TASKS`, which is read from TFDS, or from image files where
      `data_config.root` names them.
    data_config: the section config.data.
    image_size: side of the model's input in pixels.

  Raises:
    ValueError: unknown task or preset, or data that contradict themselves.
    FileNotFoundError: the data are not there; the message says what to do.
  """
  if task in GROUPS:
    raise ValueError(
      f"{task!r} stands for {len(GROUPS[task])} tasks, expected one of them: "
      f"{', '.join(GROUPS[task])}."
    )
  source = trees.lookup({**TASKS, **_SOURCES}, task, "task")
  get_preset(data_config.preset)
  if image_size < 1:
    raise ValueError(f"image_size has to be positive, got {image_size}.")
  if task not in TASKS:
    return source(data_config, image_size)
  if not data_config.root:
    return tfds.load(source, data_config, image_size)
  if not source.folder:
    raise ValueError(
      f"config.data.root is {data_config.root!r}, but {task} is read from TFDS only; "
      f"leave data.root empty and point data.data_dir to TFDS's folder."
    )
  return _FOLDERS[source.folder](source, data_config, image_size)


def check_data(
  task: str, data_config: ml_collections.ConfigDict, image_size: int
) -> None:
  """Does all of `load_data` but decoding images: for many tasks before the first.

  Raises:
    ValueError, FileNotFoundError: as `load_data`.
  """
  unread = data_config.copy_and_resolve_references()
  unread.resident_mb = 0
  load_data(task, unread, image_size)
