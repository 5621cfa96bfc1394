"""What stands for the checkpoints and the writers of all members of a population.

The loop of `trainer` writes to these as it would for a single run. `lost`, the members
that diverged, is the loop's: nothing more is written of them.
"""

from collections.abc import Iterator, Mapping, Sequence
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.distributed.stopping import Interrupted
from insvp_jax.logs.writers import Writers
from insvp_jax.search.population import Population
from insvp_jax.train import loop


class NoFiles:
  """Stands for the checkpoints of trials, which have none."""

  lost: Mapping[int, str]

  def progress(self) -> dict[str, Any]:
    return {}

  def save(self, state, *, progress, force=False) -> None:
    pass

  def kept(self, index: int) -> str:
    return ""

  def reached_preemption(self, step: int) -> bool:
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      raise Interrupted(signal.SIGTERM)
    return False


class MemberFiles:
  """Stands for the checkpoints of all members."""

  lost: Mapping[int, str]

  def __init__(self, population: Population, checkpointers: Sequence[Checkpointer]):
    self.population = population
    self.each = checkpointers

  def progress(self) -> dict[str, Any]:
    stored = self.each[0].progress()
    times = {name: stored[name] * len(self.each) for name in stored if _is_time(name)}
    return {**stored, **times}

  def save(self, state, *, progress, force=False) -> None:
    # Each member has its share of the time, and images of its own.
    times = {n: progress[n] / len(self.each) for n in progress if _is_time(n)}
    for i, checkpointer in enumerate(self.each):
      if i not in self.lost:
        member = self.population.member(state, i)
        checkpointer.save(member, progress={**progress, **times}, force=force)

  def kept(self, index: int) -> str:
    return loop.kept(self.each[index])

  def reached_preemption(self, step: int) -> bool:
    return self.each[0].reached_preemption(step)


class MemberWriters:
  """Writes each member's numbers where its own run would."""

  lost: Mapping[int, str]

  def __init__(self, writers: Sequence[Writers]):
    self.each = writers

  def _mine(
    self, scalars: Mapping[str, Any]
  ) -> Iterator[tuple[Writers, dict[str, Any]]]:
    found = jax.device_get(dict(scalars))
    for i, writers in enumerate(self.each):
      if i not in self.lost:
        mine = {n: v[i] if np.ndim(v) else v for n, v in found.items()}
        yield writers, mine

  @property
  def lines(self) -> int:
    """Of the metrics of each member that is left."""
    return max(writers.lines for writers in self.each)

  def scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for writers, mine in self._mine(scalars):
      writers.scalars(step, mine)

  def train(self, step, scalars, *, images_per_second=0.0) -> None:
    rate = images_per_second * len(self.each)
    for writers, mine in self._mine(scalars):
      writers.train(step, mine, images_per_second=rate)

  def log(self, text: str) -> None:
    self.each[0].log(text)


class MeanWriter:
  """Writes the mean of the trials that have not diverged."""

  lost: Mapping[int, str]

  def __init__(self, writers: Writers):
    self.writers = writers

  @property
  def lines(self) -> int:
    return self.writers.lines

  def train(self, step, scalars, *, images_per_second=0.0) -> None:
    found = jax.device_get(dict(scalars))
    number = len(found["loss"])
    left = [i for i in range(number) if i not in self.lost]
    mean = {n: np.mean(v[left]) if np.ndim(v) else v for n, v in found.items()}
    # Their mean says nothing.
    del mean["lr"]
    rate = images_per_second * number
    self.writers.train(
      step, {**mean, "diverged": number - len(left)}, images_per_second=rate
    )


def _is_time(name: str) -> bool:
  return name.endswith("seconds")
