"""VTAB-1k as folders of images: the form that NOAH's download script made common.

Beside `images/` lie train800.txt, val200.txt, train800val200.txt and test.txt. Each has
one line "<path> <label>" per image, with the path from this folder.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath

import ml_collections
import numpy as np

from insvp_jax.data import image_files
from insvp_jax.data.folder_or_zip import FileTree, open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.labels import LABEL_RULES
from insvp_jax.data.splits import TaskData
from insvp_jax.data.tasks import Task

_INDEX_FILES = {
  "train": "train800.txt",
  "val": "val200.txt",
  "train_val": "train800val200.txt",
  "test": "test.txt",
}


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a task of VTAB-1k from image files.

  Args:
    task: a row of `tasks.TASKS`.
    data_config: the section config.data; `root` is the task's folder, or the one with a
      folder for each task (`cifar`, `clevr_dist`, ...), or an archive of either.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: if an index file, or a file that one names, is not there.
    ValueError: if an index file is malformed, names an image twice, or shares one with
      another split; or if train800val200 is not the two together.
  """
  with open_folder_or_zip(data_config.root) as root:
    prefix = _task_prefix(task, root)
    labels = {
      split: _read_index(root, prefix + file, task.num_classes)
      for split, file in _INDEX_FILES.items()
    }
    _check_splits(labels, root, prefix)
    lists = {}
    # train_val is made of train and val, so that their orders agree.
    for split in ("train", "val", "test"):
      names = [prefix + path for path in labels[split]]
      index = root.full_path(prefix + _INDEX_FILES[split])
      image_files.check_listed_files(root, names, index)
      split_labels = np.array(list(labels[split].values()), np.int32)
      lists[split] = ImageFiles(data_config.root, names, split_labels)
  class_names = LABEL_RULES[task.label_rule].class_names
  # Index files have numbers only.
  if class_names is None:
    class_names = [f"class {i}" for i in range(task.num_classes)]
  return image_files.task_data(task, lists, class_names, data_config, image_size)


def _task_prefix(task: Task, root: FileTree) -> str:
  """Returns the prefix of the folder with the task's index files."""
  inner = ("", f"{task.folder_name}/", f"{task.name}/")
  # An archive often holds a folder of its own name around everything.
  for prefix in (*inner, *(f"{root.name}/{folder}" for folder in inner)):
    if root.sizes([prefix + _INDEX_FILES["test"]]) != [-1]:
      return prefix
  raise FileNotFoundError(
    f"config.data.root: {root.path} holds neither {_INDEX_FILES['test']} nor a folder "
    f"{task.folder_name} with it; expected {', '.join(_INDEX_FILES.values())} beside "
    f"images/. Leave data.root empty to read {task.name} from TFDS."
  )


def _read_index(root: FileTree, file: str, num_classes: int) -> dict[str, int]:
  """Returns {path: label} of one index file, in the order of its lines."""
  where = root.full_path(file)
  if root.sizes([file]) == [-1]:
    raise FileNotFoundError(f"no index file {where}; copy the folder anew.")
  labels: dict[str, int] = {}
  for number, line in enumerate(image_files.read_text(root, file).splitlines(), 1):
    if not line.strip():
      continue
    # From the right: a path may hold spaces.
    path, _, text = line.strip().rpartition(" ")
    label = image_files.parse_class_index(text, num_classes)
    if not path or label is None:
      raise ValueError(
        f"line {number} of {where} is {line!r}, expected an image's path, a space and "
        f"its label, 0 to {num_classes - 1}; mend it or copy the file anew."
      )
    # Some lists write ./images/0.jpg.
    path = str(PurePosixPath(path.strip()))
    if path in labels:
      raise ValueError(
        f"line {number} of {where} names {path} again; take one of its lines out."
      )
    labels[path] = label
  if not labels:
    raise ValueError(f"{where} names no image; copy it anew.")
  return labels


def _check_splits(
  labels: Mapping[str, Mapping[str, int]], root: FileTree, prefix: str
) -> None:
  """Checks that splits share no image, and that train_val is train and val."""

  def where(split: str) -> str:
    return root.full_path(prefix + _INDEX_FILES[split])

  for first, second in (("train", "val"), ("train_val", "test")):
    if shared := sorted(set(labels[first]) & set(labels[second])):
      raise ValueError(
        f"{where(first)} and {where(second)} share {len(shared)} images, first "
        f"{shared[0]}; an image belongs to one split. Copy the index files anew."
      )
  both = {**labels["train"], **labels["val"]}
  if both != labels["train_val"]:
    different = sorted(set(both.items()) ^ set(labels["train_val"].items()))
    raise ValueError(
      f"{where('train_val')} is not {_INDEX_FILES['train']} and {_INDEX_FILES['val']} "
      f"together: {different[0][0]} differs; copy the index files anew."
    )
