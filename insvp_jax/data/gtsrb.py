"""GTSRB, German traffic signs, as torchvision unpacks it.

Below the root: `GTSRB/Training/<class>/*.ppm`, `GTSRB/Final_Test/Images/*.ppm` and
`GT-final_test.csv`. TFDS has only a copy whose test labels are missing.
"""

import csv
import io

import ml_collections
import numpy as np

from insvp_jax.data import files, image_lists, subsets
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.image_lists import ImageList
from insvp_jax.data.tasks import Task

_TRAIN, _TEST = "GTSRB/Training/", "GTSRB/Final_Test/Images/"
_TEST_LABELS = "GT-final_test.csv"


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads GTSRB; train and val are drawn as the subset says.

  Args:
    task: its row of the table.
    data_config: `root` is the folder named above, or the one around it (`gtsrb/`);
      `subset` and `split_seed` as in `config`.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: a part of the layout is missing.
    ValueError: the list of test labels is malformed.
  """
  with files.open_root(data_config.root) as root:
    names, _ = root.entries()
    bases = ("", f"{task.folder_name}/")
    found = [base for base in bases if f"{base}{_TEST_LABELS}" in set(names)]
    train = {
      base: sorted(
        name
        for name in names
        if name.startswith(base + _TRAIN) and name.lower().endswith((".ppm", ".png"))
      )
      for base in found
    }
    if not found or not train[found[0]]:
      raise FileNotFoundError(
        f"config.data.root: {root.path} is not GTSRB as torchvision unpacks it; "
        f"expected {_TRAIN}<class>/*.ppm, {_TEST}*.ppm and {_TEST_LABELS}."
      )
    base = found[0]
    test = _test(root, base, data_config.root)
    everything = _train(train[base], base, data_config.root, task.num_classes)
  subset = task.subset(data_config.subset)
  chosen = subsets.draw(
    task, subset, everything.labels, everything.names, data_config.split_seed
  )
  lists = {
    "train": everything.take(chosen[0]),
    "val": everything.take(chosen[1]),
    "test": test,
  }
  class_names = [f"{i:05d}" for i in range(task.num_classes)]
  return image_lists.task_data(task, lists, class_names, data_config, image_size)


def _train(names: list[str], base: str, root: str, num_classes: int) -> ImageList:
  folders = [name[len(base + _TRAIN) :].split("/")[0] for name in names]
  known = [f"{i:05d}" for i in range(num_classes)]
  if odd := sorted(set(folders) - set(known)):
    raise ValueError(
      f"{root}/{base}{_TRAIN} holds the folder {odd[0]!r}, expected {known[0]} to "
      f"{known[-1]}."
    )
  return ImageList(root, names, np.array([int(f) for f in folders], np.int32))


def _test(root: files.Root, base: str, path: str) -> ImageList:
  where = root.describe(base + _TEST_LABELS)
  text = root.read(base + _TEST_LABELS).decode()
  names, labels = [], []
  for row in csv.DictReader(io.StringIO(text), delimiter=";"):
    if row.get("Filename") is None or not str(row.get("ClassId", "")).isdigit():
      raise ValueError(
        f"{where} has the row {row}, expected columns Filename and ClassId between "
        f"semicolons."
      )
    names.append(f"{base}{_TEST}{row['Filename']}")
    labels.append(int(row["ClassId"]))
  if not names:
    raise ValueError(f"{where} names no image; copy it anew.")
  image_lists.check_files(root, names, where)
  return ImageList(path, names, np.array(labels, np.int32))
