"""One's own images: a folder or a .zip archive with one sub-folder per class."""

from collections.abc import Mapping, Sequence
import functools

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import cache, files, image_lists, layout, placement, preprocess
from insvp_jax.data.arrays import ArraySplit, TaskData
from insvp_jax.data.image_lists import ImageList
from insvp_jax.data.stratify import stratified_parts

_MEND = (
  "Mend or remove the file, or set config.data.skip_corrupt=True to leave such files "
  "out."
)


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Reads a folder or .zip of images.

  It holds `train/<class>/...` and, if wanted, `val/<class>/...` and
  `test/<class>/...`; or just `<class>/...`. A split that is not there is taken
  from train: from each class its share, drawn with `split_seed`; a fraction of 0
  leaves the split out. Labels follow the sorted names of train's classes, in
  every split. An archive is read in place; one folder around everything is fine.

  Args:
    data_config: `root`, `preset`, `val_fraction`, `test_fraction`, `split_seed`,
      `skip_corrupt`, `resident_mb`, `cache_dir`.
    image_size: side of the model's input in pixels.

  Returns:
    Splits train, val, train_val (both together) and test, as far as they exist; the
    large ones are streamed.

  Raises:
    FileNotFoundError: the root is missing or unreadable.
    ValueError: the layout, a class or an image is not usable; the message names
      it.
  """
  preset = preprocess.get_preset(data_config.preset)
  with files.open_root(data_config.root) as root:
    found = layout.find(root)
  mend = "" if data_config.skip_corrupt else _MEND
  lists = {}
  for split, members in found.splits.items():
    names, labels = zip(*members, strict=True)
    lists[split] = ImageList(data_config.root, names, np.array(labels, np.int32), mend)
  readable, decoded = _read(lists, data_config, preset, image_size)
  for split, images in readable.items():
    if lost := sorted(set(lists[split].labels) - set(images.labels)):
      raise ValueError(
        f"the class {found.class_names[lost[0]]!r} of {split} in {root.path} has no "
        f"readable images: all of its files were skipped as corrupt."
      )
  fractions = {"val": data_config.val_fraction, "test": data_config.test_fraction}
  parts = _divide(readable, fractions, data_config.split_seed, found.class_names)
  files_of = {name: readable[split].take(at) for name, (split, at) in parts.items()}
  in_memory = {
    name: decoded[split].take(at)
    for name, (split, at) in parts.items()
    if split in decoded
  }
  splits = image_lists.place(files_of, data_config, preset, image_size, in_memory)
  splits["train_val"] = splits.pop("train_val")  # the last, as lines list them
  skipped = sum(len(lists[split]) - len(readable[split]) for split in lists)
  source = f"images of {root.path}"
  return TaskData(root.name, found.class_names, splits, skipped, source)


def _read(
  lists: Mapping[str, ImageList],
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
) -> tuple[dict[str, ImageList], dict[str, ArraySplit]]:
  """Returns the readable files of each split, and the small splits decoded.

  What is on disk is decoded and cached as a whole, so that other fractions and seeds
  find it again. Large splits are only checked, and only where corrupt files are to be
  left out.
  """
  lists, skip = dict(lists), bool(data_config.skip_corrupt)
  groups: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
  for split in lists:
    if split != "test":
      lists[split] = image_lists.find_squares(
        lists[split], data_config, preset, image_size
      )
    stream = lists[split].stream(preset, image_size)
    trains = split == "train"
    keep = not placement.stays_in_files(stream, data_config, preset, trains=trains)
    if keep or skip:
      groups[keep][split] = [stream.digest, stream.stamp]
  made: dict[str, np.ndarray] = {}
  for keep, contents in groups.items():
    some = {split: lists[split] for split in contents}
    made |= cache.cached_arrays(
      {"folder": contents, "skip_corrupt": skip, "keep": keep},
      functools.partial(_decode, some, preset, image_size, skip, keep),
      data_config.cache_dir,
    )
  decoded = {}
  for split, images in lists.items():
    if (key := f"{split}_readable") in made and not made[key].all():
      lists[split] = images.take(np.flatnonzero(made[key]))
    if (key := f"{split}_images") in made:
      decoded[split] = ArraySplit(made[key], lists[split].labels)
  return lists, decoded


def _decode(
  lists: Mapping[str, ImageList],
  preset: preprocess.Preset,
  image_size: int,
  skip_corrupt: bool,
  keep: bool,
) -> dict[str, np.ndarray]:
  """Returns which files are readable and, with `keep`, the images of those."""
  size = preset.stored_size(image_size)
  made = {}
  for split, images in lists.items():
    readable = np.ones(len(images), bool)
    pixels = np.empty((len(images) if keep else 0, size, size, 3), np.uint8)
    read = image_lists.read_all(images, preset, image_size, skip_corrupt)
    for i, image in enumerate(read):
      readable[i] = image is not None
      if keep and readable[i]:
        pixels[i] = image
    made[f"{split}_readable"] = readable
    if keep:
      made[f"{split}_images"] = pixels if readable.all() else pixels[readable]
  return made


def _divide(
  lists: Mapping[str, ImageList],
  fractions: Mapping[str, float],
  seed: int,
  class_names: Sequence[str],
) -> dict[str, tuple[str, np.ndarray]]:
  """Returns for train, val and test which images of which split on disk they are."""
  missing = {
    name: fraction for name, fraction in fractions.items() if name not in lists
  }
  drawn = stratified_parts(lists["train"].labels, missing, seed, class_names)
  parts = {}
  for name in ("train", "val", "test"):
    if name in lists and name != "train":
      parts[name] = (name, np.arange(len(lists[name])))
    elif (drawn == name).any():
      parts[name] = ("train", np.flatnonzero(drawn == name))
  for name in missing.keys() & parts.keys():
    logging.info("%s: %d images taken from train", name, len(parts[name][1]))
  return parts
