"""CIFAR-10 from two `.npz` files of JPEG bytes, for training the backbone in the box.

Each file holds `jpeg` (uint8, the bytes of all JPEG files end to end), `offsets` (int64
[n + 1], where each begins), `labels` (int32 [n]) and `class_names`.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_collections
import numpy as np

from insvp_jax import files
from insvp_jax.data import cache, decode, preprocess
from insvp_jax.data.splits import ArraySplit, TaskData
from insvp_jax.data.subsets import stratified_mask

_NUM_VAL = 5000
# Images that a thread decodes at a time.
_CHUNK = 500
# What a file may hold, in bytes and in images: some times what CIFAR-10 has.
_MAX_BYTES = 2**29
_MAX_IMAGES = 10**6


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Reads CIFAR-10: train (45,000), val (5,000), train_val (50,000) and test.

  Args:
    data_config: the section config.data; `root` is the folder of `cifar10_train.npz`
      and `cifar10_test.npz`; `split_seed` draws as many val images of each class;
      `preset` and `cache_dir` are read, too.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is not of this format.
  """
  options = decode.DecodeOptions.from_config(data_config)
  preset = preprocess.get_preset(data_config.preset)
  paths = {
    split: Path(data_config.root).expanduser() / f"cifar10_{split}.npz"
    for split in ("train", "test")
  }
  for path in paths.values():
    if not path.is_file():
      raise FileNotFoundError(
        f"no file {path}. Point config.data.root to the folder that holds "
        f"cifar10_train.npz and cifar10_test.npz."
      )
  key = {
    "task": "cifar10_npz",
    "files": [cache.file_fingerprint(path) for path in paths.values()],
    "resize": preset.resize_key,
    "size": preset.stored_size(image_size),
  }

  def read() -> TaskData:
    train, class_names = _read(paths["train"], preset, image_size, options)
    test, _ = _read(paths["test"], preset, image_size, options)
    splits = {"train_val": train, "test": test}
    return TaskData("cifar10_npz", class_names, splits, source="cifar10 as JPEG")

  # train and val are cheap to draw, so the cache holds each image only once.
  data = cache.cached_task(key, read, data_config.cache_dir)
  everything = data.splits["train_val"]
  num_val = min(_NUM_VAL, len(everything) // 10)
  is_val = stratified_mask(everything.labels, num_val, data_config.split_seed)
  splits = {
    "train": everything.take(np.flatnonzero(~is_val)),
    "val": everything.take(np.flatnonzero(is_val)),
    "train_val": everything,
    "test": data.splits["test"],
  }
  return TaskData(data.name, data.class_names, splits, source=data.source)


def _read(
  path: Path,
  preset: preprocess.Preset,
  image_size: int,
  options: decode.DecodeOptions,
):
  """Returns (ArraySplit, class names) of one file."""
  names = ("jpeg", "offsets", "labels", "class_names")
  try:
    stored = files.read_npz(path, names, _MAX_BYTES)
    jpeg, offsets, labels, names = (stored[name] for name in names)
    _check_arrays(jpeg, offsets, labels, names)
  except (ValueError, OSError) as error:
    raise ValueError(
      f"{path} is damaged or not of the expected format (jpeg, offsets, labels, "
      f"class_names): {error}"
    ) from error
  labels = labels.astype(np.int32)
  size = preset.stored_size(image_size)
  images = np.empty((len(labels), size, size, 3), np.uint8)

  def decode_chunk(start: int):
    for i in range(start, min(start + _CHUNK, len(labels))):
      data = jpeg[offsets[i] : offsets[i + 1]].tobytes()
      pixels = decode.decode_image(data, f"image {i} of {path}", options)
      images[i] = preprocess.resize(preset, pixels, image_size)

  with ThreadPoolExecutor(4) as pool:
    # A list, so that an error of a thread is raised here.
    list(pool.map(decode_chunk, range(0, len(labels), _CHUNK)))
  return ArraySplit(images, labels), tuple(str(name) for name in names)


def _check_arrays(jpeg, offsets, labels, names):
  """Checks that the arrays of a file belong together."""
  for array, kinds in ((jpeg, "u"), (offsets, "iu"), (labels, "iu"), (names, "U")):
    if array.ndim != 1 or array.dtype.kind not in kinds:
      raise ValueError(f"an array is {array.dtype}{list(array.shape)}")
  if jpeg.dtype != np.uint8:
    raise ValueError(f"jpeg is {jpeg.dtype}, expected uint8")
  if not 0 < len(labels) <= _MAX_IMAGES or len(offsets) != len(labels) + 1:
    raise ValueError(f"there are {len(labels)} labels and {len(offsets)} offsets")
  if offsets[0] < 0 or offsets[-1] > len(jpeg) or (offsets[1:] < offsets[:-1]).any():
    raise ValueError("the offsets do not lie in jpeg, one after the other")
  if labels.min() < 0 or labels.max() >= len(names):
    raise ValueError(f"labels go beyond the {len(names)} classes")
