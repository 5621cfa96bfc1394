"""What a search is about to do, and how long that takes."""

from collections.abc import Mapping
import contextlib
import dataclasses

from ml_collections import ConfigDict

from insvp_jax.data import TaskData
from insvp_jax.distributed.processes import print_once
from insvp_jax.logs.progress import Whole
from insvp_jax.train import batches, features, flops
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import Program

# Of the FLOPs of training on an image, evaluating one takes about half: the gradient
# with respect to the trainable parameters alone costs another forward pass.
_EVALUATION = 0.5
# Of the FLOPs of the costliest row, what an image of cached features takes at most.
_CACHED = 1e-3


@dataclasses.dataclass(frozen=True)
class Work:
  """What one row does in a search.

  Attributes:
    num_trials: runs that choose; 0 where there is nothing to choose.
    num_finals: runs with what was chosen, one a seed.
    trial_images: seen by a trial, those of evaluations weighted.
    final_images: the same of a final run.
    flops: of training on one image; 0 where the features come from a cache.
  """

  num_trials: int
  num_finals: int
  trial_images: float
  final_images: float
  flops: float

  @property
  def images(self) -> float:
    """Seen by all runs."""
    return self.num_trials * self.trial_images + self.num_finals * self.final_images


def work_of(
  config: ConfigDict,
  program: Program,
  data: TaskData,
  *,
  num_trials: int,
  num_finals: int,
  final_steps: int,
) -> Work:
  """Returns the work of one row.

  Args:
    config: of its trials, or of its final runs where there is no choice.
    program: made for it.
    data: the task's splits.
    num_trials: as in `Work`.
    num_finals: as in `Work`.
    final_steps: train steps of a final run.
  """
  num_val, num_test = (len(data.splits.get(name, ())) for name in ("val", "test"))
  of_trial = program.total_steps * config.batch_size + _EVALUATION * num_val
  of_final = final_steps * config.batch_size + _EVALUATION * num_test
  images = of_trial, of_final
  if features.are_cached(config, program, len(data.splits["train"])):
    return Work(num_trials, num_finals, *images, 0.0)
  state = program_lib.abstract_state(config, program)
  batch = batches.abstract_batch(config, program, config.batch_size, train=True)
  of_step = flops.count(program.train_step.trace(state, batch).jaxpr)
  return Work(num_trials, num_finals, *images, of_step / config.batch_size)


@dataclasses.dataclass(frozen=True)
class Row:
  """What a row tells of its runs while it goes through them.

  Attributes:
    whole: how far all rows are.
    of_trial: the work of a trial, in the unit of `whole`.
    of_final: that of a final run.
    is_typical: whether its pace tells that of other rows.
  """

  whole: Whole
  of_trial: float
  of_final: float
  is_typical: bool

  def trials(self, count: int = 1) -> contextlib.AbstractContextManager[Whole]:
    """Returns the context in which so many trials train together."""
    return self.whole.run(count * self.of_trial, is_typical=self.is_typical)

  def final(self) -> contextlib.AbstractContextManager[Whole]:
    """Returns the context in which a final run trains."""
    return self.whole.run(self.of_final, is_typical=self.is_typical)

  def keep(self, *, trials: int = 0, finals: int = 0) -> None:
    """Counts runs that were finished before."""
    self.whole.keep(trials * self.of_trial + finals * self.of_final)


class Outlook:
  """Says how many runs there will be, and from their first steps how long they take.

  Attributes:
    whole: how far they are.
  """

  def __init__(self, works: Mapping[str, Work]):
    """Takes the work of each row, by its label."""
    self._works = works
    # Without any FLOPs the rows count by their images alone.
    least = _CACHED * max(work.flops for work in works.values()) or 1.0
    self._flops = {label: max(work.flops, least) for label, work in works.items()}
    num_runs = sum(work.num_trials + work.num_finals for work in works.values())
    total = sum(work.images * self._flops[label] for label, work in works.items())
    self.whole = Whole(num_runs, total, print_once)

  def summary(self) -> str:
    """Returns one line: how many runs of which row there will be."""
    parts = []
    for label, work in self._works.items():
      plural = "" if work.num_trials == 1 else "s"
      trials = f"{work.num_trials} trial{plural} and " if work.num_trials else ""
      parts.append(f"{label} {trials}{work.num_finals} final")
    total = self.whole.num_runs
    runs = "1 run" if total == 1 else f"{total} runs"
    return f"{runs}: {', '.join(parts)}; those that are finished are kept"

  def row(self, label: str) -> Row:
    """Returns what a row tells of its runs."""
    work, flops = self._works[label], self._flops[label]
    # Steps on cached features say nothing of the others.
    is_typical = bool(work.flops) or not any(w.flops for w in self._works.values())
    return Row(
      self.whole, work.trial_images * flops, work.final_images * flops, is_typical
    )
