"""A trace of some training steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
  """Records the steps from the first to the last one asked for."""

  def __init__(self, steps: tuple[int, int] | None, folder: Path):
    """Records nothing yet.

    Args:
      steps: the first and the last step, counted from 1; None records nothing.
      folder: where the trace goes.
    """
    # An empty range is never entered.
    self._first, self._last = steps or (1, 0)
    self._folder = folder
    self._is_running = False

  def before(self, step: int) -> None:
    """Begins where `step` is the first one, or a later one of a resumed run."""
    if not self._is_running and self._first <= step <= self._last:
      jax.profiler.start_trace(str(self._folder))
      self._is_running = True

  def after(self, step: int, results: Any) -> None:
    """Ends with the last step, when the device has finished `results`."""
    if self._is_running and step >= self._last:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends a trace that is under way, and keeps it."""
    if self._is_running:
      self._is_running = False
      jax.profiler.stop_trace()
