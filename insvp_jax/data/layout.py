"""Which file of a tree belongs to which split and class."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import unicodedata

from absl import logging

from insvp_jax import trees
from insvp_jax.data import decode, files

# Names of a split's folder, in any case.
_SPLITS = {
  "train": "train",
  "training": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "test": "test",
  "testing": "test",
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """The files of a data set.

  Attributes:
    class_names: sorted; from train alone.
    splits: for "train" and those of "val" and "test" that exist, the files as
      (name, label), sorted by label and name.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Sequence[tuple[str, int]]]

  def names(self) -> Iterator[str]:
    """Yields the name of each file."""
    for members in self.splits.values():
      for name, _ in members:
        yield name


def find(root: files.Root) -> Layout:
  """Finds splits, classes and image files.

  Raises:
    ValueError: no classes, only one class, a class without images, or a class of
      val or test that train lacks.
  """
  found, folders = root.entries()
  base = _base(folders)
  top = {f[len(base) :] for f in folders if f.startswith(base)} - {""}
  top = sorted(name for name in top if "/" not in name)
  named = {name: _SPLITS[name.lower()] for name in top if name.lower() in _SPLITS}
  if "train" in named.values():
    _check_unique(named, root)
    if ignored := [name for name in top if name not in named]:
      logging.warning("%s: ignored beside train: %s", root.path, ", ".join(ignored))
    where = {split: f"{base}{name}/" for name, split in named.items()}
  elif named:
    raise ValueError(
      f"{root.path} holds {', '.join(named)} but no train folder; {files.EXPECTED}."
    )
  else:
    where = {"train": base}
  classes = {
    split: _classes(root, split, where[split], found, folders)
    for split in ("train", "val", "test")
    if split in where
  }
  class_names = tuple(sorted(classes["train"]))
  if len(class_names) < 2:
    raise ValueError(
      f"{root.path} has only one class, {class_names[0]!r}; a classifier needs two or "
      f"more: one folder for each."
    )
  for split, members in classes.items():
    _check_known(root, split, members, class_names)
  splits = {
    split: [(n, i) for i, c in enumerate(class_names) for n in members.get(c, ())]
    for split, members in classes.items()
  }
  return Layout(class_names, splits)


def _base(folders: Sequence[str]) -> str:
  """Returns the prefix of the one folder that everything lies in, or ''."""
  base = ""
  while True:
    inner = [f[len(base) :] for f in folders if f.startswith(base)]
    top = {name.split("/")[0] for name in inner if name}
    # A single folder without folders of its own is a class, not a wrapping.
    if len(top) != 1 or not any("/" in name for name in inner):
      return base
    (only,) = top
    if only.lower() in _SPLITS:
      return base
    base = f"{base}{only}/"


def _check_unique(named: Mapping[str, str], root: files.Root):
  for split in set(named.values()):
    same = [name for name, of in named.items() if of == split]
    if len(same) > 1:
      raise ValueError(
        f"{root.path} holds {' and '.join(same)}, which both mean {split}: keep one."
      )


def _classes(
  root: files.Root,
  split: str,
  prefix: str,
  found: Sequence[str],
  folders: Sequence[str],
) -> dict[str, list[str]]:
  """Returns {class name: sorted image files} of one split."""
  depth = prefix.count("/")
  members: dict[str, list[str]] = {}
  for folder in folders:
    if folder.startswith(prefix) and folder.count("/") == depth:
      members[_class_name(folder[len(prefix) :])] = []
  loose = 0
  for name in sorted(found):
    if not name.startswith(prefix) or not name.lower().endswith(decode.SUFFIXES):
      continue
    if name.count("/") == depth:
      loose += 1
    else:
      members[_class_name(name[len(prefix) :].split("/")[0])].append(name)
  place = f"{root.path}/{prefix}".rstrip("/")
  if not members:
    hint = f" {loose} images lie there without a class folder." if loose else ""
    raise ValueError(f"no class folders in {place}.{hint} In it, <class>/<image>.")
  if loose:
    logging.warning("%s: ignored %d images that lie in no class folder", place, loose)
  for name, images in members.items():
    if not images:
      raise ValueError(
        f"the class {name!r} of {split} has no images in {place}/{name} (known: "
        f"{', '.join(decode.SUFFIXES)}). Add some or remove the folder."
      )
  return members


def _class_name(folder: str) -> str:
  # macOS decomposes accents: the same name has to be the same class everywhere.
  return unicodedata.normalize("NFC", folder)


def _check_known(
  root: files.Root, split: str, members: Mapping[str, object], known: Sequence[str]
):
  unknown = sorted(set(members) - set(known))
  if unknown:
    raise ValueError(
      f"{split} of {root.path} has classes that train does not have: "
      f"{', '.join(map(repr, unknown))}.{trees.did_you_mean(unknown[0], known)} "
      f"Name the class folders alike in all splits."
    )
  if absent := sorted(set(known) - set(members)):
    logging.warning("%s has no images of: %s", split, ", ".join(absent))
