"""Data: from a task's name to batches on the devices.

The way of one image of a `.zip`, from `load_data` to the batch on the device:

1. `load_data` (here) calls `load` of a module in `sources`: for one's own images
   `image_folder`, which finds splits and classes in the names of the archive's files,
   or in a CSV (`labels_csv`); `image_kinds` says which of them are images.
2. `image_files.ImageFiles`, names and labels of a split's files, gives a
   `splits.StreamSplit`, which decodes images in any order while it is read: in threads
   (`prefetch`), `folder_or_zip` reads the bytes in place, `decode` makes RGB pixels of
   them, and `preprocess.resize` makes the stored square, uint8.
3. `load_or_stream` decides by `data.resident_mb`: a small split is decoded whole into a
   `splits.ArraySplit` and kept on disk by `cache` (by `image_folder` itself, which then
   draws the splits that are missing); a large one stays a stream.
4. `pipeline.train_batches` puts an `ArraySplit` on the devices once (`resident`), where
   each step selects, crops and flips its rows. Of a stream the host reads each batch's
   rows ahead, crops and flips them and puts them on the devices.
5. The train step normalises pixels on the device (`preprocess.normalise`).

Images with masks (`sources.segment_folder`) are a `masks.MaskSplit`, always streamed:
`mask_batches` crops both at random, on the host.

With `data.shots`, `load_data` at last keeps so many training images of each class, with
`data.fraction` that share of them.

Images that were given in Python (`memory`) have no files: 1 and 2 are a list of them.
A task of TFDS differs in 1 and 2: `sources.tfds` finds records and labels
(`tfrecords`), divides them (`subsets`, `vpt_lists`) and decodes them (`tfds_stream`).
`downloads`, `availability` and `original_rows` serve the tool `prepare_data`.
"""

from collections.abc import Callable
import dataclasses

import ml_collections

from insvp_jax import trees
from insvp_jax.data import load_or_stream
from insvp_jax.data.preprocess import DEFAULT_PRESET, get_preset
from insvp_jax.data.sources import (
  cifar_npz,
  digits,
  fgvc_folder,
  gtsrb,
  image_folder,
  memory,
  segment_folder,
  tfds,
  vtab_folder,
)
from insvp_jax.data.splits import ArraySplit, Split, StreamSplit, TaskData
from insvp_jax.data.subsets import draw_fraction, draw_shots
from insvp_jax.data.tasks import GROUPS, TASKS, Task

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

# The lists of files of one's own images, in the workdir of a run.
SPLITS_FILE = "splits.json"
# Prints the table of tasks.
LIST_COMMAND = "insvp prepare --list"
# Tasks that are no rows of `TASKS`, and how they are loaded.
OTHER_TASKS: dict[str, Callable[[ml_collections.ConfigDict, int], TaskData]] = {
  "folder": image_folder.load,
  "segment_folder": segment_folder.load,
  "digits": digits.load,
  "cifar10_npz": cifar_npz.load,
}
# How a row of `TASKS` is loaded where config.data.root names its image files, by
# `Task.folder_format`.
_FOLDER_FORMATS: dict[
  str, Callable[[Task, ml_collections.ConfigDict, int], TaskData]
] = {
  "noah": vtab_folder.load,
  "lists": fgvc_folder.load,
  "gtsrb": gtsrb.load,
}


def load_data(
  task: str,
  data_config: ml_collections.ConfigDict,
  image_size: int,
  load: Callable[[ml_collections.ConfigDict, int], TaskData] | None = None,
) -> TaskData:
  """Opens the splits of a task, with images resized to the preset's stored size.

  Small splits are decoded into memory; large ones are decoded as they are read.

  Args:
    task: "folder" (one's own images), "segment_folder" (with masks), "digits"
      (scikit-learn's), "cifar10_npz", or a name in `tasks.TASKS`, which is read from
      TFDS, or from image files where `data_config.root` names them.
    data_config: the section config.data. An empty preset is the default one: which
      weights' pixels it should follow is not known here.
    image_size: side of the model's input in pixels.
    load: reads the images in place of what the task's name stands for.

  Raises:
    ValueError: if the task or the preset is unknown, or the data contradict themselves.
    FileNotFoundError: if the data are not there; the message says what to do.
  """
  if task in GROUPS:
    raise ValueError(
      f"{task!r} stands for {len(GROUPS[task])} tasks, expected one of them, such as "
      f"{GROUPS[task][0]!r}; all of them: {LIST_COMMAND} --task={task}."
    )
  if load is None:
    if task == memory.TASK:
      memory.refuse()
    trees.lookup({**TASKS, **OTHER_TASKS}, task, "task", LIST_COMMAND)
  if not data_config.preset:
    data_config = data_config.copy_and_resolve_references()
    data_config.preset = DEFAULT_PRESET
  get_preset(data_config.preset)
  if image_size < 1:
    raise ValueError(f"image_size has to be positive, got {image_size}.")
  if data_config.get("labels") and task != "folder":
    raise ValueError(
      f"config.data.labels is {data_config.labels}, but the task {task} has labels of "
      "its own; expected the task folder, e.g. --config=folder."
    )
  if load is None:
    data = _load(task, data_config, image_size)
  else:
    data = load(data_config, image_size)
  return _with_fewer_images(data, data_config)


def _load(
  task: str, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Returns all images of a task that there is."""
  if task in OTHER_TASKS:
    return OTHER_TASKS[task](data_config, image_size)
  row = TASKS[task]
  if not data_config.root:
    return tfds.load(row, data_config, image_size)
  if not row.folder_format:
    raise ValueError(
      f"config.data.root is {data_config.root!r}, but {task} is read from TFDS only; "
      f"leave data.root empty and point data.data_dir to TFDS's folder."
    )
  return _FOLDER_FORMATS[row.folder_format](row, data_config, image_size)


def _with_fewer_images(
  data: TaskData, data_config: ml_collections.ConfigDict
) -> TaskData:
  """Returns the task with `shots`, or the share `fraction`, of each class's images.

  They are drawn from train by `split_seed`. Val and test stay as they are, and so that
  no model sees more than these images, the final one trains on train alone: there is
  no train_val.

  Args:
    data: the whole task.
    data_config: the section config.data.

  Raises:
    ValueError: a class has not so many images.
  """
  shots, fraction = data_config.get("shots", 0), data_config.get("fraction", 1.0)
  if not shots and fraction == 1:
    return data
  train, seed = data.splits["train"], data_config.split_seed
  if shots:
    kept = f"{shots} training images of each class"
    chosen = draw_shots(train.labels, shots, seed, data.class_names)
  else:
    kept = f"{100 * fraction:g}% of the training images of each class"
    chosen = draw_fraction(train.labels, fraction, seed, data.num_classes)
  train = train.take(chosen)
  if isinstance(train, StreamSplit):
    # So few may fit into memory.
    preset = get_preset(data_config.preset)
    train = load_or_stream.load_or_stream(train, data_config, preset, trains=True)
  replaced = ("train", "train_val")
  others = {n: split for n, split in data.splits.items() if n not in replaced}
  files = dict(data.files)
  if "train" in files:
    names, labels = files["train"]
    files["train"] = ([names[i] for i in chosen], labels[chosen])
  return dataclasses.replace(
    data,
    splits={"train": train, **others},
    source=f"{data.source}, {kept}",
    final_split="train",
    files=files,
  )


def check_data(
  task: str, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Does all of `load_data` except decoding images, and returns the data as streams.

  A suite checks all of its tasks so, before it trains the first.

  Args:
    task: as for `load_data`.
    data_config: as for `load_data`.
    image_size: as for `load_data`.

  Raises:
    ValueError: as `load_data`.
    FileNotFoundError: as `load_data`.
  """
  streamed = data_config.copy_and_resolve_references()
  streamed.resident_mb = 0
  return load_data(task, streamed, image_size)
