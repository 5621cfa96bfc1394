"""Where the time of a run goes: compiling, waiting for input, training."""

from collections.abc import Iterator
import contextlib
import time


class Clock:
  """Seconds of training alone: no evaluation, no saving.

  All are sums over the attempts of a run that was interrupted.

  Attributes:
    seconds: compilation included.
    timed_seconds: without the first step of each attempt, which compiles.
    timed_steps: taken in `timed_seconds`.
    timed_images: trained on in `timed_seconds`.
    compile_seconds: that the first batches and steps took to be compiled and started.
    input_wait_seconds: in which the host waited for batches.
  """

  def __init__(
    self,
    seconds=0.0,
    timed_seconds=0.0,
    timed_steps=0,
    timed_images=0,
    compile_seconds=0.0,
    input_wait_seconds=0.0,
  ):
    """Goes on from where an interrupted run stood."""
    self.seconds = seconds
    self.timed_seconds = timed_seconds
    self.timed_steps = timed_steps
    self.timed_images = timed_images
    self.compile_seconds = compile_seconds
    self.input_wait_seconds = input_wait_seconds
    self._mark = time.perf_counter()

  def skip(self) -> None:
    """Leaves out the time since the last call."""
    self._mark = time.perf_counter()

  def add(self, num_steps: int, batch_size: int) -> None:
    """Counts the time since the last call; 0 steps for one that compiled."""
    elapsed = time.perf_counter() - self._mark
    self.seconds += elapsed
    if num_steps:
      self.timed_seconds += elapsed
      self.timed_steps += num_steps
      self.timed_images += num_steps * batch_size
    self.skip()

  @contextlib.contextmanager
  def compiling(self, enabled: bool = True) -> Iterator[None]:
    """Counts the with block as compilation, if enabled."""
    before = time.perf_counter()
    yield
    if enabled:
      self.compile_seconds += time.perf_counter() - before

  @contextlib.contextmanager
  def waiting(self, enabled: bool = True) -> Iterator[None]:
    """Counts the with block as waiting for input, if enabled."""
    before = time.perf_counter()
    yield
    if enabled:
      self.input_wait_seconds += time.perf_counter() - before

  @property
  def images_per_second(self) -> float:
    """Mean rate; 0 before there is one."""
    return self.timed_images / self.timed_seconds if self.timed_images else 0.0

  @property
  def step_seconds(self) -> float | None:
    """Mean time of a step; None before there is one."""
    return self.timed_seconds / self.timed_steps if self.timed_steps else None

  def state(self) -> dict[str, float | int]:
    """Returns what the constructor takes."""
    return {name: value for name, value in vars(self).items() if name[0] != "_"}

  def describe(self) -> str:
    """Returns one line that shows what was slow."""
    step = self.step_seconds
    steps = f", {1000 * step:.3g} ms a step" if step else ""
    return (
      f"{self.seconds:.1f} s of training: {self.compile_seconds:.1f} s compiling, "
      f"{self.input_wait_seconds:.1f} s waiting for input{steps}"
    )
