"""One's own images: a folder or a .zip archive with one sub-folder per class."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import os

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import cache, decode, files, layout, preprocess
from insvp_jax.data.arrays import ArraySplit, TaskData, concatenate
from insvp_jax.data.stratify import stratified_parts

_CHUNK = 16


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Reads a folder or .zip of images.

  It holds `train/<class>/...` and, if wanted, `val/<class>/...` and
  `test/<class>/...`; or just `<class>/...`. A split that is not there is taken
  from train: from each class its share, drawn with `split_seed`; a fraction of 0
  leaves the split out. Labels follow the sorted names of train's classes, in
  every split. An archive is read in place; one folder around everything is fine.

  Args:
    data_config: `root`, `preset`, `val_fraction`, `test_fraction`, `split_seed`,
      `skip_corrupt`, `cache_dir`.
    image_size: side of the model's input in pixels.

  Returns:
    Splits train, val, train_val (both together) and test, as far as they exist.

  Raises:
    FileNotFoundError: the root is missing or unreadable.
    ValueError: the layout, a class or an image is not usable; the message names
      it.
  """
  preset = preprocess.get_preset(data_config.preset)
  with files.open_root(data_config.root) as root:
    found = layout.find(root)
    key = {
      "task": "folder",
      "files": root.fingerprint(found.names()),
      "classes": found.class_names,
      "resize": preset.resize,
      "size": preset.stored_size(image_size),
      "skip_corrupt": bool(data_config.skip_corrupt),
    }

    def read() -> TaskData:
      return _read(root, found, preset, image_size, data_config.skip_corrupt)

    # Splitting is cheap, so the cache holds what is on disk and each image once.
    data = cache.cached(key, read, data_config.cache_dir)
  fractions = {"val": data_config.val_fraction, "test": data_config.test_fraction}
  splits = _complete(data, fractions, data_config.split_seed)
  # An equal archive may have been cached under another name.
  source = f"images of {root.path}"
  return TaskData(root.name, data.class_names, splits, data.skipped, source)


def _read(
  root: files.Root,
  found: layout.Layout,
  preset: preprocess.Preset,
  image_size: int,
  skip_corrupt: bool,
) -> TaskData:
  """Decodes all files that the layout lists."""
  splits, skipped = {}, 0
  for split_name, members in found.splits.items():
    names = [name for name, _ in members]
    images, readable = _decode_all(root, names, preset, image_size, skip_corrupt)
    labels = np.array([label for _, label in members], np.int32)
    skipped += int((~readable).sum())
    lost = np.setdiff1d(labels, labels[readable])
    if lost.size:
      raise ValueError(
        f"the class {found.class_names[lost[0]]!r} of {split_name} in {root.path} "
        f"has no readable images: all of its files were skipped as corrupt."
      )
    splits[split_name] = ArraySplit(images, labels)
    if not readable.all():
      splits[split_name] = splits[split_name].take(np.flatnonzero(readable))
  return TaskData(root.name, found.class_names, splits, skipped)


def _decode_all(
  root: files.Root,
  names: Sequence[str],
  preset: preprocess.Preset,
  image_size: int,
  skip_corrupt: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (images uint8 [n, s, s, 3], readable bool [n]) in the names' order."""
  size = preset.stored_size(image_size)
  images = np.zeros((len(names), size, size, 3), np.uint8)
  readable = np.ones(len(names), bool)

  def work(start: int):
    for i in range(start, min(start + _CHUNK, len(names))):
      try:
        pixels = decode.decode(root.read(names[i]), root.describe(names[i]))
      except ValueError as error:
        if not skip_corrupt:
          raise ValueError(
            f"{error} Mend or remove the file, or set config.data.skip_corrupt=True "
            f"to leave such files out."
          ) from error
        logging.warning("skipped: %s", error)
        readable[i] = False
      else:
        images[i] = preprocess.resize(preset, pixels, image_size)

  with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2))) as pool:
    # The iteration raises the first file's error and cancels what has not begun.
    for _ in pool.map(work, range(0, len(names), _CHUNK)):
      pass
  return images, readable


def _complete(
  data: TaskData, fractions: Mapping[str, float], seed: int
) -> dict[str, ArraySplit]:
  """Returns the splits on disk, those taken from train, and train_val."""
  missing = {
    name: fraction for name, fraction in fractions.items() if name not in data.splits
  }
  train = data.splits["train"]
  parts = stratified_parts(train.labels, missing, seed, data.class_names)
  splits = {"train": train.take(np.flatnonzero(parts == "train"))}
  for name in ("val", "test"):
    if name in data.splits:
      splits[name] = data.splits[name]
    elif (parts == name).any():
      splits[name] = train.take(np.flatnonzero(parts == name))
      logging.info("%s: %d images taken from train", name, len(splits[name]))
  splits["train_val"] = (
    concatenate(splits["train"], splits["val"]) if "val" in splits else splits["train"]
  )
  return splits
