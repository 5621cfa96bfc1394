"""VPT-style lists of a data set's splits: train.json, val.json and test.json.

Each file maps image names to class ids. One mapping from ids to labels is built from
train and used for every split. (The published code builds one per file: classes that
NABirds' val lacks then shift the labels of 60% of it.)
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from jaxtyping import Int
import numpy as np

from insvp_jax import files
from insvp_jax.data.tasks import Task

# For each split {image name: class id}; ids are whole numbers or text.
Lists = Mapping[str, Mapping[str, Any]]


def read_lists(folder: str | Path, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Reads the lists of some splits.

  Args:
    folder: the folder that holds `<split>.json` for each of `splits`.
    splits: some of "train", "val" and "test".

  Returns:
    For each split {image name: class id}, in the order of the file.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is not of this form, names an image twice, or shares an image
      with another split.
  """
  folder = Path(folder).expanduser()
  lists = {split: _read_list(folder / f"{split}.json") for split in splits}
  split_of: dict[str, str] = {}
  for split, members in lists.items():
    for name in members:
      if name in split_of:
        raise ValueError(
          f"{folder / f'{split}.json'} and {folder / f'{split_of[name]}.json'} both "
          f"hold {name!r}; an image belongs to one split. Take it out of one of them."
        )
      split_of[name] = split
  return lists


def _read_list(path: Path) -> dict[str, Any]:
  """Reads one file; see `read_lists`."""
  if not path.is_file():
    raise FileNotFoundError(
      f"no file {path}. It lists a split as {{image: class id}}; VPT distributes such "
      f"lists of FGVC."
    )
  repeated: list[str] = []

  def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON allows a key twice, and a dict would keep the last one in silence.
    names = dict(pairs)
    if len(names) < len(pairs):
      seen: set[str] = set()
      repeated.extend(n for n, _ in pairs if n in seen or seen.add(n))
    return names

  try:
    text = files.read_bytes(path).decode("utf-8")
    members = json.loads(text, object_pairs_hook=note_repeated)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON: {error}. Copy it anew.") from error
  if repeated:
    raise ValueError(f"{path} holds {repeated[0]!r} more than once; keep one entry.")
  if not isinstance(members, dict) or not members:
    raise ValueError(f"{path} holds no {{image: class id}}; copy it anew.")
  for name, class_id in members.items():
    # A bool is an int in Python.
    if not isinstance(class_id, int | str) or isinstance(class_id, bool):
      raise ValueError(
        f"{path} gives {name!r} the class id {class_id!r}, expected a whole number or "
        f"text; copy it anew."
      )
  return members


def labels_of_lists(
  lists: Lists, num_classes: int, folder: str
) -> dict[str, Int[np.ndarray, "_"]]:
  """Returns the labels of each split by one mapping from ids, built from train.

  Args:
    lists: the lists, from `read_lists`.
    num_classes: k, as published.
    folder: the folder of the lists; named in errors.

  Returns:
    For each split the class indices int32 [n], in the order of its list. Indices follow
    the sorted ids.

  Raises:
    ValueError: if train has another number of classes, or a split has an id that train
      lacks.
  """
  try:
    ids = sorted(set(lists["train"].values()))
  except TypeError as error:  # numbers and text have no common order
    raise ValueError(
      f"train.json in {folder} mixes kinds of class ids; write all as numbers or all "
      f"as text."
    ) from error
  if len(ids) != num_classes:
    raise ValueError(
      f"train.json in {folder} has {len(ids)} classes, expected {num_classes}; copy it "
      f"anew."
    )
  label_of = {class_id: label for label, class_id in enumerate(ids)}
  labels = {}
  for split, members in lists.items():
    for name, class_id in members.items():
      if class_id not in label_of:
        raise ValueError(
          f"{split}.json in {folder} gives {name!r} the class id {class_id!r}, which "
          f"train.json does not have."
        )
    labels[split] = np.array([label_of[i] for i in members.values()], np.int32)
  return labels


def read_train_val(task: Task, folder: str) -> dict[str, dict[str, Any]]:
  """Reads the lists that define train and val of a task whose images TFDS prepared.

  Args:
    task: a task one of whose subsets is defined by lists.
    folder: the folder of train.json and val.json, as config.data.lists.

  Returns:
    For train and val {image name: class id}, in the order of the file.

  Raises:
    FileNotFoundError: if no folder is given, or a file is missing.
    ValueError: if the lists contradict themselves, or TFDS's images have no names.
  """
  unlisted = [name for name, subset in task.subsets.items() if subset.rule != "lists"]
  instead = f", or set config.data.subset={unlisted[0]}" if unlisted else ""
  if not task.id_feature:
    raise ValueError(
      f"TFDS's images of {task.name} have no names to find listed ones by; point "
      f"config.data.root to a folder of images with its lists{instead}."
    )
  if not folder:
    raise FileNotFoundError(
      f"the training images of {task.name} are defined by VPT's train.json and "
      f"val.json, which are not ours to distribute; point config.data.lists to their "
      f"folder{instead}."
    )
  return read_lists(folder, ("train", "val"))


def positions_in_tfds(
  task: Task,
  folder: str,
  lists: Lists,
  names: Sequence[str],
  tfds_labels: Int[np.ndarray, "n"],
) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
  """Finds the listed train and val images among those that TFDS prepared.

  Labels stay those of TFDS; the class ids of the lists serve as a check that both speak
  of the same images.

  Args:
    task: a task one of whose subsets is defined by lists.
    folder: the folder of the lists; named in errors.
    lists: the lists of train and val, from `read_train_val`.
    names: names of TFDS's n training images.
    tfds_labels: labels of TFDS's training images.

  Returns:
    The positions of train and those of val, in the order of the lists.

  Raises:
    ValueError: if the lists and TFDS's images do not belong together.
  """
  advice = "is it the list of another data set?"
  labels = labels_of_lists(lists, task.num_classes, folder)
  position_of = {_class_and_file(name): i for i, name in enumerate(names)}
  listed_as: dict[int, str] = {}
  tfds_label_of: dict[int, int] = {}
  for split, members in lists.items():
    for name, label in zip(members, labels[split].tolist(), strict=True):
      position = position_of.get(_class_and_file(name))
      if position is None:
        raise ValueError(
          f"{split}.json in {folder} names {name!r}, which is not among the "
          f"{len(names)} images of {task.spec}; {advice}"
        )
      # Names that differ in their first folders may be one image.
      if position in listed_as:
        raise ValueError(
          f"{split}.json in {folder} names {name!r}, but that image is listed as "
          f"{listed_as[position]!r} already; keep one entry."
        )
      listed_as[position] = name
      tfds_label = int(tfds_labels[position])
      if tfds_label_of.setdefault(label, tfds_label) != tfds_label:
        raise ValueError(
          f"{split}.json in {folder} puts {name!r} into the class {members[name]!r} "
          f"with images that TFDS has in another; {advice}"
        )
  if len(set(tfds_label_of.values())) < len(tfds_label_of):
    raise ValueError(
      f"train.json in {folder} divides images that TFDS has in one class; {advice}"
    )
  positions = np.array(list(listed_as), np.int64)
  num_train = len(lists["train"])
  return positions[:num_train], positions[num_train:]


def _class_and_file(name: str) -> str:
  """Returns the last two parts of a path: class folder and file.

  VPT's names and TFDS's differ in the folders before them.
  """
  return "/".join(name.replace("\\", "/").split("/")[-2:])
