"""What a search is about to do, and how long that takes."""

from collections.abc import Mapping
import dataclasses

from ml_collections import ConfigDict

from insvp_jax.data import TaskData
from insvp_jax.distributed.processes import print_once
from insvp_jax.logs.progress import duration
from insvp_jax.train import batches, features, flops
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import Program
from insvp_jax.train.timing import Timer

# Of the FLOPs of training on an image, evaluating one takes about half: the gradient
# with respect to the trainable parameters alone costs another forward pass.
_EVALUATION = 0.5
# Seconds. Less is over before it is read.
_WORTH_TELLING = 10


@dataclasses.dataclass(frozen=True)
class Work:
  """What one row does in a search.

  Attributes:
    num_trials: runs that choose; 0 where there is nothing to choose.
    num_finals: runs with what was chosen, one a seed.
    images: seen by all of them, those of evaluations weighted.
    flops: of training on one image; 0 where the features come from a cache.
  """

  num_trials: int
  num_finals: int
  images: float
  flops: float


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
  images = num_trials * of_trial + num_finals * of_final
  if features.are_cached(config, program, len(data.splits["train"])):
    return Work(num_trials, num_finals, images, 0.0)
  state = program_lib.abstract_state(config, program)
  batch = batches.abstract_batch(config, program, config.batch_size, train=True)
  of_step = flops.count(program.train_step.trace(state, batch).jaxpr)
  return Work(num_trials, num_finals, images, of_step / config.batch_size)


class Outlook:
  """Says once how long all runs of a search take, from the pace of the first ones."""

  def __init__(self, works: Mapping[str, Work]):
    """Takes the work of each row, by its label."""
    self._works = works
    self._is_told = False

  def summary(self) -> str:
    """Returns one line: how many runs of which row there will be."""
    parts, total = [], 0
    for label, work in self._works.items():
      total += work.num_trials + work.num_finals
      plural = "" if work.num_trials == 1 else "s"
      trials = f"{work.num_trials} trial{plural} and " if work.num_trials else ""
      parts.append(f"{label} {trials}{work.num_finals} final")
    runs = "1 run" if total == 1 else f"{total} runs"
    return f"{runs}: {', '.join(parts)}; those that are finished are kept"

  def tell(self, label: str, timer: Timer) -> None:
    """Says how long all of it takes, as soon as that can be told.

    Args:
      label: of the row under way.
      timer: of these.
    """
    of_row, rate = self._works[label].flops, timer.images_per_second
    if self._is_told or not (of_row and rate):
      return
    self._is_told = True
    work = sum(work.images * work.flops for work in self._works.values())
    seconds = work / of_row / rate
    if seconds >= _WORTH_TELLING:
      print_once(f"all runs of this search take about {duration(seconds)} at this pace")
