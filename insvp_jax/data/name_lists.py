"""VPT-style splits: train.json, val.json and test.json, each {image: class id}.

One mapping from ids to labels is built from train and used for every split. (The
published code builds one per file: classes that NABirds' val lacks shift the labels
of 60% of it.)
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

import numpy as np

from insvp_jax.data.tasks import Task

Lists = Mapping[str, Mapping[str, Any]]


def read(folder: str | Path, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns for each split {image name: class id}, in the file's order.

  Args:
    folder: holds `<split>.json` for each of `splits`.
    splits: "train", "val", "test".

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is not of this form, names an image twice, or shares one with
      another split.
  """
  folder = Path(folder).expanduser()
  found = {split: _read_one(folder / f"{split}.json") for split in splits}
  owner: dict[str, str] = {}
  for split, members in found.items():
    for name in members:
      if name in owner:
        raise ValueError(
          f"{folder / f'{split}.json'} and {folder / f'{owner[name]}.json'} both hold "
          f"{name!r}; an image belongs to one split. Take it out of one of them."
        )
      owner[name] = split
  return found


def _read_one(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(
      f"no file {path}. It lists a split as {{image: class id}}; VPT distributes such "
      f"lists of FGVC."
    )
  twice: list[str] = []

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
      seen: set[str] = set()
      twice.extend(n for n, _ in pairs if n in seen or seen.add(n))
    return names

  try:
    members = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
  except (ValueError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is no JSON: {error}. Copy it anew.") from error
  if twice:
    raise ValueError(f"{path} holds {twice[0]!r} more than once; keep one entry.")
  if not isinstance(members, dict) or not members:
    raise ValueError(f"{path} holds no {{image: class id}}; copy it anew.")
  for name, value in members.items():
    if not isinstance(value, int | str) or isinstance(value, bool):
      raise ValueError(
        f"{path} gives {name!r} the class id {value!r}, expected a whole number or "
        f"text; copy it anew."
      )
  return members


def labels(lists: Lists, num_classes: int, where: str) -> dict[str, np.ndarray]:
  """Returns the labels of each split by one mapping, built from train.

  Args:
    lists: from `read`.
    num_classes: k, as published.
    where: named in errors.

  Raises:
    ValueError: train has another number of classes, or a split an id that train
      lacks.
  """
  try:
    ids = sorted(set(lists["train"].values()))
  except TypeError as error:
    raise ValueError(
      f"train.json in {where} mixes kinds of class ids; write all as numbers or all as "
      f"text."
    ) from error
  if len(ids) != num_classes:
    raise ValueError(
      f"train.json in {where} has {len(ids)} classes, expected {num_classes}; copy it "
      f"anew."
    )
  index = {value: label for label, value in enumerate(ids)}
  found = {}
  for split, members in lists.items():
    for name, value in members.items():
      if value not in index:
        raise ValueError(
          f"{split}.json in {where} gives {name!r} the class id {value!r}, which "
          f"train.json does not have."
        )
    found[split] = np.array([index[value] for value in members.values()], np.int32)
  return found


def find(task: Task, folder: str) -> dict[str, dict[str, Any]]:
  """Reads the lists that define the train and val images of a task.

  Args:
    task: one whose subset is defined by lists.
    folder: of train.json and val.json.

  Raises:
    FileNotFoundError: no lists.
    ValueError: the lists contradict themselves, or TFDS's images have no names.
  """
  other = [name for name, subset in task.subsets.items() if subset.rule != "lists"]
  instead = f", or set config.data.subset={other[0]}" if other else ""
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
  return read(folder, ("train", "val"))


def join(
  task: Task,
  folder: str,
  lists: Lists,
  names: Sequence[str],
  own_labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the listed train and val images among those that TFDS prepared.

  Args:
    task: one whose subset is defined by lists.
    folder: of the lists; named in errors.
    lists: from `find`.
    names: of TFDS's training images.
    own_labels: their labels.

  Returns:
    The positions of train and of val, in the order of the lists.

  Raises:
    ValueError: the lists and TFDS's images do not belong together.
  """
  mend = "is it the list of another data set?"
  listed = labels(lists, task.num_classes, folder)
  place = {_short(name): i for i, name in enumerate(names)}
  listed_as: dict[int, str] = {}
  classes: dict[int, int] = {}
  for split, members in lists.items():
    for name, label in zip(members, listed[split].tolist(), strict=True):
      position = place.get(_short(name))
      if position is None:
        raise ValueError(
          f"{split}.json in {folder} names {name!r}, which is not among the "
          f"{len(names)} images of {task.spec}; {mend}"
        )
      if position in listed_as:
        raise ValueError(
          f"{split}.json in {folder} names {name!r}, but that image is listed as "
          f"{listed_as[position]!r} already; keep one entry."
        )
      listed_as[position] = name
      own = int(own_labels[position])
      if classes.setdefault(label, own) != own:
        raise ValueError(
          f"{split}.json in {folder} puts {name!r} into the class {members[name]!r} "
          f"with images that TFDS has in another; {mend}"
        )
  if len(set(classes.values())) < len(classes):
    raise ValueError(
      f"train.json in {folder} divides images that TFDS has in one class; {mend}"
    )
  positions = np.array(list(listed_as), np.int64)
  number = len(lists["train"])
  return positions[:number], positions[number:]


def _short(name: str) -> str:
  """Returns the last two parts of a path: class folder and file."""
  return "/".join(name.replace("\\", "/").split("/")[-2:])
