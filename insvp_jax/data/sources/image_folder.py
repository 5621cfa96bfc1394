"""One's own images: a folder or a .zip archive with one sub-folder per class, or a CSV.

`folder_layout` or `labels_csv` say which file belongs to which split and class; `load`
decodes small splits, draws the splits that are missing and returns the task.
"""

from collections.abc import Mapping, Sequence
import functools
import os

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
from insvp_jax.data.folder_or_zip import open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.sources import labels_csv, stored_splits
from insvp_jax.data.sources.folder_layout import Layout, find_layout
from insvp_jax.data.splits import ArraySplit, TaskData
from insvp_jax.data.subsets import stratified_parts

# What to do about a file that does not decode; ends the error's message.
_ADVICE = (
  "Mend or remove the file, or set config.data.skip_corrupt=True to leave such files "
  "out."
)


def load(
  data_config: ml_collections.ConfigDict,
  image_size: int,
  layout: Layout | None = None,
) -> TaskData:
  """Reads a folder or .zip of images.

  It holds `train/<class>/...` and, if wanted, `val/<class>/...` and `test/<class>/...`,
  or folders whose names say the same (`split_names`); or just `<class>/...`. A split
  that is not there is taken from train: its share of each class, drawn with
  `split_seed`; a fraction of 0 leaves the split out. Labels follow the sorted names of
  train's classes, in every split. An archive is read in place; one folder around
  everything, or around all of a split, is fine.

  With `labels`, a CSV says which images there are, and what they are of; see
  `labels_csv`. What is drawn is drawn alike.

  Args:
    data_config: the section config.data; `root`, `labels` and its columns, `preset`,
      `val_fraction`, `test_fraction`, `split_seed`, `skip_corrupt`, `resident_mb`,
      `cache_dir` and those of `decode.DecodeOptions` are read.
    image_size: side of the model's input in pixels.
    layout: which files there are, from `join_layouts`; None finds them.

  Returns:
    The splits train, val, train_val (both together) and test, as far as they exist; the
    large ones are streamed.

  Raises:
    FileNotFoundError: if the root is missing or unreadable.
    ValueError: if the layout, a class or an image is not usable; the message names it.
  """
  preset = preprocess.get_preset(data_config.preset)
  path, are_listed = labels_csv.root_of(data_config), True
  # Open for a moment: splits open the root themselves whenever they are read.
  with open_folder_or_zip(path) as root:
    if layout is not None:
      pass
    elif data_config.splits_json:
      *stored, are_listed = stored_splits.read(root, data_config.splits_json)
      layout = Layout(*stored)
    elif data_config.labels:
      layout = labels_csv.find_layout(root, data_config)
    else:
      layout, are_listed = find_layout(root), False
  advice = "" if data_config.skip_corrupt else _ADVICE
  # Shared, so that what is found of 16-bit images is found of the whole set.
  options = decode.DecodeOptions.from_config(data_config)
  lists = {}
  for split, members in layout.splits.items():
    names, labels = zip(*members, strict=True)
    labels = np.array(labels, np.int32)
    lists[split] = ImageFiles(path, names, labels, advice, options=options)
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
  parts = draw_missing_splits(
    {split: images.labels for split, images in readable.items()},
    fractions,
    data_config.split_seed,
    layout.class_names,
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
  return TaskData(
    root.name or "images",  # the root of a file system has none
    layout.class_names,
    splits,
    skipped,
    source,
    files=files,
    are_listed=are_listed,
  )


def join_layouts(
  paths: Mapping[str, str], data_config: ml_collections.ConfigDict
) -> tuple[str, Layout]:
  """Returns one layout of splits that lie apart, and the folder around all of them.

  Args:
    paths: of "train" and of "val" or "test": folders of classes, or CSVs (see
      `is_csv`). Only train may have splits of its own.
    data_config: the section config.data; `root` and the columns are read of CSVs.

  Returns:
    (path of the folder, layout), for `load`.

  Raises:
    ValueError: a split is there twice, is an archive, or has a class that train lacks.
    FileNotFoundError: a path is not there.
  """
  roots: dict[str, str] = {}
  layouts: dict[str, Layout] = {}
  for split, path in paths.items():
    config = data_config.copy_and_resolve_references()
    if is_csv(path):
      config.labels = path
    else:
      config.root = path
    roots[split] = os.path.abspath(os.path.expanduser(labels_csv.root_of(config)))
    if os.path.isfile(roots[split]):
      raise ValueError(
        f"{split} is in {roots[split]}; of several paths each has to be a folder or a "
        "CSV of files beside it: unpack the archive, or make one of all splits."
      )
    with open_folder_or_zip(roots[split]) as root:
      is_listed = bool(config.labels)
      layouts[split] = (
        labels_csv.find_layout(root, config) if is_listed else find_layout(root)
      )
  known, around = layouts["train"].class_names, os.path.commonpath(roots.values())
  joined: dict[str, list[tuple[str, int]]] = {}
  for given, layout in layouts.items():
    others = set(layout.splits) - {"train"}
    if given == "train":
      others &= set(paths)
    if others:
      raise ValueError(
        f"{paths[given]}, given as {given}, has a split {min(others)} in it; leave one "
        "of them out, or give the folder of its classes."
      )
    for split, members in layout.splits.items():
      name = split if given == "train" else given
      if unknown := sorted(set(layout.class_names) - set(known)):
        raise ValueError(
          f"{paths[given]} has the class {unknown[0]!r}, which train does not have."
          f"{trees.did_you_mean(unknown[0], known)}"
        )
      start = os.path.relpath(roots[given], around)
      start = "" if start == "." else f"{start}/"
      own = [known.index(class_name) for class_name in layout.class_names]
      joined[name] = sorted(
        ((f"{start}{file}", own[label]) for file, label in members),
        key=lambda member: (member[1], member[0]),
      )
  return around, Layout(known, joined)


def is_csv(path: str) -> bool:
  """Returns whether a path is that of a table of labels, not of images."""
  return path.lower().endswith((".csv", ".tsv", ".txt")) and not os.path.isdir(path)


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


def draw_missing_splits(
  labels: Mapping[str, Int[np.ndarray, "_"]],
  fractions: Mapping[str, float],
  seed: int,
  class_names: Sequence[str],
) -> dict[str, tuple[str, Int[np.ndarray, "_"]]]:
  """Draws val and test from train where they are not on disk.

  Args:
    labels: of the readable images of each split that there is.
    fractions: which fraction of train becomes val and test.
    seed: the seed of the draw.
    class_names: how errors name the classes.

  Returns:
    For train, val and test, as far as they exist, the split there is that their images
    belong to, and positions in it.
  """
  missing = {
    name: fraction for name, fraction in fractions.items() if name not in labels
  }
  # What there is stays as it is: nothing is drawn from val or test, nor into them.
  part_of = stratified_parts(labels["train"], missing, seed, class_names)
  parts = {}
  for name in ("train", "val", "test"):
    if name in labels and name != "train":
      parts[name] = (name, np.arange(len(labels[name])))
    elif (part_of == name).any():
      parts[name] = ("train", np.flatnonzero(part_of == name))
  for name in missing.keys() & parts.keys():
    logging.info("%s: %d images taken from train", name, len(parts[name][1]))
  return parts
