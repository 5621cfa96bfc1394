"""A split: labelled images that can be read in any order, from memory or from files.

The two kinds behave alike; only where the pixels are differs. `ArraySplit` (in
`arrays`) holds them, `StreamSplit` decodes what is asked for when it is asked for and
keeps nothing.
"""

import abc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import itertools
from typing import Any

from jaxtyping import Int, Int32, UInt8
import numpy as np

Indices = Int[np.ndarray, "m"]
# The images of one request: stacked where they are of one size.
Pixels = UInt8[np.ndarray, "m h w 3"] | Sequence[UInt8[np.ndarray, "h w 3"]]


class Split(abc.ABC):
  """The labelled images of one split.

  Attributes:
    labels: class indices in [0, k), in the split's own order.
  """

  labels: Int32[np.ndarray, "n"]

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self.labels)

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
    """Yields the images of each request, in its order.

    Requests are taken a bounded way ahead, so there may be infinitely many. Close the
    iterator to end its threads early.

    Args:
      requests: non-empty arrays of positions in the split.
      whole: yield images before the central square is cut out of them (lists of
        different sizes), where the preset keeps their aspect ratio.

    Raises:
      ValueError: an image does not decode; the message names it.
    """


@dataclasses.dataclass(frozen=True)
class StreamSplit(Split):
  """A split whose images are decoded while it is read, with constant memory.

  Attributes:
    labels: class indices in [0, k).
    size: side in pixels of the squares.
    identity: sha256 (hex) of all that says which images these are and how they are
      resized; the same for a copy elsewhere.
    open: maps (requests, whole) to the iterator of `read`.
    square: whether all images are squares, so that whole is no different.
    stamp: what else may tell of a change (times of files); a part of cache keys.
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
    """Returns the bytes that its squares would take in memory."""
    return len(self) * self.size**2 * 3

  def read(
    self, requests: Iterable[Indices], *, whole: bool = False
  ) -> Iterator[Pixels]:
    return self.open(requests, whole and not self.square)


def grouped(
  requests: Iterable[Indices],
  read: Callable[[Iterator[int]], Generator[Any, None, None]],
) -> Iterator[list[Any]]:
  """Serves requests of many positions from a reader of single ones.

  Args:
    requests: non-empty arrays of positions.
    read: maps positions to their images, in order, some way ahead; closed at the
      end, whatever ends it.

  Yields:
    A list of images for each request.
  """
  sizes: list[int] = []

  def positions() -> Iterator[int]:
    for request in requests:
      sizes.append(len(request))
      yield from request.tolist()

  with contextlib.closing(read(positions())) as images:
    for first in images:
      yield [first, *itertools.islice(images, sizes.pop(0) - 1)]


def joined(
  requests: Iterable[Indices],
  read: Callable[[Iterator[int], int], Iterator[UInt8[np.ndarray, "c h w 3"]]],
) -> Iterator[UInt8[np.ndarray, "m h w 3"]]:
  """Serves requests from a reader of stacked images, without copying as a rule.

  Args:
    requests: non-empty arrays of positions, most of them of one length.
    read: maps (positions, length of the first request) to arrays of consecutive
      images, in order, some way ahead.

  Yields:
    The images of each request.
  """
  requests = iter(requests)
  first = next(requests, None)
  if first is None:
    return
  sizes: deque[int] = deque()

  def positions() -> Iterator[int]:
    for request in itertools.chain([first], requests):
      sizes.append(len(request))
      yield from request.tolist()

  parts: list[np.ndarray] = []
  with contextlib.closing(read(positions(), len(first))) as pieces:
    for piece in pieces:
      parts.append(piece)
      while sizes and sum(map(len, parts)) >= sizes[0]:
        size = sizes.popleft()
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        parts = [images[size:]] if len(images) > size else []
        yield images[:size]
