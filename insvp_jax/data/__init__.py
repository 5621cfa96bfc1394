"""Data: from a task's name to uint8 arrays in memory."""

from collections.abc import Callable

import ml_collections

from insvp_jax import trees
from insvp_jax.data import cifar_npz, digits, folder, tfds_source
from insvp_jax.data.arrays import ArraySplit, TaskData
from insvp_jax.data.preprocess import get_preset
from insvp_jax.data.tasks import TASKS

__all__ = ["ArraySplit", "TaskData", "load_data"]

# Tasks that are no row of `TASKS`.
_SOURCES: dict[str, Callable[[ml_collections.ConfigDict, int], TaskData]] = {
  "folder": folder.load,
  "digits": digits.load,
  "cifar10_npz": cifar_npz.load,
}


def load_data(
  task: str, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a task: decoded, resized to the preset's stored size, split.

  Args:
    task: "folder" (one's own images), "digits" (scikit-learn's), "cifar10_npz"
      or a name in `tasks.TASKS`.
    data_config: the section config.data.
    image_size: side of the model's input in pixels.

  Raises:
    ValueError: unknown task or preset, or data that contradict themselves.
    FileNotFoundError: the data are not there; the message says what to do.
  """
  source = trees.lookup({**TASKS, **_SOURCES}, task, "task")
  get_preset(data_config.preset)
  if image_size < 1:
    raise ValueError(f"image_size has to be positive, got {image_size}.")
  if task in TASKS:
    return tfds_source.load(source, data_config, image_size)
  return source(data_config, image_size)
