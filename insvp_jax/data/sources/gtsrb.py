"""GTSRB, German traffic signs, as torchvision unpacks it.

Below the root: `GTSRB/Training/<class>/*.ppm`, `GTSRB/Final_Test/Images/*.ppm` and
`GT-final_test.csv`. TFDS has only a copy whose test labels are missing.
"""

import csv
import io

import ml_collections
import numpy as np

from insvp_jax.data import image_files, subsets
from insvp_jax.data.folder_or_zip import FileTree, open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.splits import TaskData
from insvp_jax.data.tasks import Task

_TRAIN_FOLDER, _TEST_FOLDER = "GTSRB/Training/", "GTSRB/Final_Test/Images/"
_TEST_LABELS = "GT-final_test.csv"


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads GTSRB; train and val are drawn from the training images by the subset.

  Args:
    task: a row of `tasks.TASKS`.
    data_config: the section config.data; `root` is the folder with the files named
      above, or the one around it that holds `gtsrb/`; `subset` and `split_seed` choose
      the training images.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: if a part of the layout is missing.
    ValueError: if the list of test labels is malformed.
  """
  with open_folder_or_zip(data_config.root) as root:
    prefix = _prefix(task, root)
    test = _test_images(root, prefix, data_config.root, task.num_classes)
    train_val = _train_images(root, prefix, data_config.root, task.num_classes)
  subset = task.subset(data_config.subset)
  train, val = subsets.draw_train_val(
    task, subset, train_val.labels, train_val.names, data_config.split_seed
  )
  lists = {"train": train_val.take(train), "val": train_val.take(val), "test": test}
  class_names = [f"{i:05d}" for i in range(task.num_classes)]
  return image_files.task_data(task, lists, class_names, data_config, image_size)


def _prefix(task: Task, root: FileTree) -> str:
  """Returns the prefix of the folder with the list of test labels."""
  for prefix in ("", f"{task.folder_name}/"):
    if root.sizes([prefix + _TEST_LABELS]) != [-1]:
      return prefix
  raise FileNotFoundError(
    f"config.data.root: {root.path} is not GTSRB as torchvision unpacks it: no "
    f"{_TEST_LABELS} there or in {task.folder_name}/; expected it beside "
    f"{_TRAIN_FOLDER}<class>/*.ppm and {_TEST_FOLDER}*.ppm."
  )


def _train_images(
  root: FileTree, prefix: str, path: str, num_classes: int
) -> ImageFiles:
  """Returns the official training images, sorted by class and name.

  Args:
    root: the opened folder or archive.
    prefix: the prefix of the data set's folder in it.
    path: the path of the folder or archive, as the user gave it.
    num_classes: k.
  """
  train_folder = prefix + _TRAIN_FOLDER
  # Sorted, because the order in which a file system lists files is its own.
  names = sorted(
    name
    for name in root.entries().files
    if name.startswith(train_folder) and name.lower().endswith((".ppm", ".png"))
  )
  if not names:
    raise FileNotFoundError(
      f"{root.full_path(train_folder)} holds no images, expected <class>/*.ppm; unpack "
      f"GTSRB-Training_fixed.zip there."
    )
  label_of = {f"{i:05d}": i for i in range(num_classes)}
  # An image directly in the folder has its own name here, which is no class.
  folders = [name[len(train_folder) :].split("/")[0] for name in names]
  if unknown := sorted(set(folders) - set(label_of)):
    raise ValueError(
      f"{root.full_path(train_folder)} holds {unknown[0]!r}, expected the folders "
      f"00000 to {num_classes - 1:05d}; move it away."
    )
  labels = np.array([label_of[folder] for folder in folders], np.int32)
  return ImageFiles(path, names, labels)


def _test_images(
  root: FileTree, prefix: str, path: str, num_classes: int
) -> ImageFiles:
  """Returns the test images, in the order of the list of their labels.

  The arguments are those of `_train_images`.
  """
  where = root.full_path(prefix + _TEST_LABELS)
  labels: dict[str, int] = {}
  text = image_files.read_text(root, prefix + _TEST_LABELS)
  for row in csv.DictReader(io.StringIO(text), delimiter=";"):
    name = row.get("Filename")
    label = image_files.parse_class_index(row.get("ClassId"), num_classes)
    if not name or label is None:
      raise ValueError(
        f"{where} has the row {row}, expected columns Filename and ClassId (0 to "
        f"{num_classes - 1}) between semicolons; copy it anew."
      )
    if name in labels:
      raise ValueError(f"{where} names {name} more than once; keep one row.")
    labels[name] = label
  if not labels:
    raise ValueError(f"{where} names no image; copy it anew.")
  names = [f"{prefix}{_TEST_FOLDER}{name}" for name in labels]
  image_files.check_listed_files(root, names, where)
  return ImageFiles(path, names, np.array(list(labels.values()), np.int32))
