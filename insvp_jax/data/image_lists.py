"""Image files with labels, in a folder or an archive, as a split."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from typing import Any

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import cache, decode, files, placement, preprocess, threads
from insvp_jax.data import splits as splits_lib
from insvp_jax.data.arrays import ArraySplit, TaskData
from insvp_jax.data.splits import Split, StreamSplit
from insvp_jax.data.tasks import Task

# Decoded images that wait to be used, in bytes, and their number at the most.
_AHEAD_BYTES = 2**26
_AHEAD = 256
# Files of which no more than their size is wanted.
_AHEAD_HEADERS = 32


@dataclasses.dataclass(frozen=True)
class ImageList:
  """Labelled image files.

  Attributes:
    root: the folder or archive, as a user names it.
    names: of the files in it.
    labels: their class indices.
    mend: what to do about a file that does not decode, for its error.
    square: whether all are known to be squares.
  """

  root: str
  names: Sequence[str]
  labels: np.ndarray
  mend: str = "Copy the file anew."
  square: bool = False

  def __len__(self) -> int:
    return len(self.names)

  def take(self, positions: np.ndarray) -> "ImageList":
    """Returns the files at some positions, in that order."""
    names = [self.names[i] for i in positions]
    return dataclasses.replace(self, names=names, labels=self.labels[positions])

  def stream(self, preset: preprocess.Preset, image_size: int) -> StreamSplit:
    """Returns the split of these files, decoded while it is read.

    Args:
      preset: says how images are resized.
      image_size: side of the model's input in pixels.
    """
    size = preset.stored_size(image_size)
    with files.open_root(self.root) as root:
      stamp = json.dumps(root.fingerprint(self.names))
      sizes = root.sizes(self.names)
    # Where in the root the files lie together does not matter.
    start = len(os.path.commonprefix(self.names))
    sha = hashlib.sha256(f"{preset.resize} {size}".encode())
    sha.update(json.dumps([[name[start:] for name in self.names], sizes]).encode())
    sha.update(np.ascontiguousarray(self.labels))
    return StreamSplit(
      labels=self.labels,
      size=size,
      identity=sha.hexdigest(),
      open=functools.partial(_read, self, preset, image_size),
      square=self.square or not preset.keeps_aspect,
      stamp=hashlib.sha256(stamp.encode()).hexdigest(),
    )


def join(first: ImageList, second: ImageList) -> ImageList:
  """Returns both, one after the other; they lie in the same root."""
  return dataclasses.replace(
    first,
    names=[*first.names, *second.names],
    labels=np.concatenate([first.labels, second.labels]),
    square=first.square and second.square,
  )


def _decoder(
  images: ImageList, root: files.Root, resize: Callable[[np.ndarray], np.ndarray]
) -> Callable[[int], np.ndarray]:
  """Returns the function from a position to its image."""

  def work(position: int) -> np.ndarray:
    name = images.names[position]
    try:
      pixels = decode.decode(root.read(name), root.describe(name))
    except ValueError as error:
      raise ValueError(f"{error} {images.mend}".rstrip()) from error
    return resize(pixels)

  return work


def _ahead(preset: preprocess.Preset, image_size: int) -> int:
  bytes_each = 3 * preset.stored_size(image_size) ** 2
  return max(8, min(_AHEAD, _AHEAD_BYTES // bytes_each))


def _read(
  images: ImageList,
  preset: preprocess.Preset,
  image_size: int,
  requests: Iterable[np.ndarray],
  whole: bool,
) -> Iterator[Any]:
  """Yields the decoded and resized images of each request."""
  resize = preprocess.resize_whole if whole else preprocess.resize
  ahead = _ahead(preset, image_size)
  with files.open_root(images.root) as root:
    work = _decoder(
      images, root, functools.partial(resize, preset, image_size=image_size)
    )
    read = functools.partial(threads.ordered_map, work, ahead=ahead)
    with contextlib.closing(splits_lib.grouped(requests, read)) as pieces:
      for piece in pieces:
        # Images of one size become one array.
        yield piece if whole else np.stack(piece)


def read_all(
  images: ImageList, preset: preprocess.Preset, image_size: int, skip_corrupt: bool
) -> Iterator[np.ndarray | None]:
  """Yields each image's stored square, in order.

  Args:
    images: the files.
    preset: says how images are resized.
    image_size: side of the model's input in pixels.
    skip_corrupt: yield None for an image that does not decode, with a warning.

  Raises:
    ValueError: an image does not decode; the message names it.
  """
  resize = functools.partial(preprocess.resize, preset, image_size=image_size)
  with files.open_root(images.root) as root:
    work = _decoder(images, root, resize)

    def attempt(position: int) -> np.ndarray | None:
      try:
        return work(position)
      except ValueError as error:
        if not skip_corrupt:
          raise
        logging.warning("skipped: %s", error)
        return None

    ahead = _ahead(preset, image_size)
    yield from threads.ordered_map(attempt, range(len(images)), ahead=ahead)


def find_squares(
  images: ImageList,
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
) -> ImageList:
  """Returns the list with `square` found out, where that decides where images stay.

  Args:
    images: the model may be trained on them.
    data_config: `resident_mb` and `cache_dir`.
    preset: says how images are resized.
    image_size: side of the model's input in pixels.
  """
  if images.square or not placement.crops_whole(preset):
    return images
  stream = images.stream(preset, image_size)
  if not placement.fits(stream, data_config):
    return images

  def find() -> dict[str, np.ndarray]:
    with files.open_root(images.root) as root:
      check = functools.partial(_is_square, root, stream.size)
      found = threads.ordered_map(check, images.names, ahead=_AHEAD_HEADERS)
      with contextlib.closing(found):
        return {"square": np.array(all(found))}

  key = {"square": stream.digest, "stamp": stream.stamp}
  square = cache.cached_arrays(key, find, data_config.cache_dir)["square"]
  return dataclasses.replace(images, square=bool(square))


def _is_square(root: files.Root, size: int, name: str) -> bool:
  """Returns whether an image's shorter and longer side are resized to the same."""
  from PIL import Image

  try:
    with Image.open(io.BytesIO(root.read(name))) as image:
      return size * max(image.size) // min(image.size) == size
  except Exception:
    return True  # decoding it tells what is wrong


def place(
  lists: Mapping[str, ImageList],
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
  decoded: Mapping[str, ArraySplit],
) -> dict[str, Split]:
  """Returns splits in memory or streamed; train_val is train followed by val.

  Args:
    lists: train, and what there is of val and test.
    data_config: see `placement.place`.
    preset: says how images are resized.
    image_size: side of the model's input in pixels.
    decoded: those that are in memory already.

  Raises:
    ValueError: an image of a small split does not decode; the message names it.
  """
  lists = dict(lists)
  for name in {"train", "val"} & set(lists):
    lists[name] = find_squares(lists[name], data_config, preset, image_size)
  train = lists["train"]
  lists["train_val"] = join(train, lists["val"]) if "val" in lists else train
  streams = {name: part.stream(preset, image_size) for name, part in lists.items()}
  return placement.place_all(streams, data_config, preset, decoded)


def task_data(
  task: Task,
  lists: Mapping[str, ImageList],
  class_names: Sequence[str],
  data_config: ml_collections.ConfigDict,
  image_size: int,
) -> TaskData:
  """Returns a published task that is read from image files.

  Args:
    task: a row of `tasks.TASKS`.
    lists: train, val and test.
    class_names: one per class.
    data_config: the section config.data.
    image_size: side of the model's input in pixels.

  Raises:
    ValueError: an image of a small split does not decode; the message names it.
  """
  sizes = {name: len(images) for name, images in lists.items()}
  for warning in task.unpublished_sizes(sizes, data_config.subset):
    logging.warning("%s", warning)
  preset = preprocess.get_preset(data_config.preset)
  return TaskData(
    task.name,
    tuple(class_names),
    place(lists, data_config, preset, image_size, {}),
    source=f"images of {data_config.root}",
    final_split=task.final_split(data_config.subset),
  )


def check_files(root: files.Root, names: Sequence[str], listed_in: str) -> None:
  """Checks that listed files are there.

  Raises:
    FileNotFoundError: one is not; the message names it and the list.
  """
  missing = [
    name for name, size in zip(names, root.sizes(names), strict=True) if size < 0
  ]
  if missing:
    raise FileNotFoundError(
      f"{listed_in} names {len(missing)} files that are not there, first "
      f"{root.describe(missing[0])}; unpack the images there, or copy the list anew."
    )


def read_text(root: files.Root, name: str) -> str:
  """Returns the text of a list.

  Raises:
    ValueError: it is none.
  """
  try:
    return root.read(name).decode("utf-8-sig")  # Windows' editors write a mark
  except UnicodeDecodeError as error:
    where = root.describe(name)
    raise ValueError(f"{where} is no text: {error}. Copy it anew.") from error


def class_index(text: str | None, num_classes: int) -> int | None:
  """Returns the label that a list gives as text; None if it is no class index."""
  known = re.fullmatch("[0-9]{1,9}", text or "") and int(text) < num_classes
  return int(text) if known else None
