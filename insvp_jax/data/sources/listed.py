"""FGVC as folders of images with VPT-style train.json, val.json and test.json."""

from pathlib import Path

import ml_collections

from insvp_jax.data import files, image_lists, name_lists, subsets
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.image_lists import ImageList
from insvp_jax.data.tasks import Task

# Where the images of VPT's data sets lie, below the folder with the lists.
_IMAGES = ("", "images/", "Images/")


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a fine-grained task from image files.

  Args:
    task: a row of the table.
    data_config: `root` is the data set's folder, or the one with a folder for each
      data set (`CUB_200_2011`, `nabirds`, ...); `lists` is the folder of the lists if
      that is another; `subset` and `split_seed` as in `config`.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: a list, or a file that one names, is not there.
    ValueError: a list is malformed, or names an image that another one has.
  """
  subset = task.subset(data_config.subset)
  with files.open_root(data_config.root) as root:
    folder = _folder(task, root, data_config.lists)
    lists = name_lists.read(folder, ("train", "val", "test"))
    labels = name_lists.labels(lists, task.num_classes, str(folder))
    base = _base(task, root, [name for members in lists.values() for name in members])
    images = {}
    for split, members in lists.items():
      names = [base + name for name in members]
      image_lists.check_files(root, names, f"{folder}/{split}.json")
      images[split] = ImageList(data_config.root, names, labels[split])
  both = image_lists.join(images["train"], images["val"])
  if subset.rule == "stratified":
    chosen = subsets.draw(task, subset, both.labels, both.names, data_config.split_seed)
    images["train"], images["val"] = (both.take(positions) for positions in chosen)
  names = _class_names(both, task.num_classes)
  return image_lists.task_data(task, images, names, data_config, image_size)


def _folder(task: Task, root: files.Root, lists: str) -> Path:
  """Returns the folder of the lists."""
  if lists:
    return Path(lists).expanduser()
  if not root.path.is_dir():
    raise FileNotFoundError(
      f"{root.path} is an archive, which lists are not read from; point "
      f"config.data.lists to a folder with train.json, val.json and test.json."
    )
  inner = root.path / task.folder_name
  places = [place for place in (inner, root.path) if (place / "train.json").is_file()]
  return (places or [inner if inner.is_dir() else root.path])[0]


def _base(task: Task, root: files.Root, names: list[str]) -> str:
  """Returns the prefix below which the listed images are found."""
  for folder in (f"{task.folder_name}/", ""):
    for inner in _IMAGES:
      if max(root.sizes([f"{folder}{inner}{name}" for name in names])) >= 0:
        return folder + inner
  return ""


def _class_names(images: ImageList, num_classes: int) -> list[str]:
  """Returns the folders' names where each class has its own, else numbers."""
  folders = [name.split("/")[-2] if "/" in name else "" for name in images.names]
  own: dict[int, set[str]] = {}
  for label, folder in zip(images.labels.tolist(), folders, strict=True):
    own.setdefault(label, set()).add(folder)
  names = [min(own[i]) for i in range(num_classes)]
  if all(len(found) == 1 for found in own.values()) and len(set(names)) == num_classes:
    return names
  return [f"class {i}" for i in range(num_classes)]
