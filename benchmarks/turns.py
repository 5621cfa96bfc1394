"""Fair timing on a machine that others use too: in turns, there and back, medians."""

from collections.abc import Callable, Mapping
import math
import statistics
import time
from typing import Any

import jax

# Returns the seconds that so many calls take together.
Timed = Callable[[int], float]
# What of the time counts: all of it, or what this process computed in it. The latter
# does not see other programs, on a machine that is never quiet; but threads that spin
# while they wait for one another look busy, so give each process one core (taskset).
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(function: Callable[[], Any], clock: str = "wall") -> Timed:
  """Returns the timing of a function that returns arrays, waiting for the last ones.

  As in the training loop, a call does not wait for the one before it, but for the one
  before that.

  Args:
    function: what is called.
    clock: a key of `CLOCKS`.
  """
  now = CLOCKS[clock]

  def run(times: int) -> float:
    start = now()
    before = None
    for _ in range(times):
      found = function()
      # Many programs in flight may each wait for devices that another one holds.
      jax.block_until_ready(before)
      before = found
    jax.block_until_ready(found)
    return now() - start

  return run


def alternate(
  functions: Mapping[str, Timed], rounds: int, turn_seconds: float = 0.2
) -> dict[str, list[float]]:
  """Returns the seconds of one call of each function, by round.

  In every other round they come in the opposite order, so that a machine that slows
  down or speeds up favours none. Each is called once beforehand.

  Args:
    functions: from `timed`, by name.
    rounds: how often each is timed.
    turn_seconds: a function is called as often in one turn as fills about this time.
  """
  times = {}
  for name, function in functions.items():
    function(1)
    times[name] = max(1, min(1000, math.ceil(turn_seconds / function(1))))
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for i in range(rounds):
    for name in list(functions)[:: (-1) ** i]:
      seconds[name].append(functions[name](times[name]) / times[name])
  return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
  """Returns the median by name."""
  return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
  """Returns how many times faster one is: the median of the rounds' ratios."""
  pairs = zip(seconds[slow], seconds[fast], strict=True)
  return statistics.median(a / b for a, b in pairs)
