"""The splits of one's own images as a run stores them: lists of files by class.

Whatever is added to the folder later, the splits of a run stay what they were.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
import numpy as np

from insvp_jax import files
from insvp_jax.data import image_kinds
from insvp_jax.data.folder_or_zip import FileTree
from insvp_jax.errors import printable

_NAMES = ("train", "val", "test")


def to_json(
  class_names: Sequence[str],
  files: Mapping[str, tuple[Sequence[str], np.ndarray]],
  are_listed: bool = False,
) -> dict[str, Any]:
  """Returns the lists of files as they are stored.

  Args:
    class_names: of the labels.
    files: for each split (names relative to the root, labels).
    are_listed: as in `TaskData`.
  """
  splits = {
    split: {
      class_name: [names[i] for i in np.flatnonzero(labels == label)]
      for label, class_name in enumerate(class_names)
    }
    for split, (names, labels) in files.items()
    if split in _NAMES
  }
  listed = {"listed": True} if are_listed else {}
  return {"class_names": list(class_names), "splits": splits, **listed}


def read(
  root: FileTree, path: str
) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]], bool]:
  """Returns (class names, {split: [(file, label), ...]}, are_listed) of a stored file.

  Args:
    root: the folder or archive that the files lie in.
    path: of the JSON file.

  Raises:
    FileNotFoundError: it is not there, or files that it names are not.
    ValueError: it does not hold such lists.
  """
  try:
    stored = files.parse_json(files.read_bytes(Path(path).expanduser()))
    class_names = tuple(stored["class_names"])
    splits = {
      split: [
        (str(name), class_names.index(class_name))
        for class_name, names in by_class.items()
        for name in names
      ]
      for split, by_class in stored["splits"].items()
    }
    are_listed = bool(stored.get("listed"))
  except OSError as error:
    raise FileNotFoundError(
      f"config.data.splits_json: cannot read {path} ({error.strerror})."
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"config.data.splits_json: {path} holds no lists of files by split and class; "
      "expected the splits.json of a run."
    ) from error
  if not set(splits) <= set(_NAMES) or not splits.get("train"):
    raise ValueError(
      f"config.data.splits_json: {path} has the splits {', '.join(splits)}, expected "
      "train and, if wanted, val and test."
    )
  listed = [name for members in splits.values() for name, _ in members]
  _check_there(root, listed, path)
  if not are_listed:
    _tell_others(root, listed, path)
  filled = {split: members for split, members in splits.items() if members}
  return class_names, filled, are_listed


def _check_there(root: FileTree, listed: Sequence[str], path: str) -> None:
  """Checks that the files are there."""
  sizes = root.sizes(listed)
  missing = [name for name, size in zip(listed, sizes, strict=True) if size < 0]
  if missing:
    raise FileNotFoundError(
      f"{len(missing)} of {len(listed)} images that {path} names are not in {root.path}"
      f", first {printable(missing[0])}: was a folder renamed or moved? Restore them, "
      "or take another folder (insvp evaluate --root=...)."
    )


def _tell_others(root: FileTree, listed: Sequence[str], path: str) -> None:
  """Says how many other images there are."""
  if others := len(set(image_kinds.find_images(root).images) - set(listed)):
    logging.warning(
      "%s: %d images are not in %s, and left out", root.path, others, path
    )
