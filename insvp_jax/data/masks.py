"""Images with a mask each: which files, how they are read, and the split of them.

Letters in shapes: n images of a split, k classes, h and w height and width in pixels,
s side of the model's input.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
from typing import Any, ClassVar

from jaxtyping import Int, Int16, Int64, UInt8
import numpy as np

from insvp_jax.data import decode, prefetch
from insvp_jax.data.folder_or_zip import FileTree, open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.label_maps import IGNORED, LabelMap
from insvp_jax.data.preprocess import Preset
from insvp_jax.data.splits import StreamSplit

# Formats of masks; others change labels, or have more than one layer.
_LOSSLESS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
# Whole pictures of different sizes that wait to be used.
_AHEAD = 4
_AHEAD_HEADERS = 32

Image = UInt8[np.ndarray, "h w 3"]
Labels = Int16[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class MaskFiles:
  """Image files, each with the file of its mask, of one folder or archive.

  Attributes:
    images: the images.
    masks: names of the masks, in the order of the images.
    label_map: how the values of masks become classes.
  """

  images: ImageFiles
  masks: Sequence[str]
  label_map: LabelMap

  def __len__(self) -> int:
    """Returns the number of images, n."""
    return len(self.masks)

  def take(self, positions: Int[np.ndarray, "m"]) -> "MaskFiles":
    """Returns the files at some positions, in that order."""
    masks = [self.masks[i] for i in positions]
    return dataclasses.replace(self, images=self.images.take(positions), masks=masks)

  def read_mask(self, root: FileTree, position: int) -> Labels:
    """Returns the classes of an image's pixels; `IGNORED` for those without.

    Raises:
      ValueError: the mask does not decode, or a value of it is no class.
    """
    name = self.masks[position]
    where, options = root.full_path(name), self.images.options
    data = root.read(name, options.max_bytes)
    with decode.open_image(data, where, options) as image:
      try:
        return _labels(image, self.label_map)
      except _WrongMask as error:
        reason = str(error)
    raise ValueError(f"the mask {where} {reason}.")

  def read(self, root: FileTree, position: int) -> tuple[Image, Labels]:
    """Returns an image with the classes of its pixels.

    Raises:
      ValueError: one of them does not decode, or they differ in size.
    """
    images, name = self.images, self.images.names[position]
    data = root.read(name, images.options.max_bytes)
    pixels = decode.decode_image(data, root.full_path(name), images.options)
    labels = self.read_mask(root, position)
    _check_sizes(self, root, position, pixels.shape[1::-1], labels.shape[::-1])
    return pixels, labels

  def palette(self) -> tuple[int, ...]:
    """Returns the colours of the first mask's values, as `MaskStyle.colors`, if any.

    Raises:
      ValueError: the mask does not decode.
    """
    name, options = self.masks[0], self.images.options
    with open_folder_or_zip(self.images.root) as root:
      data = root.read(name, options.max_bytes)
      with decode.open_image(data, root.full_path(name), options) as image:
        numbers = (image.getpalette("RGB") or []) if image.mode in ("P", "PA") else []
    channels = (numbers[i::3] for i in range(3))
    return tuple(r * 65536 + g * 256 + b for r, g, b in zip(*channels, strict=True))

  def count(self) -> Int64[np.ndarray, "n v"]:
    """Returns how many pixels of each class each mask has; decodes all masks.

    Where the map names no classes there are as many as the highest label says.

    Raises:
      ValueError: a mask does not decode, has another size than its image or a value
        that is no class; the message names it.
    """
    with open_folder_or_zip(self.images.root) as root:

      def count(position: int) -> np.ndarray:
        name, options = self.images.names[position], self.images.options
        where = root.full_path(name)
        data = root.read(name, options.max_bytes)
        size = decode.image_size(data, where, options)
        labels = self.read_mask(root, position)
        # Before it is turned as its orientation says, which `read` looks at.
        if sorted(size) != sorted(labels.shape):
          _check_sizes(self, root, position, size, labels.shape[::-1])
        return np.bincount(labels[labels != IGNORED].astype(np.int64))

      counted = prefetch.ordered_map(count, range(len(self)), ahead=_AHEAD_HEADERS)
      with contextlib.closing(counted):
        counts = list(counted)
    width = len(self.label_map.names) or max(map(len, counts), default=0)
    rows = np.zeros((len(counts), width), np.int64)
    for row, of_mask in zip(rows, counts, strict=True):
      row[: len(of_mask)] = of_mask
    return rows


class _WrongMask(Exception):
  """What is wrong with a mask; not a ValueError, which decoders raise, too."""


def _labels(image: Any, label_map: LabelMap) -> Labels:
  """Returns the classes of an open PIL image's pixels."""
  if image.format not in _LOSSLESS:
    raise _WrongMask(
      f"is {image.format}, which does not keep labels as they were; store it as PNG"
    )
  if image.mode == "F":
    raise _WrongMask("has floating-point values, expected whole numbers")
  try:
    if label_map.colors:
      return label_map.of_colors(np.asarray(image.convert("RGB")))
    # Of a palette the indices are the labels, whatever their colours.
    if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
      raise _WrongMask(
        f"has colors (mode {image.mode}), expected one channel of class indices; say "
        "in the file config.data.classes which color each class has"
      )
    values = np.asarray(image.getchannel(0) if image.mode in ("LA", "PA") else image)
    if values.dtype == bool:
      values = values.astype(np.uint8)
    # PIL reads some 16-bit files as 32 bits.
    if values.min() < 0 or values.max() >= 2**16:
      raise _WrongMask(f"has the value {values.max()}, expected at most 16 bits")
    return label_map.of_values(values)
  except ValueError as error:
    raise _WrongMask(str(error)) from error


def _check_sizes(
  files: MaskFiles,
  root: FileTree,
  position: int,
  of_image: Sequence[int],
  of_mask: Sequence[int],
) -> None:
  """Checks that an image and its mask have one size, (width, height)."""
  if tuple(of_image) == tuple(of_mask):
    return
  where = root.full_path(files.images.names[position])
  raise ValueError(
    f"the image {where} has {of_image[0]} x {of_image[1]} pixels, but its mask "
    f"{files.masks[position]} has {of_mask[0]} x {of_mask[1]}; expected one size: make "
    "the mask anew, or leave both out."
  )


@dataclasses.dataclass(frozen=True)
class MaskSplit(StreamSplit):
  """A split of images with masks.

  Read as a `StreamSplit` it yields the images alone, as squares; `labels` is then the
  class that most pixels of an image have.

  Attributes:
    files: the images and masks; None is none.
    pixels: of each class in each mask, int64 [n, k].
  """

  COUNTED: ClassVar[str] = "pixels"

  files: MaskFiles | None = None
  pixels: Any = None

  @classmethod
  def of(
    cls,
    files: MaskFiles,
    pixels: Int64[np.ndarray, "n k"],
    preset: Preset,
    image_size: int,
  ) -> "MaskSplit":
    """Returns the split of some files.

    Args:
      files: the images and masks.
      pixels: from `MaskFiles.count`.
      preset: how images are resized to squares.
      image_size: side of the model's input in pixels.
    """
    labels = pixels.argmax(axis=1).astype(np.int32)
    images = dataclasses.replace(files.images, labels=labels)
    stream = images.stream(preset, image_size)
    # Sizes and names of masks are in what they hold: the counts of each of them.
    sha = hashlib.sha256(stream.identity.encode())
    sha.update(json.dumps(files.label_map.identity()).encode())
    sha.update(np.ascontiguousarray(pixels))
    return cls(
      labels=labels,
      size=stream.size,
      identity=sha.hexdigest(),
      open=stream.open,
      square=stream.square,
      stamp=stream.stamp,
      files=dataclasses.replace(files, images=images),
      pixels=pixels,
    )

  def class_counts(self, num_classes: int) -> Int[np.ndarray, "k"]:
    """Returns how many pixels each class has."""
    del num_classes
    return self.pixels.sum(axis=0)

  def take(self, indices: Int[np.ndarray, "m"]) -> "MaskSplit":
    return dataclasses.replace(
      super().take(indices),
      files=self.files.take(indices),
      pixels=self.pixels[indices],
    )

  def pairs(self, positions: Iterable[int]) -> Iterator[tuple[Image, Labels]]:
    """Yields images with the classes of their pixels, decoded some way ahead.

    Close the iterator to end its threads early.

    Args:
      positions: in the split.

    Raises:
      ValueError: an image or mask does not decode, or they differ in size.
    """
    with open_folder_or_zip(self.files.images.root) as root:
      read = functools.partial(self.files.read, root)
      with contextlib.closing(prefetch.ordered_map(read, positions, ahead=_AHEAD)) as p:
        yield from p
