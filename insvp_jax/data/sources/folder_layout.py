"""Which file of a folder or archive belongs to which split and class."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import re

from absl import logging

from insvp_jax import trees
from insvp_jax.data import decode, image_kinds
from insvp_jax.data.folder_or_zip import EXPECTED, FileTree
from insvp_jax.data.sources import split_names
from insvp_jax.data.sources.class_names import class_name, tell_alike
from insvp_jax.data.sources.split_names import SplitName
from insvp_jax.errors import printable

# Reasons to leave images out, besides those of `image_kinds`.
_LOOSE = "in no class folder"
_BESIDE = "beside the splits"
# From this share of the classes on, sub-folders of equal names look like the classes.
_NEARLY_ALL = 2 / 3
# How many names a message tells.
_NUM_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which files of a folder or archive belong to which split and class.

  Attributes:
    class_names: names of the classes, sorted; those of train.
    splits: for "train" and those of "val" and "test" that exist, the files as (name,
      label), sorted by label and name.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Sequence[tuple[str, int]]]


class _Folders:
  """The folders of a root, by what they hold.

  A folder is given by its prefix: "" for the root, "train/" for a folder in it.

  Attributes:
    path: of the root; named in errors.
    images: the images directly in each folder that has some, sorted.
    left_out: what is no image of a class, by reason.
  """

  def __init__(self, root: FileTree):
    found = image_kinds.find_images(root)
    self.path = root.path
    self.left_out = {reason: list(names) for reason, names in found.left_out.items()}
    self.images: dict[str, list[str]] = {}
    for name in found.images:
      self.images.setdefault(_prefix_around(name), []).append(name)
    self._inner: dict[str, list[str]] = {}
    for folder in sorted(found.folders):
      around = _prefix_around(folder)
      self._inner.setdefault(around, []).append(folder[len(around) :])
    self._filled = _with_those_around(self.images)
    # Folders of annotations, say.
    others = {
      _prefix_around(name) for name in self.left_out.get(image_kinds.NO_IMAGE, ())
    }
    self._with_others = _with_those_around(others)

  def inner(self, prefix: str) -> list[str]:
    """Returns the names of all folders in a folder, sorted."""
    return self._inner.get(prefix, [])

  def filled(self, prefix: str) -> list[str]:
    """Returns the names of those that hold images, however deep."""
    return [name for name in self.inner(prefix) if f"{prefix}{name}/" in self._filled]

  def empty(self, prefix: str) -> list[str]:
    """Returns the names of those that hold no files at all."""
    held = self._filled | self._with_others
    return [name for name in self.inner(prefix) if f"{prefix}{name}/" not in held]

  def has_images(self, prefix: str) -> bool:
    """Returns whether images lie in a folder, however deep."""
    return prefix in self._filled

  def all_images(self, prefix: str) -> Iterator[str]:
    """Yields all images in a folder, however deep, in no order."""
    todo = [prefix]
    while todo:
      inside = todo.pop()
      yield from self.images.get(inside, ())
      todo.extend(f"{inside}{name}/" for name in self.filled(inside))

  def place(self, prefix: str) -> str:
    """Returns a folder's path, for messages."""
    return printable(f"{self.path}/{prefix}".rstrip("/"))


def _prefix_around(name: str) -> str:
  """Returns the prefix of the folder that a file or folder lies in."""
  return name[: name.rstrip("/").rfind("/") + 1]


def _with_those_around(prefixes: Iterable[str]) -> set[str]:
  """Returns folders together with all folders around them."""
  known: set[str] = set()
  for prefix in prefixes:
    while prefix not in known:
      known.add(prefix)
      prefix = _prefix_around(prefix)
  return known


def find_layout(root: FileTree) -> Layout:
  """Finds splits, classes and image files; one line tells what is left out.

  Raises:
    ValueError: if there are no classes, only one class, a class without images, or a
      class of val or test that train lacks; or if the folders look like something else
      than classes.
  """
  folders = _Folders(root)
  prefix = _wrapping_prefix(folders)
  prefix_of = _split_prefixes(folders, prefix)
  if prefix_of:
    beside = {f"{prefix}{name}/" for name in folders.filled(prefix)}
    folders.left_out[_BESIDE] = sorted(beside - set(prefix_of.values()))
    _check_train_alone(folders, prefix, prefix_of)
    _tell_splits(folders, prefix_of)
  else:
    _check_flat_names(folders, prefix)
    prefix_of = {"train": prefix}
  classes: dict[str, dict[str, list[str]]] = {}
  loose: set[str] = set()
  for split in ("train", "val", "test"):
    if split in prefix_of:
      known = classes.get("train", {})
      inner = _inside_wrapping(folders, prefix_of[split], known)
      _check_sub_folders(folders, inner)
      classes[split] = _files_by_class(folders, split, inner)
      loose |= _with_those_around([inner])
  folders.left_out[_LOOSE] = [
    n for around in loose for n in folders.images.get(around, ())
  ]
  # Train alone decides the classes and thus the labels: val and test may lack some.
  class_names = tuple(sorted(classes["train"]))
  if len(class_names) < 2:
    raise ValueError(
      f"{printable(str(root.path))} has only one class, {class_names[0]!r}; a "
      f"classifier needs two or more: one folder for each."
    )
  for split, members in classes.items():
    _check_classes(folders, split, members, class_names)
  _tell_odd_names(folders, class_names)
  if line := image_kinds.left_out_line(folders.left_out):
    logging.warning("%s: %s", printable(str(root.path)), line)
  splits = {
    split: [(n, i) for i, c in enumerate(class_names) for n in members.get(c, ())]
    for split, members in classes.items()
  }
  return Layout(class_names, splits)


def _wrapping_prefix(folders: _Folders) -> str:
  """Returns the prefix of the folders that everything lies in, or "".

  Archives often hold one folder around everything: "pets/train/cat/1.jpg".
  """
  prefix = ""
  while (only := _only_folder(folders, prefix)) is not None:
    inside = f"{prefix}{only}/"
    name = split_names.parse(only)
    # A train folder alone is a split; a set called "train" has splits of its own.
    if name and name.is_usual and not _split_prefixes(folders, inside, strict=False):
      return prefix
    prefix = inside
  return prefix


def _only_folder(folders: _Folders, prefix: str) -> str | None:
  """Returns the only folder in a folder if it holds folders of images, else None.

  A folder beside it may hold other files, such as annotations. A single folder without
  folders of its own is a class, not a wrapping.
  """
  filled = folders.filled(prefix)
  if len(filled) != 1 or folders.empty(prefix):
    return None
  inside = f"{prefix}{filled[0]}/"
  return filled[0] if folders.filled(inside) else None


def _inside_wrapping(
  folders: _Folders, prefix: str, train_classes: Mapping[str, object]
) -> str:
  """Returns the folder of a split's classes: "train/train/" where all lies in that.

  Args:
    folders: of the root.
    prefix: of the split.
    train_classes: by name; {} for train itself. Val and test may have a single class.
  """
  while (only := _only_folder(folders, prefix)) is not None:
    if class_name(only) in train_classes:
      break
    prefix = f"{prefix}{only}/"
  return prefix


def _split_prefixes(
  folders: _Folders, prefix: str, strict: bool = True
) -> dict[str, str]:
  """Returns the prefixes of the splits' folders in a folder; {} if they are classes.

  A split's name and what it holds decide together: a folder with images directly in it,
  and no folders of images, is a class whatever it is called. A name that is not one of
  the usual counts if another folder, of another split, has the same beside the split's
  word ("seg_train", "seg_test") or holds the same classes.

  Args:
    folders: of the root.
    prefix: of the folder.
    strict: whether to raise; otherwise {} stands for a layout that makes no sense.

  Raises:
    ValueError: if there are splits without train, or two folders for one split.
  """
  inner = folders.inner(prefix)
  names = {n: parsed for n in inner if (parsed := split_names.parse(n))}
  held = {name: set(folders.filled(f"{prefix}{name}/")) for name in names}

  def agree(name: str, other: str) -> bool:
    first, second = names[name], names[other]
    if first.split == second.split:
      return False
    smaller = min(len(held[name]), len(held[other]))
    same_classes = 0 < smaller <= 2 * len(held[name] & held[other])
    one_plain = not (first.rest and second.rest)
    return first.rest == second.rest or (same_classes and one_plain)

  splits = {
    name: parsed
    for name, parsed in names.items()
    if parsed.split != "unlabelled"
    and held[name]
    and (parsed.is_usual or any(agree(name, other) for other in names))
  }
  if not splits:
    return {}
  # Splits by their names, although they hold no classes: an error will say so.
  rests = {parsed.rest for parsed in splits.values()}
  for name, parsed in names.items():
    if parsed.split != "unlabelled" and not held[name]:
      if parsed.is_usual or (parsed.rest and parsed.rest in rests):
        splits[name] = parsed
  if "train" not in {parsed.split for parsed in splits.values()}:
    usual = any(parsed.is_usual for parsed in splits.values())
    if strict and (usual or len(splits) == len(folders.filled(prefix))):
      raise ValueError(
        f"{folders.place(prefix)} holds {_some([*splits])} but no train folder; "
        f"{EXPECTED}."
      )
    return {}
  folder_of: dict[str, list[str]] = {}
  for name, parsed in splits.items():
    folder_of.setdefault(parsed.split, []).append(name)
  if evaluation := folder_of.pop("eval", None):
    free = "test" if "val" in folder_of and "test" not in folder_of else "val"
    folder_of.setdefault(free, []).extend(evaluation)
  for split, same in folder_of.items():
    if len(same) > 1:
      if not strict:
        return {}
      raise ValueError(
        f"{folders.place(prefix)} holds {' and '.join(map(printable, same))}, which "
        f"both mean {split}: keep one."
      )
  order = [split for split in ("train", "val", "test") if split in folder_of]
  return {split: f"{prefix}{folder_of[split][0]}/" for split in order}


def _tell_splits(folders: _Folders, prefix_of: Mapping[str, str]) -> None:
  """Tells how the splits' folders were read where that takes a rule."""
  if any(inner.rstrip("/").split("/")[-1] != s for s, inner in prefix_of.items()):
    read = ", ".join(f"{printable(inner)} as {s}" for s, inner in prefix_of.items())
    logging.warning("%s: read %s", folders.place(""), read)


def _check_train_alone(
  folders: _Folders, prefix: str, prefix_of: Mapping[str, str]
) -> None:
  """Checks that a train folder alone is no class beside others.

  Raises:
    ValueError: if it may well be one.
  """
  flat = [
    name
    for name in folders.filled(prefix)
    if not split_names.parse(name) and not folders.filled(f"{prefix}{name}/")
  ]
  if len(prefix_of) == 1 and len(flat) > 1:
    (train,) = prefix_of.values()
    raise ValueError(
      f"{folders.place(train)} holds folders of images, as a split does, but images "
      f"lie directly in {_some(flat)} beside it, as in classes. If it is a split, move "
      f"the others away; if it is a class, put its images directly into it."
    )


def _check_flat_names(folders: _Folders, prefix: str) -> None:
  """Checks that the folders to be classes are no splits without classes.

  Raises:
    ValueError: if they are.
  """
  filled = folders.filled(prefix)
  names = {n: parsed for n in filled if (parsed := split_names.parse(n))}
  # A class may be called "test", and "test tube" beside "train station"; but two splits
  # of one name, or nothing but splits, are none.
  by_rest: dict[tuple[str, ...], dict[str, SplitName]] = {}
  for name, parsed in names.items():
    by_rest.setdefault(parsed.rest, {})[name] = parsed
  for rest, same in by_rest.items():
    several = len({parsed.split for parsed in same.values()}) > 1
    only_splits = len(same) == len(filled)
    if (rest and several) or (not rest and only_splits):
      first = next(iter(same))
      place = f"{prefix}{first}/"
      number = len(folders.images.get(place, ()))
      raise ValueError(
        f"no class folders in {folders.place(place)}. {number} images lie there "
        f"without a class folder. {_some([*same])} are read as splits: in each, "
        f"<class>/<image>, or name them otherwise if they are classes."
      )
    if several:
      logging.warning(
        "%s: %s are read as classes, since images lie directly in them; expected "
        "<class>/<image> in them if they are splits",
        folders.place(prefix),
        ", ".join(map(printable, same)),
      )


def _check_sub_folders(folders: _Folders, prefix: str) -> None:
  """Checks that the folders to be classes do not hold the classes.

  Raises:
    ValueError: if all of them, or nearly all, hold the same sub-folders, or if one
      holds its neighbours once more.
  """
  filled = folders.filled(prefix)
  for name in filled:
    again = sorted(set(filled) & set(folders.filled(f"{prefix}{name}/")))
    if len(again) > 1:
      raise ValueError(
        f"{folders.place(prefix)} holds {_some(again)}, and so does "
        f"{printable(name)} in it, which would be a class. If the set is there twice, "
        f"remove {folders.place(f'{prefix}{name}/')}; if not, give its folders others' "
        f"names."
      )
  counts = Counter(
    inner
    for name in filled
    for inner in {class_name(n).casefold() for n in folders.filled(f"{prefix}{name}/")}
  )
  enough = max(2, _NEARLY_ALL * len(filled))
  same = sorted(name for name, count in counts.items() if count >= enough)
  # One alone, such as "images", leaves no doubt.
  if len(same) > 1:
    raise ValueError(
      f"the folders {_some(filled)} of {folders.place(prefix)} would be the classes, "
      f"but they hold the same sub-folders: {_some(same)}. If these are the classes, "
      f"expected train/<class>/<image>, so name the folders around them train, val and "
      f"test; if not, put each class's images directly into its folder."
    )


def _some(names: Sequence[str]) -> str:
  """Returns the first names, and that there are more."""
  more = ["..."] if len(names) > _NUM_NAMED else []
  return ", ".join([*map(printable, names[:_NUM_NAMED]), *more])


def _files_by_class(folders: _Folders, split: str, prefix: str) -> dict[str, list[str]]:
  """Returns {class name: sorted image files} of one split.

  Args:
    folders: of the root.
    split: the split; named in errors.
    prefix: the prefix of the folder that the split's classes lie in.
  """
  place = folders.place(prefix)
  # Also the classes of folders without files, so that they can be named in an error.
  folders_of: dict[str, list[str]] = {}
  for name in folders.inner(prefix):
    folders_of.setdefault(class_name(name), []).append(name)
  num_loose = len(folders.images.get(prefix, ()))
  if not folders_of:
    hint = f" {num_loose} images lie there without a class folder." if num_loose else ""
    left_out = image_kinds.left_out_line(folders.left_out)
    hint += f" The set has {left_out}." if left_out else ""
    hint += " In it, <class>/<image>."
    hint += "" if split == "train" else " Move it away if its images have no labels."
    raise ValueError(f"no class folders in {place}.{hint}")
  members = {}
  for name, same in folders_of.items():
    inside = [f"{prefix}{folder}/" for folder in same]
    if not any(map(folders.has_images, inside)):
      raise ValueError(
        f"the class {name!r} of {split} has no images in {place}/{printable(same[0])} "
        f"(known: {', '.join(decode.IMAGE_SUFFIXES)}, and files of these formats). "
        f"Add some or remove the folder.{_what_lies_in(folders, inside[0])}"
      )
    if len(same) > 1:
      logging.warning(
        "%s: %d folders are the class %s, in two spellings of its letters",
        *(place, len(same), name),
      )
    members[name] = sorted(n for folder in inside for n in folders.all_images(folder))
  return members


def _what_lies_in(folders: _Folders, prefix: str) -> str:
  """Returns a sentence on what was left out in a folder, or ""."""
  inside = {
    reason: [name for name in names if name.startswith(prefix)]
    for reason, names in folders.left_out.items()
  }
  line = image_kinds.left_out_line(inside)
  return f" In it, {line}." if line else ""


def _check_classes(
  folders: _Folders, split: str, members: Mapping[str, object], known: Sequence[str]
):
  """Checks that a split has no other classes than train; warns of missing ones."""
  unknown = sorted(set(members) - set(known))
  if unknown:
    raise ValueError(
      f"{split} of {folders.place('')} has classes that train does not have: "
      f"{', '.join(map(repr, unknown))}.{trees.did_you_mean(unknown[0], known)} "
      f"Name the class folders alike in all splits."
    )
  if absent := sorted(set(known) - set(members)):
    logging.warning("%s has no images of: %s", split, ", ".join(absent))


def _tell_odd_names(folders: _Folders, class_names: Sequence[str]) -> None:
  """Warns of classes that may be one, and of names that cannot be read."""
  tell_alike(folders.place(""), class_names)
  if any(re.search("[\udc80-\udcff]", prefix) for prefix in folders.images):
    logging.warning(
      "%s: folder names that are not UTF-8 are shown by their bytes, as \\xNN; to have "
      "them right, unpack the archive with its encoding (unzip -O cp932, say), or make "
      "it anew with names in UTF-8",
      folders.place(""),
    )
