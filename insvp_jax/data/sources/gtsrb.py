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
    base = _base(task, root)
    test = _test(root, base, data_config.root, task.num_classes)
    everything = _train(root, base, data_config.root, task.num_classes)
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


def _base(task: Task, root: files.Root) -> str:
  """Returns the prefix of the folder with the list of test labels."""
  for base in ("", f"{task.folder_name}/"):
    if root.sizes([base + _TEST_LABELS]) != [-1]:
      return base
  raise FileNotFoundError(
    f"config.data.root: {root.path} is not GTSRB as torchvision unpacks it: no "
    f"{_TEST_LABELS} there or in {task.folder_name}/; expected it beside "
    f"{_TRAIN}<class>/*.ppm and {_TEST}*.ppm."
  )


def _train(root: files.Root, base: str, path: str, num_classes: int) -> ImageList:
  inside = base + _TRAIN
  names = sorted(
    name
    for name in root.entries()[0]
    if name.startswith(inside) and name.lower().endswith((".ppm", ".png"))
  )
  if not names:
    raise FileNotFoundError(
      f"{root.describe(inside)} holds no images, expected <class>/*.ppm; unpack "
      f"GTSRB-Training_fixed.zip there."
    )
  label_of = {f"{i:05d}": i for i in range(num_classes)}
  folders = [name[len(inside) :].split("/")[0] for name in names]
  if odd := sorted(set(folders) - set(label_of)):
    raise ValueError(
      f"{root.describe(inside)} holds {odd[0]!r}, expected the folders 00000 to "
      f"{num_classes - 1:05d}; move it away."
    )
  return ImageList(path, names, np.array([label_of[f] for f in folders], np.int32))


def _test(root: files.Root, base: str, path: str, num_classes: int) -> ImageList:
  where = root.describe(base + _TEST_LABELS)
  rows: dict[str, int] = {}
  text = image_lists.read_text(root, base + _TEST_LABELS)
  for row in csv.DictReader(io.StringIO(text), delimiter=";"):
    name, label = row.get("Filename"), row.get("ClassId")
    index = image_lists.class_index(label, num_classes)
    if not name or index is None:
      raise ValueError(
        f"{where} has the row {row}, expected columns Filename and ClassId (0 to "
        f"{num_classes - 1}) between semicolons; copy it anew."
      )
    if name in rows:
      raise ValueError(f"{where} names {name} more than once; keep one row.")
    rows[name] = index
  if not rows:
    raise ValueError(f"{where} names no image; copy it anew.")
  names = [f"{base}{_TEST}{name}" for name in rows]
  image_lists.check_files(root, names, where)
  return ImageList(path, names, np.array(list(rows.values()), np.int32))
