"""One's own images with masks: a folder or a .zip archive, to be segmented.

`images/<split>/x.jpg` has the mask `masks/<split>/x.png`, or the split's folder is
around both, or there are no splits. `annotations` and `labels` stand for `masks`, as in
ADE20K, which is such a folder: images/training, annotations/training and the same of
validation.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
from pathlib import Path, PurePosixPath

from absl import logging
import ml_collections
import numpy as np

from insvp_jax import files
from insvp_jax.data import cache, decode, image_files, label_maps, preprocess
from insvp_jax.data.folder_or_zip import FileTree, open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.label_maps import LabelMap
from insvp_jax.data.masks import MaskFiles, MaskSplit
from insvp_jax.data.sources import split_names
from insvp_jax.data.splits import Split, TaskData

_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
_MASKS = (
  *("masks", "mask", "annotations", "annotation", "labels", "label", "gt"),
  *("segmentationclass", "gtfine"),
)
_EXPECTED = (
  "expected images/<split>/<name>.jpg with masks/<split>/<name>.png, or "
  "<split>/images and <split>/masks, or images and masks alone"
)
# Files beside the images that name the classes, in this order; the last is ADE20K's.
_CLASSES = ("classes.json", "classes.csv", "classes.txt", "objectInfo150.txt")
# Positions of images that a split is drawn as.
_Parts = Mapping[str, tuple[str, np.ndarray]]


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Reads a folder or .zip of images and masks.

  All masks are decoded once, to count the pixels of each class and to find what is
  wrong with any of them before anything is trained; the counts are cached. A split
  "val" or "test" that is not there is drawn from train with `split_seed`: its share of
  the images; a fraction of 0 leaves it out.

  Args:
    data_config: the section config.data; `root`, `preset`, `classes`, `ignore_label`,
      `reduce_zero_label`, `val_fraction`, `test_fraction`, `split_seed`, `cache_dir`
      and those of `decode.DecodeOptions` are read.
    image_size: side of the model's input in pixels.

  Returns:
    The splits train, val, train_val (both together) and test, as far as they exist, as
    `MaskSplit`.

  Raises:
    FileNotFoundError: if the root or the file of classes is missing or unreadable.
    ValueError: if the layout, an image, a mask or the classes are not usable; the
      message names what.
  """
  usual = {"shots": 0, "fraction": 1, "splits_json": "", "skip_corrupt": False}
  for key, value in usual.items():
    if data_config[key] != value:
      raise ValueError(
        f"config.data.{key} is {data_config[key]!r}, which is of images with one label "
        f"each; set it to {value!r} for images with masks."
      )
  preset = preprocess.get_preset(data_config.preset)
  with open_folder_or_zip(data_config.root) as root:
    label_map = _label_map(root, data_config)
    pairs = _find_pairs(root)
    name, path = root.name, root.path
  options = decode.DecodeOptions.from_config(data_config)
  lists, counts = {}, {}
  for split, members in pairs.items():
    images, masks = zip(*members, strict=True)
    labels = np.zeros(len(images), np.int32)
    lists[split] = MaskFiles(
      ImageFiles(data_config.root, images, labels, options=options), masks, label_map
    )
    counts[split] = _count(lists[split], preset, image_size, data_config.cache_dir)
  num_classes = max(rows.shape[1] for rows in counts.values())
  if not num_classes:
    raise ValueError(
      f"all pixels of the masks in {path} are ignored; expected classes. Look at "
      "config.data.ignore_label and config.data.reduce_zero_label."
    )
  counts = {
    split: np.pad(rows, [(0, 0), (0, num_classes - rows.shape[1])])
    for split, rows in counts.items()
  }
  parts = _draw_missing_splits(
    {split: len(rows) for split, rows in counts.items()},
    {"val": data_config.val_fraction, "test": data_config.test_fraction},
    data_config.split_seed,
  )
  loaded: dict[str, Split] = {}
  both = ("train", "val") if "val" in parts else ("train",)
  for split, sources in {**{n: (n,) for n in parts}, "train_val": both}.items():
    part = _join([lists[parts[s][0]].take(parts[s][1]) for s in sources])
    pixels = np.concatenate([counts[parts[s][0]][parts[s][1]] for s in sources])
    loaded[split] = MaskSplit.of(part, pixels, preset, image_size)
  order = [n for n in ("train", "val", "train_val", "test") if n in loaded]
  return TaskData(
    name,
    label_maps.numbered(label_map, num_classes),
    {split: loaded[split] for split in order},
    source=f"images and masks of {path}",
    mask_style=label_map.style(num_classes, lists["train"].palette()),
  )


def is_one(path: str) -> bool:
  """Returns whether a folder or .zip has folders of images and of masks.

  Those of classes with such names would be taken for one, too.
  """
  try:
    with open_folder_or_zip(path) as root:
      kinds = {_place(name)[0] for name in root.entries().files}
  except (FileNotFoundError, ValueError):
    # Whoever reads it says what is wrong.
    return False
  return {"image", "mask"} <= kinds


def _place(name: str) -> tuple[str, tuple[str, ...]]:
  """Returns whether a file is an "image", a "mask" or neither, "", and its key.

  The key, of an image and of its mask, is the path without folder of the kind and
  ending.
  """
  path = PurePosixPath(name)
  folders = [folder.lower() for folder in path.parts[:-1]]
  if path.suffix.lower() in decode.IMAGE_SUFFIXES:
    for kind, words in (("image", _IMAGES), ("mask", _MASKS)):
      at = next((i for i, folder in enumerate(folders) if folder in words), None)
      if at is not None:
        return kind, (*folders[:at], *folders[at + 1 :], path.stem)
  return "", ()


def _label_map(root: FileTree, data_config: ml_collections.ConfigDict) -> LabelMap:
  """Returns how masks are read: by `data.classes`, or a file beside the images."""
  ignore, reduces = data_config.ignore_label, data_config.reduce_zero_label
  path = data_config.classes
  if path:
    if PurePosixPath(path).suffix.lower() not in (".txt", ".csv", ".json"):
      raise ValueError(f"config.data.classes is {path!r}; {label_maps.EXPECTED}.")
    text, where = _read_text(Path(path).expanduser()), path
  else:
    found = [
      n for n, size in zip(_CLASSES, root.sizes(_CLASSES), strict=True) if size >= 0
    ]
    if not found:
      return LabelMap(ignore_label=ignore, reduce_zero_label=reduces)
    path = found[0]
    text, where = image_files.read_text(root, path), root.full_path(path)
  suffix = PurePosixPath(path).suffix.lower()
  try:
    return label_maps.parse(text, suffix, ignore, reduces)
  except ValueError as error:
    raise ValueError(f"the file of classes {where} {error}.") from error


def _read_text(path: Path) -> str:
  """Returns the content of the file config.data.classes."""
  if not path.exists():
    raise FileNotFoundError(f"config.data.classes: there is no file {path}.")
  try:
    return files.read_bytes(path).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"config.data.classes: {path} is no text: {error}.") from error


def _find_pairs(root: FileTree) -> dict[str, list[tuple[str, str]]]:
  """Returns for each split the names of its images with those of their masks.

  Raises:
    ValueError: there are none, or an image has no mask.
  """
  images: dict[tuple[str, ...], str] = {}
  masks: dict[tuple[str, ...], str] = {}
  tables = {"image": images, "mask": masks}
  for name in sorted(root.entries().files):
    kind, key = _place(name)
    if not kind:
      continue
    if key in tables[kind]:
      raise ValueError(
        f"{root.full_path(name)} and {tables[kind][key]} have one name; expected one "
        "file for each image and each mask."
      )
    tables[kind][key] = name
  if not images or not masks:
    missing = "images" if not images else "masks"
    raise ValueError(f"there are no {missing} in {root.path}; {_EXPECTED}.")
  by_split: dict[str, list[tuple[str, str]]] = {}
  without: dict[str, list[str]] = {}
  for key, name in images.items():
    split = _split_of(key[:-1], root, name)
    if key in masks:
      by_split.setdefault(split, []).append((name, masks[key]))
    else:
      without.setdefault(split, []).append(name)
  for split, names in without.items():
    # The test images of a published set often come without masks.
    if split in by_split or split != "test":
      raise ValueError(
        f"the image {root.full_path(names[0])} has no mask"
        + (f", as {len(names) - 1} more have none" if len(names) > 1 else "")
        + f"; {_EXPECTED}."
      )
    logging.warning("%s: %d images of test have no masks", root.path, len(names))
  if unused := len(set(masks) - set(images)):
    logging.warning("%s: %d masks have no image", root.path, unused)
  if "train" not in by_split:
    raise ValueError(
      f"there is no train split in {root.path}, only {', '.join(by_split)}; "
      f"{_EXPECTED}."
    )
  return by_split


def _split_of(folders: Iterable[str], root: FileTree, name: str) -> str:
  """Returns the split of an image, by the folders around it; train if none says."""
  found = [parsed.split for f in folders if (parsed := split_names.parse(f))]
  if not found:
    return "train"
  split = "val" if found[0] == "eval" else found[0]
  if len(set(found)) > 1 or split == "unlabelled":
    raise ValueError(
      f"which split {root.full_path(name)} belongs to is not clear; {_EXPECTED}."
    )
  return split


def _count(
  pairs: MaskFiles, preset: preprocess.Preset, image_size: int, cache_dir: str
) -> np.ndarray:
  """Returns `MaskFiles.count`, from the cache if it has it."""
  stream = pairs.images.stream(preset, image_size)
  with open_folder_or_zip(pairs.images.root) as root:
    masks = root.fingerprint(pairs.masks)
  key = {
    "images": [stream.digest, stream.stamp],
    "masks": masks,
    "label_map": pairs.label_map.identity(),
  }
  make = functools.partial(_counted, pairs)
  return cache.cached_arrays(key, make, cache_dir)["pixels"]


def _counted(pairs: MaskFiles) -> dict[str, np.ndarray]:
  return {"pixels": pairs.count()}


def _join(parts: Sequence[MaskFiles]) -> MaskFiles:
  """Returns the files of some lists of one root, one after the other."""
  first, *rest = parts
  for part in rest:
    first = dataclasses.replace(
      first,
      images=image_files.concatenate(first.images, part.images),
      masks=[*first.masks, *part.masks],
    )
  return first


def _draw_missing_splits(
  sizes: Mapping[str, int], fractions: Mapping[str, float], seed: int
) -> _Parts:
  """Draws val and test from train where they are not on disk.

  Args:
    sizes: images of each split on disk.
    fractions: which share of train becomes val and test.
    seed: of the draw.

  Returns:
    For train, val and test, as far as they exist, the split on disk that their images
    belong to, and positions in it, ascending.
  """
  order = np.random.default_rng(seed).permutation(sizes["train"])
  parts, start = {}, 0
  for name, fraction in fractions.items():
    if name in sizes:
      parts[name] = (name, np.arange(sizes[name]))
    elif count := round(fraction * sizes["train"]):
      parts[name] = ("train", np.sort(order[start : start + count]))
      start += count
  if start >= sizes["train"]:
    raise ValueError(
      f"config.data.val_fraction and config.data.test_fraction leave none of the "
      f"{sizes['train']} images to train on; lower them."
    )
  return {"train": ("train", np.sort(order[start:])), **parts}
