"""Where the time of a run goes: sums by kind, and a trace of single steps."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
import time
from typing import Any

import jax


@dataclasses.dataclass
class Timer:
  """Seconds of training alone: no evaluation, no saving.

  All are sums over the attempts of a run that was interrupted.

  Attributes:
    seconds: of training, compilation included.
    timed_seconds: without the first step of each attempt, which compiles.
    timed_steps: taken in `timed_seconds`.
    timed_images: trained on in `timed_seconds`.
    compile_seconds: that the first batch and step of each attempt took to be compiled
      and started.
    input_wait_seconds: in which the host waited for batches.
    feature_seconds: in which features were computed, once, for all steps.
  """

  seconds: float = 0.0
  timed_seconds: float = 0.0
  timed_steps: int = 0
  timed_images: int = 0
  compile_seconds: float = 0.0
  input_wait_seconds: float = 0.0
  feature_seconds: float = 0.0

  def __post_init__(self):
    """Starts to measure."""
    self.restart()

  @classmethod
  def of(cls, progress: Mapping[str, Any]) -> "Timer":
    """Returns the timer of a run that goes on, from its stored `state`."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: progress[name] for name in names if name in progress})

  def restart(self) -> None:
    """Leaves out the time since the last call of `restart` or `add`."""
    self._last = time.perf_counter()

  def add(self, num_steps: int, num_images: int) -> None:
    """Counts the time since the last call of `restart` or `add`.

    Args:
      num_steps: taken in it; 0 if it went into compiling.
      num_images: trained on in it.
    """
    elapsed = time.perf_counter() - self._last
    self.seconds += elapsed
    if num_steps:
      self.timed_seconds += elapsed
      self.timed_steps += num_steps
      self.timed_images += num_images
    self.restart()

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Counts the with block as compilation."""
    before = time.perf_counter()
    yield
    self.compile_seconds += time.perf_counter() - before

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the with block as waiting for input."""
    before = time.perf_counter()
    yield
    self.input_wait_seconds += time.perf_counter() - before

  @contextlib.contextmanager
  def computing_features(self) -> Iterator[None]:
    """Counts the with block as the pass of the backbone over a split."""
    before = time.perf_counter()
    yield
    self.feature_seconds += time.perf_counter() - before

  @property
  def images_per_second(self) -> float | None:
    """Mean rate; None before there is one, and where steps see no images."""
    return self.timed_images / self.timed_seconds if self.timed_images else None

  @property
  def step_seconds(self) -> float | None:
    """Mean time of a step; None before there is one."""
    return self.timed_seconds / self.timed_steps if self.timed_steps else None

  def state(self) -> dict[str, float | int]:
    """Returns the sums by name, to be stored with a checkpoint; see `of`."""
    return dataclasses.asdict(self)

  def summary_line(self) -> str:
    """Returns one line that shows what was slow."""
    step = self.step_seconds
    steps = f", {1000 * step:.3g} ms a step" if step else ""
    computed = self.feature_seconds
    features = f"{computed:.1f} s computing features, " if computed >= 0.05 else ""
    return (
      f"{self.seconds:.1f} s of training: {self.compile_seconds:.1f} s compiling, "
      f"{features}{self.input_wait_seconds:.1f} s waiting for input{steps}"
    )


class Profiler:
  """Records a trace of some training steps, for TensorBoard or Perfetto."""

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
