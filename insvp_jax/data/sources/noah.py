"""VTAB-1k as folders of images: the form that NOAH's download script made common.

Beside `images/` lie train800.txt, val200.txt, train800val200.txt and test.txt, each
with one "<path> <label>" per line, the path from this folder.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath

import ml_collections
import numpy as np

from insvp_jax.data import files, image_lists
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.image_lists import ImageList
from insvp_jax.data.labels import LABEL_RULES
from insvp_jax.data.tasks import Task

_FILES = {
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
    task: a row of the table.
    data_config: `root` is the task's folder, or the one with a folder for each task
      (`cifar`, `clevr_dist`, ...); archives work too.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: an index file, or a file that one names, is not there.
    ValueError: an index file is malformed, names an image twice, or shares one with
      another split; train800val200 is not the two together.
  """
  with files.open_root(data_config.root) as root:
    base = _base(task, root)
    rows = {
      split: _read(root, base + file, task.num_classes)
      for split, file in _FILES.items()
    }
    _check(rows, root, base)
    lists = {}
    for split in ("train", "val", "test"):
      found = [base + name for name in rows[split]]
      image_lists.check_files(root, found, root.describe(base + _FILES[split]))
      labels = np.array(list(rows[split].values()), np.int32)
      lists[split] = ImageList(data_config.root, found, labels)
  class_names = LABEL_RULES[task.label_rule].class_names
  if class_names is None:
    class_names = [f"class {i}" for i in range(task.num_classes)]
  return image_lists.task_data(task, lists, class_names, data_config, image_size)


def _base(task: Task, root: files.Root) -> str:
  """Returns the prefix of the folder with the index files."""
  tried = ("", f"{task.folder_name}/", f"{task.name}/")
  for base in (*tried, *(f"{root.name}/{inner}" for inner in tried)):
    if root.sizes([base + _FILES["test"]]) != [-1]:
      return base
  raise FileNotFoundError(
    f"config.data.root: {root.path} holds neither {_FILES['test']} nor a folder "
    f"{task.folder_name} with it; expected {', '.join(_FILES.values())} beside "
    f"images/. Leave data.root empty to read {task.name} from TFDS."
  )


def _read(root: files.Root, file: str, num_classes: int) -> dict[str, int]:
  """Returns {path: label} of one index file, in its order."""
  where = root.describe(file)
  if root.sizes([file]) == [-1]:
    raise FileNotFoundError(f"no index file {where}; copy the folder anew.")
  rows: dict[str, int] = {}
  for number, line in enumerate(image_lists.read_text(root, file).splitlines(), 1):
    if not line.strip():
      continue
    path, _, text = line.strip().rpartition(" ")
    label = image_lists.class_index(text, num_classes)
    if not path or label is None:
      raise ValueError(
        f"line {number} of {where} is {line!r}, expected an image's path, a space and "
        f"its label, 0 to {num_classes - 1}; mend it or copy the file anew."
      )
    # Some lists write ./images/0.jpg.
    path = str(PurePosixPath(path.strip()))
    if path in rows:
      raise ValueError(
        f"line {number} of {where} names {path} again; take one of its lines out."
      )
    rows[path] = label
  if not rows:
    raise ValueError(f"{where} names no image; copy it anew.")
  return rows


def _check(rows: Mapping[str, Mapping[str, int]], root: files.Root, base: str) -> None:
  """Checks that the splits are apart, and that train_val is train and val."""

  def where(split: str) -> str:
    return root.describe(base + _FILES[split])

  for first, second in (("train", "val"), ("train_val", "test")):
    if shared := sorted(set(rows[first]) & set(rows[second])):
      raise ValueError(
        f"{where(first)} and {where(second)} share {len(shared)} images, first "
        f"{shared[0]}; an image belongs to one split. Copy the index files anew."
      )
  both = {**rows["train"], **rows["val"]}
  if both != rows["train_val"]:
    different = sorted(set(both.items()) ^ set(rows["train_val"].items()))
    raise ValueError(
      f"{where('train_val')} is not {_FILES['train']} and {_FILES['val']} together: "
      f"{different[0][0]} differs; copy the index files anew."
    )
