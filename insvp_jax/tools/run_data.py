"""The data of a finished run, read again: matched by class name, compared by digest.

A run's columns belong to its class names. Data that are read later may have other
classes, or the same ones in another order, so nothing here pairs labels by position.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from insvp_jax import config as config_lib
from insvp_jax.data import SPLITS_FILE, TaskData, load_data, preprocess, splits
from insvp_jax.data.label_maps import IGNORED


@dataclasses.dataclass(frozen=True)
class RunData:
  """Splits whose labels are a run's.

  Attributes:
    data: as it was read; its labels count its own classes.
    columns: for each class of the data its column in the run's probabilities.
  """

  data: TaskData
  columns: np.ndarray

  def labels(self, split: str) -> np.ndarray:
    """Returns the run's columns of the examples of a split, int [n]."""
    return self.columns[self.data.splits[split].labels]


def read(run: Any, root: str = "") -> RunData:
  """Reads the data of a run's task again, or another folder of its classes.

  Of one's own images the splits are those of the run, file by file, whatever has been
  added since. A line on standard error says so where images or labels are not those of
  the run any more.

  Args:
    run: from `load_run`.
    root: another folder or .zip; "" for the run's own data, where they were.

  Raises:
    ValueError, FileNotFoundError: the data cannot be read, or they have a class that
      the run has not, or splits that may hold what the run was trained on.
  """
  config = run.meta["config"]
  data_config = config_lib.defaults().data
  section = config.get("data") or {}
  data_config.update({key: x for key, x in section.items() if key in data_config})
  if data_config.cache_dir:
    # A run says where its data were, not where a reader's machine is written to.
    data_config.cache_dir = "off"
  task, stored = config.get("task") or "", run.workdir / SPLITS_FILE
  if root:
    task = "segment_folder" if run.segments else "folder"
    data_config.root = root
    data_config.labels = data_config.splits_json = ""
    data_config.val_fraction = data_config.test_fraction = 0.0
    data_config.shots, data_config.fraction = 0, 1.0
  elif task == "folder" and stored.is_file():
    data_config.splits_json = str(stored)
    # The list has the share of the training images already.
    data_config.fraction = 1.0
  data = load_data(task, data_config, run.model.input_size)
  columns = _columns(data, run.class_names)
  if not root:
    read_by_run = {data_config.train_split, "val", "test"}
    # A run that was not tested has not read test.
    digests = (data.digest(names) for names in (read_by_run, read_by_run - {"test"}))
    if run.meta.get("data_sha256") not in digests:
      is_own = task in ("folder", "segment_folder")
      _tell(data, is_drawn=is_own and not data_config.splits_json)
  return RunData(data, columns)


def _columns(data: TaskData, class_names: tuple[str, ...]) -> np.ndarray:
  """Returns the column of each class of the data, by its name."""
  unknown = [name for name in data.class_names if name not in class_names]
  if unknown:
    shown = ", ".join(map(repr, class_names[:10]))
    more = f" and {len(class_names) - 10} more" if len(class_names) > 10 else ""
    raise ValueError(
      f"{data.source or data.name} have the class {unknown[0]!r}, which the run does "
      f"not know; it was trained on {shown}{more}. Name the classes as then."
    )
  return np.array([class_names.index(name) for name in data.class_names], np.int32)


def _tell(data: TaskData, *, is_drawn: bool) -> None:
  """Says in one line that the data are not those of the run.

  Args:
    data: read again.
    is_drawn: whether splits were drawn anew, so that they depend on all files.

  Raises:
    ValueError: they were drawn.
  """
  changed = f"images or labels of {data.source or data.name} are not those of the run"
  if is_drawn:
    raise ValueError(
      f"{changed}, which has no {SPLITS_FILE}: splits that are drawn anew may put what "
      "it was trained on into test. Restore the images, or score a folder of others "
      "with --root."
    )
  print(f"note: {changed}; what follows is about those of now", file=sys.stderr)


def _sample(data: TaskData, count: int, seed: int) -> tuple[Any, np.ndarray]:
  """Returns the split that images are shown of, and some positions in it."""
  name = next(name for name in ("test", "val", "train") if name in data.splits)
  split = data.splits[name]
  return split, np.random.default_rng(seed).permutation(len(split))[:count]


def sample_pairs(
  run: Any, count: int, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Returns random test images of a segmenter's task, with the classes of their pixels.

  Args:
    run: from `load_run`, of segmentation; its data have to be where they were.
    count: how many images, drawn without replacement.
    seed: of the draw.

  Returns:
    uint8 images [h, w, 3], and of each int16 [h, w], the run's classes. They are of the
    splits that `sample_images` are of.

  Raises:
    ValueError, FileNotFoundError: as `read`.
  """
  found = read(run)
  split, indices = _sample(found.data, count, seed)
  pairs = list(split.take(np.sort(indices)).pairs(range(len(indices))))
  columns = found.columns.astype(np.int16)
  masks = [np.where(m == IGNORED, np.int16(IGNORED), columns[m]) for _, m in pairs]
  return [image for image, _ in pairs], masks


def sample_images(run: Any, count: int, seed: int = 0) -> tuple[Any, list[str]]:
  """Returns random test images of the run's task, with their class names.

  Args:
    run: from `load_run`; its data have to be where they were.
    count: how many images, drawn without replacement.
    seed: of the draw.

  Returns:
    uint8 images [b, h, w, 3], `Resized`, and the names of their classes. They are of
    the split "test" or, in a task without one, of "val" or "train".

  Raises:
    ValueError, FileNotFoundError: as `read`.
  """
  data = read(run).data
  split, indices = _sample(data, count, seed)
  sample = splits.to_memory(split, indices)
  images = sample.images.view(preprocess.Resized)
  return images, [data.class_names[label] for label in sample.labels]
