"""How long training took, and how fast it was."""

import time


class Clock:
  """Seconds of training alone: no evaluation, no saving.

  Attributes:
    seconds: of all attempts, compilation included.
    timed_seconds: without the first step of each attempt, which compiles.
    timed_images: trained on in `timed_seconds`.
  """

  def __init__(self, seconds=0.0, timed_seconds=0.0, timed_images=0):
    """Goes on from where an interrupted run stood."""
    self.seconds = seconds
    self.timed_seconds = timed_seconds
    self.timed_images = timed_images
    self._mark = time.perf_counter()

  def skip(self) -> None:
    """Leaves out the time since the last call."""
    self._mark = time.perf_counter()

  def add(self, num_images: int) -> None:
    """Counts the time since the last call; 0 images for a step that compiled."""
    elapsed = time.perf_counter() - self._mark
    self.seconds += elapsed
    if num_images:
      self.timed_seconds += elapsed
      self.timed_images += num_images
    self.skip()

  @property
  def images_per_second(self) -> float:
    """Mean rate; 0 before there is one."""
    return self.timed_images / self.timed_seconds if self.timed_images else 0.0

  def state(self) -> dict[str, float | int]:
    """Returns what the constructor takes."""
    return {
      "seconds": self.seconds,
      "timed_seconds": self.timed_seconds,
      "timed_images": self.timed_images,
    }
