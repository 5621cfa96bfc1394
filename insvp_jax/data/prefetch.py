"""Reading ahead: images are decoded in order, before they are asked for.

`ordered_map` decodes with threads. `by_request` and `stacked_by_request` divide what
such a reader yields into the requests of `Split.read`, which are whole batches.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import itertools
import os
from typing import Any, TypeVar

from jaxtyping import Int, UInt8
import numpy as np

T = TypeVar("T")
R = TypeVar("R")


def _num_threads() -> int:
  """Returns how many threads decode images: one for each processor, from 2 to 16."""
  return min(16, max(2, os.cpu_count() or 2))


def ordered_map(
  function: Callable[[T], R], items: Iterable[T], *, ahead: int
) -> Iterator[R]:
  """Yields `function(item)` in the order of the items, computed by threads.

  The first error is raised when its result's turn comes. Closing the iterator ends the
  threads.

  Args:
    function: called from several threads at once.
    items: taken only as far as results are computed, so there may be infinitely many.
    ahead: how many results may wait to be used at any time.
  """
  iterator = iter(items)
  pool = ThreadPoolExecutor(_num_threads(), thread_name_prefix="insvp_jax_decode")
  try:
    waiting = deque(pool.submit(function, i) for i in itertools.islice(iterator, ahead))
    while waiting:
      result = waiting.popleft().result()
      # For each result that leaves one item enters, so the number stays `ahead`.
      for item in itertools.islice(iterator, 1):
        waiting.append(pool.submit(function, item))
      yield result
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def by_request(
  requests: Iterable[Int[np.ndarray, "m"]],
  read: Callable[[Iterator[int]], Generator[Any, None, None]],
) -> Iterator[list[Any]]:
  """Serves requests of several images from a reader of single ones.

  Args:
    requests: non-empty arrays of positions in a split.
    read: maps positions to their images, in order; it may take positions some way
      ahead. Its generator is closed at the end, however that comes about.

  Yields:
    For each request the list of its images, which may differ in size.
  """
  # The reader takes positions before their images are due: the sizes of the requests
  # that it has begun wait here.
  sizes: list[int] = []

  def positions() -> Iterator[int]:
    for request in requests:
      sizes.append(len(request))
      yield from request.tolist()

  with contextlib.closing(read(positions())) as images:
    for first in images:
      yield [first, *itertools.islice(images, sizes.pop(0) - 1)]


def stacked_by_request(
  requests: Iterable[Int[np.ndarray, "m"]],
  read: Callable[[Iterator[int], int], Iterator[UInt8[np.ndarray, "c h w 3"]]],
) -> Iterator[UInt8[np.ndarray, "m h w 3"]]:
  """Serves requests from a reader of stacked images, as a rule without copying.

  Args:
    requests: non-empty arrays of positions in a split, most of them of one length.
    read: maps (positions, length of the first request) to arrays of consecutive images
      of one size, in order; it may take positions some way ahead.

  Yields:
    For each request its images.
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

  # Where all requests have one length, a piece of the reader is a request. Only where
  # they differ are pieces joined or cut.
  parts: list[np.ndarray] = []
  with contextlib.closing(read(positions(), len(first))) as pieces:
    for piece in pieces:
      parts.append(piece)
      while sizes and sum(map(len, parts)) >= sizes[0]:
        size = sizes.popleft()
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        parts = [images[size:]] if len(images) > size else []
        yield images[:size]
