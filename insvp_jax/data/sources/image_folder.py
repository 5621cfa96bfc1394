"""One's own images: a folder or a .zip archive with one sub-folder per class.

`find_layout` says which file belongs to which split and class; `load` decodes small
splits, draws the splits that are missing and returns the task.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import unicodedata

from absl import logging
from jaxtyping import Int
import ml_collections
import numpy as np

from insvp_jax import trees
from insvp_jax.data import (
  cache,
  decode,
  duplicates,
  image_files,
  load_or_stream,
  preprocess,
)
from insvp_jax.data.folder_or_zip import EXPECTED, FileTree, open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.sources import stored_splits
from insvp_jax.data.splits import ArraySplit, TaskData
from insvp_jax.data.subsets import stratified_parts

# Names of the splits' folders, in lower case.
_SPLIT_OF_FOLDER = {
  "train": "train",
  "training": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "test": "test",
  "testing": "test",
}
# What to do about a file that does not decode; ends the error's message.
_ADVICE = (
  "Mend or remove the file, or set config.data.skip_corrupt=True to leave such files "
  "out."
)


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Reads a folder or .zip of images.

  It holds `train/<class>/...` and, if wanted, `val/<class>/...` and `test/<class>/...`;
  or just `<class>/...`. A split that is not there is taken from train: its share of
  each class, drawn with `split_seed`; a fraction of 0 leaves the split out. Labels
  follow the sorted names of train's classes, in every split. An archive is read in
  place; one folder around everything is fine.

  Args:
    data_config: the section config.data; `root`, `preset`, `val_fraction`,
      `test_fraction`, `split_seed`, `skip_corrupt`, `resident_mb` and `cache_dir` are
      read.
    image_size: side of the model's input in pixels.

  Returns:
    The splits train, val, train_val (both together) and test, as far as they exist; the
    large ones are streamed.

  Raises:
    FileNotFoundError: if the root is missing or unreadable.
    ValueError: if the layout, a class or an image is not usable; the message names it.
  """
  preset = preprocess.get_preset(data_config.preset)
  # Open for a moment: splits open the root themselves whenever they are read.
  with open_folder_or_zip(data_config.root) as root:
    if data_config.splits_json:
      layout = Layout(*stored_splits.read(root, data_config.splits_json))
    else:
      layout = find_layout(root)
  advice = "" if data_config.skip_corrupt else _ADVICE
  lists = {}
  for split, members in layout.splits.items():
    names, labels = zip(*members, strict=True)
    labels = np.array(labels, np.int32)
    lists[split] = ImageFiles(data_config.root, names, labels, advice)
  readable, decoded = _decode_small_splits(lists, data_config, preset, image_size)
  # Skipping may leave a class without images, of which nothing could be learned.
  for split, images in readable.items():
    if lost := sorted(set(lists[split].labels) - set(images.labels)):
      raise ValueError(
        f"the class {layout.class_names[lost[0]]!r} of {split} in {root.path} has no "
        f"readable images: all of its files were skipped as corrupt."
      )
  fractions = {"val": data_config.val_fraction, "test": data_config.test_fraction}
  if data_config.splits_json:
    fractions = {}
  parts = _draw_missing_splits(
    readable, fractions, data_config.split_seed, layout.class_names
  )
  # The parts of splits on disk become the task's splits, as files and, where they are
  # decoded already, as pixels.
  part_lists = {
    name: readable[on_disk].take(positions)
    for name, (on_disk, positions) in parts.items()
  }
  part_arrays = {
    name: decoded[on_disk].take(positions)
    for name, (on_disk, positions) in parts.items()
    if on_disk in decoded
  }
  kept = duplicates.check(
    part_arrays,
    {name: part_lists[name].names for name in part_arrays},
    data_config.duplicates,
    str(root.path),
  )
  for name, positions in kept.items():
    if len(positions) < len(part_lists[name]):
      part_lists[name] = part_lists[name].take(positions)
      part_arrays[name] = part_arrays[name].take(positions)
  splits = image_files.load_or_stream_lists(
    part_lists, data_config, preset, image_size, part_arrays
  )
  # Summaries list it last.
  splits["train_val"] = splits.pop("train_val")
  skipped = sum(len(lists[split]) - len(readable[split]) for split in lists)
  source = f"images of {root.path}"
  files = {name: (images.names, images.labels) for name, images in part_lists.items()}
  return TaskData(root.name, layout.class_names, splits, skipped, source, files=files)


def _decode_small_splits(
  lists: Mapping[str, ImageFiles],
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
) -> tuple[dict[str, ImageFiles], dict[str, ArraySplit]]:
  """Finds the readable files of each split on disk, and decodes the small splits.

  What is on disk is decoded and cached as a whole, so that other fractions and seeds
  find it again. Large splits are not decoded, except to find corrupt files that are to
  be left out; what is kept of that is which files are readable.

  Args:
    lists: the files of each split on disk.
    data_config: the section config.data.
    preset: how images are resized.
    image_size: side of the model's input in pixels.

  Returns:
    (the readable files of each split, the images of the small splits).
  """
  lists, skip = dict(lists), bool(data_config.skip_corrupt)
  # By whether images are kept: {split: what its cache key depends on}.
  groups: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
  for split in lists:
    # No model is trained on test, so there squares or not makes no difference.
    if split != "test":
      lists[split] = image_files.find_squares(
        lists[split], data_config, preset, image_size
      )
    stream = lists[split].stream(preset, image_size)
    trains = split == "train"
    keep = not load_or_stream.stays_streamed(stream, data_config, preset, trains=trains)
    # A large split is read only to find its corrupt files.
    if keep or skip:
      groups[keep][split] = [stream.digest, stream.stamp]
  arrays: dict[str, np.ndarray] = {}
  for keep, contents in groups.items():
    some = {split: lists[split] for split in contents}
    arrays |= cache.cached_arrays(
      {"folder": contents, "skip_corrupt": skip, "keep": keep},
      functools.partial(_decode, some, preset, image_size, skip, keep),
      data_config.cache_dir,
    )
  decoded = {}
  for split, images in lists.items():
    if (key := f"{split}_readable") in arrays and not arrays[key].all():
      lists[split] = images.take(np.flatnonzero(arrays[key]))
    if (key := f"{split}_images") in arrays:
      decoded[split] = ArraySplit(arrays[key], lists[split].labels)
  return lists, decoded


def _decode(
  lists: Mapping[str, ImageFiles],
  preset: preprocess.Preset,
  image_size: int,
  skip_corrupt: bool,
  keep: bool,
) -> dict[str, np.ndarray]:
  """Decodes all files of some splits.

  Args:
    lists: the files of each split.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
    skip_corrupt: whether corrupt files are left out instead of raising.
    keep: whether the images are returned.

  Returns:
    For each split "<split>_readable" bool [number of files] and, with `keep`,
    "<split>_images" uint8 [number of readable files, s, s, 3].
  """
  size = preset.stored_size(image_size)
  arrays = {}
  for split, images in lists.items():
    readable = np.ones(len(images), bool)
    pixels = np.empty((len(images) if keep else 0, size, size, 3), np.uint8)
    squares = image_files.read_all(images, preset, image_size, skip_corrupt)
    for i, square in enumerate(squares):
      readable[i] = square is not None
      if keep and readable[i]:
        pixels[i] = square
    arrays[f"{split}_readable"] = readable
    if keep:
      # Selecting copies, and rarely is there anything to leave out.
      arrays[f"{split}_images"] = pixels if readable.all() else pixels[readable]
  return arrays


def _draw_missing_splits(
  lists: Mapping[str, ImageFiles],
  fractions: Mapping[str, float],
  seed: int,
  class_names: Sequence[str],
) -> dict[str, tuple[str, Int[np.ndarray, "_"]]]:
  """Draws val and test from train where they are not on disk.

  Args:
    lists: the readable files of each split on disk.
    fractions: which fraction of train becomes val and test.
    seed: the seed of the draw.
    class_names: how errors name the classes.

  Returns:
    For train, val and test, as far as they exist, the split on disk that their images
    belong to, and positions in it.
  """
  missing = {
    name: fraction for name, fraction in fractions.items() if name not in lists
  }
  # What is on disk stays as it is: nothing is drawn from val or test, nor into them.
  part_of = stratified_parts(lists["train"].labels, missing, seed, class_names)
  parts = {}
  for name in ("train", "val", "test"):
    if name in lists and name != "train":
      parts[name] = (name, np.arange(len(lists[name])))
    elif (part_of == name).any():
      parts[name] = ("train", np.flatnonzero(part_of == name))
  for name in missing.keys() & parts.keys():
    logging.info("%s: %d images taken from train", name, len(parts[name][1]))
  return parts


# --- The layout: which file belongs to which split and class.


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


def find_layout(root: FileTree) -> Layout:
  """Finds splits, classes and image files.

  Raises:
    ValueError: if there are no classes, only one class, a class without images, or a
      class of val or test that train lacks.
  """
  files, folders = root.entries()
  prefix = _wrapping_prefix(folders)
  # The folders directly below: splits, or else classes.
  top = {name[len(prefix) :] for name in folders if name.startswith(prefix)} - {""}
  top = sorted(name for name in top if "/" not in name)
  split_of = {
    name: _SPLIT_OF_FOLDER[name.lower()]
    for name in top
    if name.lower() in _SPLIT_OF_FOLDER
  }
  if "train" in split_of.values():
    _check_one_folder_each(split_of, root)
    if ignored := [name for name in top if name not in split_of]:
      logging.warning("%s: ignored beside train: %s", root.path, ", ".join(ignored))
    prefix_of = {split: f"{prefix}{name}/" for name, split in split_of.items()}
  elif split_of:
    raise ValueError(
      f"{root.path} holds {', '.join(split_of)} but no train folder; {EXPECTED}."
    )
  else:
    # No folder is named after a split: all of them are classes.
    prefix_of = {"train": prefix}
  classes = {
    split: _files_by_class(root, split, prefix_of[split], files, folders)
    for split in ("train", "val", "test")
    if split in prefix_of
  }
  # Train alone decides the classes and thus the labels: val and test may lack some.
  class_names = tuple(sorted(classes["train"]))
  if len(class_names) < 2:
    raise ValueError(
      f"{root.path} has only one class, {class_names[0]!r}; a classifier needs two or "
      f"more: one folder for each."
    )
  for split, members in classes.items():
    _check_classes(root, split, members, class_names)
  splits = {
    split: [(n, i) for i, c in enumerate(class_names) for n in members.get(c, ())]
    for split, members in classes.items()
  }
  return Layout(class_names, splits)


def _wrapping_prefix(folders: Sequence[str]) -> str:
  """Returns the prefix of the folders that everything lies in, or "".

  Archives often hold one folder around everything: "pets/train/cat/1.jpg".
  """
  prefix = ""
  while True:
    inner = [name[len(prefix) :] for name in folders if name.startswith(prefix)]
    top = {name.split("/")[0] for name in inner if name}
    # A single folder without folders of its own is a class, not a wrapping.
    if len(top) != 1 or not any("/" in name for name in inner):
      return prefix
    (only,) = top
    if only.lower() in _SPLIT_OF_FOLDER:
      return prefix
    prefix = f"{prefix}{only}/"


def _check_one_folder_each(split_of: Mapping[str, str], root: FileTree):
  """Checks that no split has two folders, such as val and validation."""
  for split in set(split_of.values()):
    same = [name for name, other in split_of.items() if other == split]
    if len(same) > 1:
      raise ValueError(
        f"{root.path} holds {' and '.join(same)}, which both mean {split}: keep one."
      )


def _files_by_class(
  root: FileTree,
  split: str,
  prefix: str,
  files: Sequence[str],
  folders: Sequence[str],
) -> dict[str, list[str]]:
  """Returns {class name: sorted image files} of one split.

  Args:
    root: the folder or archive; named in errors.
    split: the split; named in errors.
    prefix: the prefix of the folder that the split's classes lie in.
    files: names of all files of the root.
    folders: names of all folders of the root.
  """
  depth = prefix.count("/")
  members: dict[str, list[str]] = {}
  # Also the classes of folders without files, so that they can be named in an error.
  for folder in folders:
    if folder.startswith(prefix) and folder.count("/") == depth:
      members[_class_name(folder[len(prefix) :])] = []
  num_loose = 0
  for name in sorted(files):
    if not name.startswith(prefix):
      continue
    if not name.lower().endswith(decode.IMAGE_SUFFIXES):
      continue
    if name.count("/") == depth:
      num_loose += 1
    else:
      members[_class_name(name[len(prefix) :].split("/")[0])].append(name)
  place = f"{root.path}/{prefix}".rstrip("/")
  if not members:
    hint = f" {num_loose} images lie there without a class folder." if num_loose else ""
    raise ValueError(f"no class folders in {place}.{hint} In it, <class>/<image>.")
  if num_loose:
    logging.warning(
      "%s: ignored %d images that lie in no class folder", place, num_loose
    )
  for name, images in members.items():
    if not images:
      raise ValueError(
        f"the class {name!r} of {split} has no images in {place}/{name} (known: "
        f"{', '.join(decode.IMAGE_SUFFIXES)}). Add some or remove the folder."
      )
  return members


def _class_name(folder: str) -> str:
  """Returns the name of a folder's class."""
  # macOS decomposes accents: the same name has to be the same class everywhere.
  return unicodedata.normalize("NFC", folder)


def _check_classes(
  root: FileTree, split: str, members: Mapping[str, object], known: Sequence[str]
):
  """Checks that a split has no other classes than train; warns of missing ones."""
  unknown = sorted(set(members) - set(known))
  if unknown:
    raise ValueError(
      f"{split} of {root.path} has classes that train does not have: "
      f"{', '.join(map(repr, unknown))}.{trees.did_you_mean(unknown[0], known)} "
      f"Name the class folders alike in all splits."
    )
  if absent := sorted(set(known) - set(members)):
    logging.warning("%s has no images of: %s", split, ", ".join(absent))
