"""What every data source returns: a task's splits, in memory or streamed.

A split is labelled images that can be read in any order. The two kinds behave alike
and differ only in where the pixels are: `ArraySplit` holds them decoded in memory,
`StreamSplit` decodes what is asked for when it is asked for and keeps nothing. Letters
in shapes: n examples of a split, m those of one request, h and w height and width in
pixels, k classes.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
from typing import Any, ClassVar

from jaxtyping import Int, Int32, UInt8
import numpy as np

from insvp_jax.data.label_maps import MaskStyle
from insvp_jax.errors import printable

# Images that `to_memory` has decoded at a time.
_CHUNK = 256

# Positions in a split; each request may have another number of them.
Indices = Int[np.ndarray, "_"]
# The images of one request: stacked where they are of one size.
Pixels = UInt8[np.ndarray, "m h w 3"] | Sequence[UInt8[np.ndarray, "h w 3"]]


class Split(abc.ABC):
  """The labelled images of one split.

  Attributes:
    labels: class indices in [0, k), in the split's own order.
  """

  # What `class_counts` counts.
  COUNTED: ClassVar[str] = "images"

  labels: Int32[np.ndarray, "n"]

  def __len__(self) -> int:
    """Returns the number of examples, n."""
    return len(self.labels)

  def class_counts(self, num_classes: int) -> Int[np.ndarray, "k"]:
    """Returns how many examples each class has.

    Args:
      num_classes: k.
    """
    return np.bincount(self.labels, minlength=num_classes)

  @property
  @abc.abstractmethod
  def stored_size(self) -> int:
    """Returns the side in pixels of the square images that `read` yields."""

  @property
  @abc.abstractmethod
  def digest(self) -> str:
    """Returns a sha256 (hex) that changes when images or labels do."""

  @abc.abstractmethod
  def read(
    self, requests: Iterable[Indices], *, whole: bool = False
  ) -> Iterator[Pixels]:
    """Yields the images of each request, in the order of its positions.

    Requests are taken a bounded way ahead, so there may be infinitely many. Close the
    iterator to end its threads early.

    Args:
      requests: non-empty arrays of positions in the split.
      whole: yield resized images before the stored square is cut out of them, as lists
        of arrays of different sizes. This matters only to streams of elongated images
        whose preset keeps the aspect ratio.

    Raises:
      ValueError: if an image does not decode; the message names it.
    """

  @abc.abstractmethod
  def take(self, indices: Indices) -> "Split":
    """Returns the examples at `indices`, in that order."""


@dataclasses.dataclass(frozen=True)
class StreamSplit(Split):
  """A split whose images are decoded while it is read, with constant memory.

  Attributes:
    labels: class indices in [0, k).
    size: side in pixels of the stored squares.
    identity: sha256 (hex) of everything that decides which images these are and how
      they are resized. A copy of the files elsewhere has the same.
    open: maps the arguments (requests, whole) of `read` to its iterator.
    square: whether all images are known to be squares, so that `whole` changes nothing.
    stamp: what may tell of a change of files besides their sizes, such as times and
      checksums; a part of cache keys, but not of the digest.
  """

  labels: Int32[np.ndarray, "n"]
  size: int
  identity: str
  open: Callable[[Iterable[Indices], bool], Iterator[Any]]
  square: bool = False
  stamp: str = ""

  @property
  def stored_size(self) -> int:
    return self.size

  @property
  def digest(self) -> str:
    return self.identity

  @property
  def nbytes(self) -> int:
    """Returns the bytes that the stored squares would take in memory."""
    return len(self) * self.size**2 * 3

  def read(
    self, requests: Iterable[Indices], *, whole: bool = False
  ) -> Iterator[Pixels]:
    return self.open(requests, whole and not self.square)

  def take(self, indices: Indices) -> "StreamSplit":
    def opened(requests: Iterable[Indices], whole: bool) -> Iterator[Any]:
      return self.open((indices[request] for request in requests), whole)

    sha = hashlib.sha256(self.identity.encode())
    sha.update(np.asarray(indices, np.int64))
    return dataclasses.replace(
      self, labels=self.labels[indices], identity=sha.hexdigest(), open=opened
    )


@dataclasses.dataclass(frozen=True)
class ArraySplit(Split):
  """A split whose images are decoded, all of one size, in memory.

  Attributes:
    images: pixels in [0, 255].
    labels: class indices in [0, k).
  """

  images: UInt8[np.ndarray, "n h w 3"]
  labels: Int32[np.ndarray, "n"]

  def __post_init__(self):
    """Checks shapes and types, also where annotations are not enforced."""
    images, labels = self.images, self.labels
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
      raise ValueError(
        f"images have to be uint8 [n, h, w, 3], got {images.dtype} "
        f"{list(images.shape)}."
      )
    if labels.shape != images.shape[:1] or labels.dtype != np.int32:
      raise ValueError(
        f"labels have to be int32 [{len(images)}], one per image, got "
        f"{labels.dtype} {list(labels.shape)}."
      )

  @property
  def stored_size(self) -> int:
    return self.images.shape[1]

  def read(
    self, requests: Iterable[Indices], *, whole: bool = False
  ) -> Iterator[Pixels]:
    # Memory holds stored squares only, so `whole` changes nothing.
    for request in requests:
      yield self.images[request]

  @functools.cached_property
  def digest(self) -> str:
    """The sha256 (hex) of images and labels."""
    # With the shape: equal bytes may be images of other sides.
    sha = hashlib.sha256(str(self.images.shape).encode())
    sha.update(np.ascontiguousarray(self.images))
    sha.update(np.ascontiguousarray(self.labels))
    return sha.hexdigest()

  def take(self, indices: Indices) -> "ArraySplit":
    return ArraySplit(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class TaskData:
  """Everything that training on one task needs.

  Attributes:
    name: the task, e.g. "cifar100", or the name of the user's folder.
    class_names: one name per class; their order defines the labels.
    splits: those of "train", "val", "train_val", "test" that exist.
    skipped: number of unreadable images that were left out (see `skip_corrupt`).
    source: what was read, with its version; stored with the result.
    final_split: the split that the final model of the task's protocol is trained on.
    files: of one's own images, for each split (names of its files relative to the root,
      their labels), which is stored with a run.
    are_listed: whether a list names the files, so that others do not matter.
    mask_style: of images with masks, what classes are in their files.
  """

  name: str
  class_names: tuple[str, ...]
  splits: Mapping[str, Split]
  skipped: int = 0
  source: str = ""
  final_split: str = "train_val"
  files: Mapping[str, tuple[Sequence[str], np.ndarray]] = dataclasses.field(
    default_factory=dict
  )
  are_listed: bool = False
  mask_style: MaskStyle | None = None

  def __post_init__(self):
    """Checks that labels are class indices and that no split is empty.

    Names come from folders, archives and lists of others, and go to terminals and
    tables: they are made printable here, wherever they were read.
    """
    object.__setattr__(self, "name", printable(self.name))
    object.__setattr__(self, "class_names", tuple(map(printable, self.class_names)))
    # Checked here, because JAX raises no error for an index out of range.
    for split_name, split in self.splits.items():
      if not len(split):
        raise ValueError(f"the split {split_name!r} of {self.name!r} has no images.")
      low, high = int(split.labels.min()), int(split.labels.max())
      if low < 0 or high >= self.num_classes:
        raise ValueError(
          f"labels of the split {split_name!r} of {self.name!r} go from {low} to "
          f"{high}, expected 0 to {self.num_classes - 1}."
        )

  @property
  def num_classes(self) -> int:
    """Returns k. It is never inferred from labels: a split may miss classes."""
    return len(self.class_names)

  def digest(self, names: Iterable[str]) -> str:
    """Returns a sha256 (hex) of the class names and of some splits.

    Args:
      names: names of splits, e.g. those that a run reads; others are left out.
    """
    # Names of folders may be bytes that are no text.
    classes = "\n".join(self.class_names).encode("utf-8", "surrogatepass")
    sha = hashlib.sha256(classes)
    for name in sorted(set(names) & set(self.splits)):
      sha.update(f"{name} {self.splits[name].digest}".encode())
    return sha.hexdigest()

  def class_counts(self, most: int = 20) -> str:
    """Returns a line with the number of images of each class in each split.

    Args:
      most: of how many classes; of more, the smallest, median and largest number.
    """
    names = [name for name in ("train", "val", "test") if name in self.splits]
    names = names or list(self.splits)
    counts = {name: self.splits[name].class_counts(self.num_classes) for name in names}
    counted = self.splits[names[0]].COUNTED if names else "images"
    if self.num_classes <= most:
      rows = zip(self.class_names, *counts.values(), strict=True)
      numbers = ", ".join(f"{name} {'/'.join(map(str, row))}" for name, *row in rows)
      return f"{counted} of each class ({'/'.join(names)}): {numbers}"
    ranges = []
    for name, of_class in counts.items():
      low, high = int(of_class.argmin()), int(of_class.argmax())
      ranges.append(
        f"{name} {of_class[low]} ({self.class_names[low]}), {np.median(of_class):g}, "
        f"{of_class[high]} ({self.class_names[high]})"
      )
    return f"{counted} of the smallest, median and largest class: {'; '.join(ranges)}"

  def summary(self) -> str:
    """Returns two lines: classes, sizes of splits, skipped files; `class_counts`."""
    sizes = ", ".join(
      f"{name} {len(split)}" + (" (streamed)" if isinstance(split, StreamSplit) else "")
      for name, split in self.splits.items()
    )
    skipped = f", {self.skipped} unreadable images skipped" if self.skipped else ""
    first = f"{self.name}: {self.num_classes} classes, {sizes}{skipped}"
    return f"{first}\n{self.class_counts()}"


def chain(first: StreamSplit, second: StreamSplit) -> StreamSplit:
  """Returns the examples of `first`, then those of `second`, of another source."""
  number = len(first)

  def opened(requests: Iterable[Indices], whole: bool) -> Iterator[Any]:
    for request in requests:
      is_first = request < number
      images: list[Any] = [None] * len(request)
      for part, places, start in (
        (first, np.flatnonzero(is_first), 0),
        (second, np.flatnonzero(~is_first), number),
      ):
        if len(places):
          for group in part.open([request[places] - start], whole):
            for place, image in zip(places, group, strict=True):
              images[place] = image
      yield images if whole else np.stack(images)

  sha = hashlib.sha256(f"{first.digest} {second.digest}".encode())
  return dataclasses.replace(
    first,
    labels=np.concatenate([first.labels, second.labels]),
    identity=sha.hexdigest(),
    open=opened,
    square=first.square and second.square,
  )


def concatenate(first: ArraySplit, second: ArraySplit) -> ArraySplit:
  """Returns the examples of `first`, then those of `second`."""
  return ArraySplit(
    np.concatenate([first.images, second.images]),
    np.concatenate([first.labels, second.labels]),
  )


def to_memory(split: Split, indices: Indices | None = None) -> ArraySplit:
  """Returns some examples of a split, or all of them, in memory.

  Args:
    split: a split of either kind.
    indices: positions of the examples; None takes every one in order.

  Raises:
    ValueError: if an image does not decode; the message names it.
  """
  if isinstance(split, ArraySplit):
    return split if indices is None else split.take(indices)
  indices = np.arange(len(split)) if indices is None else np.asarray(indices)
  size = split.stored_size
  # Filled chunk by chunk: a list of all chunks would need the memory twice.
  images = np.empty((len(indices), size, size, 3), np.uint8)
  starts = range(0, len(indices), _CHUNK)
  chunks = split.read(indices[start : start + _CHUNK] for start in starts)
  for start, chunk in zip(starts, chunks, strict=True):
    images[start : start + len(chunk)] = chunk
  return ArraySplit(images, split.labels[indices])
