"""FGVC as folders of images with VPT-style train.json, val.json and test.json."""

from pathlib import Path

import ml_collections

from insvp_jax.data import image_files, subsets, vpt_lists
from insvp_jax.data.folder_or_zip import FileTree, open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.splits import TaskData
from insvp_jax.data.tasks import Task

# Where the images of VPT's data sets lie, below the data set's folder.
_IMAGE_FOLDERS = ("", "images/", "Images/")


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a fine-grained task from image files.

  Args:
    task: a row of `tasks.TASKS`.
    data_config: the section config.data; `root` is the data set's folder, or the one
      with a folder for each data set (`CUB_200_2011`, `nabirds`, ...); `lists` is the
      folder of the lists if that is another one; `subset` and `split_seed` choose the
      training images.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: if a list, or a file that one names, is not there.
    ValueError: if a list is malformed, or names an image that another one has.
  """
  subset = task.subset(data_config.subset)
  with open_folder_or_zip(data_config.root) as root:
    folder = _list_folder(task, root, data_config.lists)
    lists = vpt_lists.read_lists(folder, ("train", "val", "test"))
    labels = vpt_lists.labels_of_lists(lists, task.num_classes, str(folder))
    listed = [name for members in lists.values() for name in members]
    prefix = _image_prefix(task, root, listed)
    images = {}
    for split, members in lists.items():
      names = [prefix + name for name in members]
      image_files.check_listed_files(root, names, f"{folder}/{split}.json")
      images[split] = ImageFiles(data_config.root, names, labels[split])
  both = image_files.concatenate(images["train"], images["val"])
  # The lists of train and val together are the official training images.
  if subset.rule == "stratified":
    chosen = subsets.draw_train_val(
      task, subset, both.labels, both.names, data_config.split_seed
    )
    images["train"], images["val"] = (both.take(positions) for positions in chosen)
  names = _class_names(both, task.num_classes)
  return image_files.task_data(task, images, names, data_config, image_size)


def _list_folder(task: Task, root: FileTree, lists: str) -> Path:
  """Returns the folder of the lists: `lists` if given, else the one that has them."""
  if lists:
    return Path(lists).expanduser()
  if not root.path.is_dir():
    raise FileNotFoundError(
      f"{root.path} is an archive, which lists are not read from; point "
      f"config.data.lists to a folder with train.json, val.json and test.json."
    )
  inner = root.path / task.folder_name
  for folder in (inner, root.path):
    if (folder / "train.json").is_file():
      return folder
  # Neither has them: errors name the folder where they most likely should be.
  return inner if inner.is_dir() else root.path


def _image_prefix(task: Task, root: FileTree, names: list[str]) -> str:
  """Returns the prefix below which the listed images are found; "" if nowhere."""
  for folder in (f"{task.folder_name}/", ""):
    for inner in _IMAGE_FOLDERS:
      # One image is enough here; missing ones are named later.
      if max(root.sizes([f"{folder}{inner}{name}" for name in names])) >= 0:
        return folder + inner
  return ""


def _class_names(images: ImageFiles, num_classes: int) -> list[str]:
  """Returns the folders' names where each class has its own, else "class 0", ..."""
  folders = [name.split("/")[-2] if "/" in name else "" for name in images.names]
  folders_of: dict[int, set[str]] = {}
  for label, folder in zip(images.labels.tolist(), folders, strict=True):
    folders_of.setdefault(label, set()).add(folder)
  names = [min(folders_of[label]) for label in range(num_classes)]
  one_each = all(len(folders) == 1 for folders in folders_of.values())
  if one_each and len(set(names)) == num_classes:
    return names
  return [f"class {label}" for label in range(num_classes)]
