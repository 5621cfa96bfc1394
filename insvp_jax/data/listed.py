"""FGVC as folders of images with VPT-style train.json, val.json and test.json."""

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
    base = _base(task, root)
    folder = data_config.lists or root.path / base
    lists = name_lists.read(folder, ("train", "val", "test"))
    labels = name_lists.labels(lists, task.num_classes, str(folder))
    images = {}
    for split, members in lists.items():
      names = _place(root, base, list(members), f"{folder}/{split}.json")
      images[split] = ImageList(data_config.root, names, labels[split])
  if subset.rule == "stratified":
    both = image_lists.join(images["train"], images["val"])
    chosen = subsets.draw(task, subset, both.labels, both.names, data_config.split_seed)
    images["train"], images["val"] = (both.take(positions) for positions in chosen)
  names = _class_names(images["train"], task.num_classes)
  return image_lists.task_data(task, images, names, data_config, image_size)


def _base(task: Task, root: files.Root) -> str:
  """Returns the prefix of the data set's folder."""
  _, folders = root.entries()
  if task.folder_name in folders:
    return f"{task.folder_name}/"
  return ""


def _place(root: files.Root, base: str, names: list[str], listed_in: str) -> list[str]:
  """Returns the listed images' names from the root."""
  for inner in _IMAGES:
    if root.sizes([f"{base}{inner}{names[0]}"])[0] >= 0:
      base += inner
      break
  found = [base + name for name in names]
  image_lists.check_files(root, found, listed_in)
  return found


def _class_names(train: ImageList, num_classes: int) -> list[str]:
  """Returns the folders' names where each class has its own, else numbers."""
  folders = [name.split("/")[-2] if "/" in name else "" for name in train.names]
  own: dict[int, set[str]] = {}
  for label, folder in zip(train.labels.tolist(), folders, strict=True):
    own.setdefault(label, set()).add(folder)
  names = [min(own.get(i, {""})) for i in range(num_classes)]
  if all(len(found) == 1 for found in own.values()) and len(set(names)) == num_classes:
    return names
  return [f"class {i}" for i in range(num_classes)]
