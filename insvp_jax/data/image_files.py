"""Labelled image files of a folder or .zip archive, as a split.

`ImageFiles` says which files there are and what their labels are; the sources
`image_folder`, `vtab_folder`, `fgvc_folder` and `gtsrb` make such lists, each from
another layout. `ImageFiles.stream` makes a split of a list: each image is read by
`folder_or_zip`, decoded by `decode` and resized by `preprocess`, in the threads of
`prefetch`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from typing import Any

from absl import logging
from jaxtyping import Int, Int32
import ml_collections
import numpy as np

from insvp_jax.data import cache, decode, prefetch, preprocess
from insvp_jax.data.folder_or_zip import FileTree, open_folder_or_zip
from insvp_jax.data.load_or_stream import fits_in_memory, load_or_stream_all
from insvp_jax.data.splits import ArraySplit, Split, StreamSplit, TaskData
from insvp_jax.data.tasks import Task

# The most decoded images that wait to be used, in bytes and in number.
_AHEAD_BYTES = 2**26
_AHEAD = 256
# Files of a set that are looked at for 16-bit values, where none was decoded.
_LOOKED_AT = 16
# The most files that wait where only an image's size is read of each.
_AHEAD_HEADERS = 32


@dataclasses.dataclass(frozen=True)
class ImageFiles:
  """A list of n labelled image files.

  Attributes:
    root: path of the folder or archive, as the user gave it.
    names: names of the files in it, relative to the root.
    labels: class indices in [0, k).
    advice: what to do about a file that does not decode; ends the error's message.
    square: whether all images are known to be resized to squares.
    options: how the files are decoded. Lists of one set share them, so that what is
      found of its 16-bit images is found of the whole set.
  """

  root: str
  names: Sequence[str]
  labels: Int32[np.ndarray, "n"]
  advice: str = "Copy the file anew."
  square: bool = False
  options: decode.DecodeOptions = dataclasses.field(
    default_factory=decode.DecodeOptions
  )

  def __len__(self) -> int:
    """Returns the number of files, n."""
    return len(self.names)

  def take(self, positions: Int[np.ndarray, "m"]) -> "ImageFiles":
    """Returns the files at some positions, in that order."""
    names = [self.names[i] for i in positions]
    return dataclasses.replace(self, names=names, labels=self.labels[positions])

  def stream(self, preset: preprocess.Preset, image_size: int) -> StreamSplit:
    """Returns the split of these files, which are decoded while it is read.

    Args:
      preset: how images are resized.
      image_size: side of the model's input in pixels.
    """
    size = preset.stored_size(image_size)
    # Open for a moment: `_read` opens the root itself whenever the split is read.
    with open_folder_or_zip(self.root) as root:
      # The limits decide which images can be read.
      limits = [self.options.max_pixels, self.options.max_bytes]
      stamp = json.dumps([root.fingerprint(self.names), limits])
      sizes = root.sizes(self.names)
    # The digest is the same for a folder, an archive of it and a copy elsewhere: it
    # holds names below the files' common prefix and sizes, but no times.
    start = len(os.path.commonprefix(self.names))
    sha = hashlib.sha256(f"{preset.resize_key} {size}".encode())
    # Runs that are older than this setting keep their digests.
    if self.options.max_16bit:
      sha.update(f" {self.options.max_16bit}".encode())
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


def concatenate(first: ImageFiles, second: ImageFiles) -> ImageFiles:
  """Returns the files of `first`, then those of `second`; both have the same root."""
  return dataclasses.replace(
    first,
    names=[*first.names, *second.names],
    labels=np.concatenate([first.labels, second.labels]),
    square=first.square and second.square,
  )


def _decoder(
  images: ImageFiles, root: FileTree, resize: Callable[[np.ndarray], np.ndarray]
) -> Callable[[int], np.ndarray]:
  """Returns the function that maps a position to its decoded and resized image."""

  def decode_at(position: int) -> np.ndarray:
    name = images.names[position]
    with contextlib.ExitStack() as stack:
      try:
        data = root.read(name, images.options.max_bytes)
        opened = decode.decoded(data, root.full_path(name), images.options)
        pixels = stack.enter_context(opened)
      except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{reason}. {images.advice}".rstrip()) from error
      try:
        return resize(pixels)
      except ValueError as error:
        where = root.full_path(name)
        raise ValueError(f"{where}: {error} {images.advice}") from error

  return decode_at


def _num_ahead(preset: preprocess.Preset, image_size: int) -> int:
  """Returns how many decoded images may wait to be used."""
  bytes_each = 3 * preset.stored_size(image_size) ** 2
  # At least 8, so that the threads have work however large the images are.
  return max(8, min(_AHEAD, _AHEAD_BYTES // bytes_each))


def _read(
  images: ImageFiles,
  preset: preprocess.Preset,
  image_size: int,
  requests: Iterable[np.ndarray],
  whole: bool,
) -> Iterator[Any]:
  """Yields the decoded and resized images of each request, as `Split.read` does."""
  resize = preprocess.resize_whole if whole else preprocess.resize
  ahead = _num_ahead(preset, image_size)
  with open_folder_or_zip(images.root) as root:
    decode_at = _decoder(
      images, root, functools.partial(resize, preset, image_size=image_size)
    )
    read = functools.partial(prefetch.ordered_map, decode_at, ahead=ahead)
    # Closed before the root is: the threads read from it until they end.
    with contextlib.closing(prefetch.by_request(requests, read)) as groups:
      for group in groups:
        # Images of one size become one array.
        yield group if whole else np.stack(group)


def read_all(
  images: ImageFiles, preset: preprocess.Preset, image_size: int, skip_corrupt: bool
) -> Iterator[np.ndarray | None]:
  """Yields each image's stored square uint8 [s, s, 3], in order.

  Args:
    images: the files.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
    skip_corrupt: whether to yield None for an image that does not decode, with a
      warning, instead of raising.

  Raises:
    ValueError: if an image does not decode; the message names it.
  """
  resize = functools.partial(preprocess.resize, preset, image_size=image_size)
  with open_folder_or_zip(images.root) as root:
    decode_at = _decoder(images, root, resize)

    def attempt(position: int) -> np.ndarray | None:
      try:
        return decode_at(position)
      except ValueError as error:
        if not skip_corrupt:
          raise
        logging.warning("skipped: %s", error)
        return None

    ahead = _num_ahead(preset, image_size)
    yield from prefetch.ordered_map(attempt, range(len(images)), ahead=ahead)


def find_squares(
  images: ImageFiles,
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
) -> ImageFiles:
  """Returns the list with `square` set, where that decides how its split is kept.

  A small training set whose preset crops from whole images can be held in memory only
  if all images are squares. Finding out takes the header of each file, so nothing is
  read where the answer would not matter.

  Args:
    images: files that the model may be trained on.
    data_config: the section config.data; `resident_mb` and `cache_dir` are read.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
  """
  if images.square or not preset.crops_whole_images:
    return images
  stream = images.stream(preset, image_size)
  if not fits_in_memory(stream, data_config):
    return images

  def find() -> dict[str, np.ndarray]:
    with open_folder_or_zip(images.root) as root:
      check = functools.partial(_becomes_square, root, images.options, stream.size)
      checks = prefetch.ordered_map(check, images.names, ahead=_AHEAD_HEADERS)
      # `all` stops at the first elongated image; closing ends the threads then.
      with contextlib.closing(checks):
        return {"square": np.array(all(checks))}

  key = {"square": stream.digest, "stamp": stream.stamp}
  square = cache.cached_arrays(key, find, data_config.cache_dir)["square"]
  return dataclasses.replace(images, square=bool(square))


def _becomes_square(
  root: FileTree, options: decode.DecodeOptions, size: int, name: str
) -> bool:
  """Returns whether resizing the shorter side to `size` makes the image a square."""
  try:
    sides = decode.image_size(root.read(name, options.max_bytes), name, options)
    return size * max(sides) // min(sides) == size
  except ValueError:
    return True  # the error of decoding it later says what is wrong


def load_or_stream_lists(
  lists: Mapping[str, ImageFiles],
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
  decoded: Mapping[str, ArraySplit],
) -> dict[str, Split]:
  """Returns the splits of lists of files, each in memory or streamed.

  Args:
    lists: "train", and what there is of "val" and "test".
    data_config: the section config.data, as for `load_or_stream.load_or_stream`.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
    decoded: those of the splits that are in memory already.

  Returns:
    The splits by name, and "train_val": train followed by val.

  Raises:
    ValueError: if an image of a small split does not decode; the message names it.
  """
  lists = dict(lists)
  # No model is trained on test, so there squares or not makes no difference.
  for name in {"train", "val"} & set(lists):
    lists[name] = find_squares(lists[name], data_config, preset, image_size)
  train = lists["train"]
  lists["train_val"] = concatenate(train, lists["val"]) if "val" in lists else train
  streams = {name: part.stream(preset, image_size) for name, part in lists.items()}
  loaded = load_or_stream_all(streams, data_config, preset, decoded)
  _warn_of_unused_bits(train)
  return loaded


def _warn_of_unused_bits(images: ImageFiles) -> None:
  """Warns once of a set whose 16-bit images leave the upper bits unused.

  Where none was decoded, because images are cached or are decoded as they are read,
  some are looked at.
  """
  if not images.options.range_16bit.count:
    step = max(1, len(images) // _LOOKED_AT)
    with open_folder_or_zip(images.root) as root:
      for name in images.names[::step]:
        if not decode.may_be_16bit(root.head(name, decode.HEAD_BYTES) or b""):
          continue
        with contextlib.suppress(ValueError):  # which is told where it is read
          data = root.read(name, images.options.max_bytes)
          if decode.is_16bit(data, name, images.options):
            decode.decode_image(data, name, images.options)
  if unused := images.options.unused_bits():
    logging.warning("%s: %s", images.root, unused)


def task_data(
  task: Task,
  lists: Mapping[str, ImageFiles],
  class_names: Sequence[str],
  data_config: ml_collections.ConfigDict,
  image_size: int,
) -> TaskData:
  """Returns the data of a published task that is read from image files.

  Args:
    task: a row of `tasks.TASKS`.
    lists: "train", "val" and "test".
    class_names: one name per class.
    data_config: the section config.data.
    image_size: side of the model's input in pixels.

  Raises:
    ValueError: if an image of a small split does not decode; the message names it.
  """
  # Only a warning: a subset of the published images is good for a trial run.
  sizes = {name: len(images) for name, images in lists.items()}
  for warning in task.unpublished_sizes(sizes, data_config.subset):
    logging.warning("%s", warning)
  preset = preprocess.get_preset(data_config.preset)
  options = decode.DecodeOptions.from_config(data_config)
  lists = {n: dataclasses.replace(part, options=options) for n, part in lists.items()}
  return TaskData(
    task.name,
    tuple(class_names),
    load_or_stream_lists(lists, data_config, preset, image_size, {}),
    source=f"images of {data_config.root}",
    final_split=task.final_split(data_config.subset),
  )


# --- What the sources whose files are listed in text files share.


def check_listed_files(root: FileTree, names: Sequence[str], listed_in: str) -> None:
  """Checks that all listed files are there.

  Args:
    root: the folder or archive.
    names: names of the files in it.
    listed_in: how errors name the list.

  Raises:
    FileNotFoundError: if files are missing; the message names the first and the list.
  """
  missing = [
    name for name, size in zip(names, root.sizes(names), strict=True) if size < 0
  ]
  if missing:
    raise FileNotFoundError(
      f"{listed_in} names {len(missing)} files that are not there, first "
      f"{root.full_path(missing[0])}; unpack the images there, or copy the list anew."
    )


def read_text(root: FileTree, name: str) -> str:
  """Returns the content of a text file.

  Raises:
    ValueError: if it is not UTF-8.
  """
  try:
    # Editors on Windows begin a file with a byte order mark, which "utf-8-sig" drops.
    return root.read(name).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    where = root.full_path(name)
    raise ValueError(f"{where} is no text: {error}. Copy it anew.") from error


def parse_class_index(text: str | None, num_classes: int) -> int | None:
  """Returns the class index that a list gives as text; None if the text is not one."""
  # Not str.isdigit and int: they take "²" and "१" for digits, too.
  known = re.fullmatch("[0-9]{1,9}", text or "") and int(text) < num_classes
  return int(text) if known else None
