"""Decoded images in memory, and a task: what every data source hands on."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import hashlib

from jaxtyping import Int, Int32, UInt8
import numpy as np

from insvp_jax.data.splits import Indices, Pixels, Split, StreamSplit

_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ArraySplit(Split):
  """The images of one split, all of one size, and their labels, in memory.

  Attributes:
    images: pixels in [0, 255].
    labels: class indices in [0, k).
  """

  images: UInt8[np.ndarray, "n h w 3"]
  labels: Int32[np.ndarray, "n"]

  def __post_init__(self):
    """Checks what the type annotations say, also where nobody checks types."""
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
    for request in requests:
      yield self.images[request]

  @functools.cached_property
  def digest(self) -> str:
    """The sha256 (hex) of images and labels."""
    sha = hashlib.sha256(str(self.images.shape).encode())
    sha.update(np.ascontiguousarray(self.images))
    sha.update(np.ascontiguousarray(self.labels))
    return sha.hexdigest()

  def take(self, indices: Int[np.ndarray, "m"]) -> "ArraySplit":
    """Returns the examples at `indices`, in that order."""
    return ArraySplit(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class TaskData:
  """Everything that training on one task needs.

  Attributes:
    name: the task, e.g. "cifar100", or the name of the user's folder.
    class_names: one name per class; their order defines the labels.
    splits: those of "train", "val", "train_val", "test" that exist.
    skipped: number of unreadable images left out (see `skip_corrupt`).
    source: what was read, with its version; stored with the result.
    final_split: what the final model of the task's protocol is trained on.
  """

  name: str
  class_names: tuple[str, ...]
  splits: Mapping[str, Split]
  skipped: int = 0
  source: str = ""
  final_split: str = "train_val"

  def __post_init__(self):
    """Checks that labels are class indices and that no split is empty."""
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
    """Returns k. Never inferred from labels: a split may miss classes."""
    return len(self.class_names)

  def digest(self, names: Iterable[str]) -> str:
    """The sha256 (hex) of the classes and of some splits, e.g. those a run reads."""
    sha = hashlib.sha256("\n".join(self.class_names).encode())
    for name in sorted(set(names) & set(self.splits)):
      sha.update(f"{name} {self.splits[name].digest}".encode())
    return sha.hexdigest()

  def describe(self) -> str:
    """Returns one line: name, classes, sizes of the splits, skipped files."""
    sizes = ", ".join(
      f"{name} {len(split)}" + (" (streamed)" if isinstance(split, StreamSplit) else "")
      for name, split in self.splits.items()
    )
    skipped = f", {self.skipped} unreadable images skipped" if self.skipped else ""
    return f"{self.name}: {self.num_classes} classes, {sizes}{skipped}"


def concatenate(first: ArraySplit, second: ArraySplit) -> ArraySplit:
  """Returns the examples of `first`, then those of `second`."""
  return ArraySplit(
    np.concatenate([first.images, second.images]),
    np.concatenate([first.labels, second.labels]),
  )


def take(split: Split, indices: Int[np.ndarray, "m"] | None = None) -> ArraySplit:
  """Returns some examples of a split, or all of them, in memory.

  Args:
    split: of either kind.
    indices: positions; None for every one in order.

  Raises:
    ValueError: an image does not decode; the message names it.
  """
  if isinstance(split, ArraySplit):
    return split if indices is None else split.take(indices)
  indices = np.arange(len(split)) if indices is None else np.asarray(indices)
  size = split.stored_size
  images = np.empty((len(indices), size, size, 3), np.uint8)
  starts = range(0, len(indices), _CHUNK)
  pieces = split.read(indices[start : start + _CHUNK] for start in starts)
  for start, piece in zip(starts, pieces, strict=True):
    images[start : start + len(piece)] = piece
  return ArraySplit(images, split.labels[indices])
