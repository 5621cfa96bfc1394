"""Work done ahead, in order, by a bounded number of threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import itertools
import os
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def num_threads() -> int:
  """Returns how many threads decode images: the processors', within reason."""
  return min(16, max(2, os.cpu_count() or 2))


def ordered_map(
  function: Callable[[T], R], items: Iterable[T], *, ahead: int
) -> Iterator[R]:
  """Yields `function(item)` in the items' order, computed by threads.

  At most `ahead` results wait at any time, so the items may be infinitely many. The
  first error is raised in its turn. Closing the iterator ends the threads.
  """
  iterator = iter(items)
  pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="insvp_jax_decode")
  try:
    waiting = deque(pool.submit(function, i) for i in itertools.islice(iterator, ahead))
    while waiting:
      result = waiting.popleft().result()
      for item in itertools.islice(iterator, 1):
        waiting.append(pool.submit(function, item))
      yield result
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
