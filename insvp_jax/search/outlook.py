"""What a search is about to do, and how long that takes.

How long is measured before the first trial trains (`time_steps`): its program has to be
compiled anyway, and takes a few steps more on a state that is thrown away. What other
rows and other tasks take follows from their FLOPs and images. While the runs go on,
their own steps tell the time that is left (`logs.progress.Whole`).
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import datetime
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax.data import TaskData
from insvp_jax.distributed.processes import print_once
from insvp_jax.logs.progress import Whole
from insvp_jax.search import population
from insvp_jax.train import batches, features, flops
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import Program, create_state
from insvp_jax.train.trainer import Prepared

# Of the FLOPs of training on an image, evaluating one takes about half: the gradient
# with respect to the trainable parameters alone costs another forward pass.
_EVALUATION = 0.5
# Of the time that a train step takes to be compiled, what that of an evaluation takes.
_EVALUATION_COMPILES = 0.5
# Of the FLOPs of the costliest row, what an image of cached features takes at most.
_CACHED = 1e-3
# FLOPs that take seconds anywhere: a search of fewer is over before it is measured.
_WORTH_MEASURING = 1e12
# Of a search's steps, one of so many is taken to measure how long they take.
_STEPS_PER_MEASURED = 100
# Steps that are measured where a call takes one.
_MEASURED = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How many images the splits of a task have.

  Attributes:
    train: that trials are trained on.
    val: that they are chosen on; 0 where there is no such split.
    final: that the final runs are trained on.
    test: that these are tested on; 0 where there is no such split.
  """

  train: int
  val: int
  final: int
  test: int

  @classmethod
  def of(cls, data: TaskData, trials_on: str = "train") -> "Sizes":
    """Returns those of a task's data.

    Args:
      data: the task's splits.
      trials_on: the split that trials are trained on.
    """
    num = {name: len(split) for name, split in data.splits.items()}
    final = num.get(data.final_split, num["train"])
    return cls(num[trials_on], num.get("val", 0), final, num.get("test", 0))


@dataclasses.dataclass(frozen=True)
class Work:
  """What one row does in a search.

  Attributes:
    num_trials: runs that choose; 0 where there is nothing to choose.
    num_finals: runs with what was chosen, one a seed.
    trial_images: seen by a trial, those of evaluations weighted.
    final_images: the same of a final run.
    flops: of training on one image; 0 where the features come from a cache.
    trial_steps: train steps of a trial.
    final_steps: train steps of a final run.
    num_cached: images whose features are computed once, for all runs.
    feature_flops: of computing the feature of one.
    num_programs: that the trials are compiled in.
    grid: of the trials, as in "3 lr x 2 wd"; "" where it is not said.
  """

  num_trials: int
  num_finals: int
  trial_images: float
  final_images: float
  flops: float
  trial_steps: int = 0
  final_steps: int = 0
  num_cached: int = 0
  feature_flops: float = 0.0
  num_programs: int = 1
  grid: str = ""

  @property
  def images(self) -> float:
    """Seen by all runs."""
    return self.num_trials * self.trial_images + self.num_finals * self.final_images

  @property
  def total_flops(self) -> float:
    """Of all runs."""
    return self.images * self.flops + self.num_cached * self.feature_flops

  def to_do(self, left: tuple[int, int]) -> "Work":
    """Returns the part of so many (trials, final runs)."""
    num_cached = self.num_cached if any(left) else 0
    return dataclasses.replace(
      self, num_trials=left[0], num_finals=left[1], num_cached=num_cached
    )


def flops_of(config: ConfigDict, program: Program, num_train: int) -> tuple[int, int]:
  """Returns FLOPs by image: (of training, of a feature that is computed once).

  The first is 0 where features come from a cache, else the second.

  Args:
    config: of trials, or of final runs where there is no choice.
    program: made for it.
    num_train: number of training images.
  """
  state = program_lib.abstract_state(config, program)
  batch = batches.abstract_batch(config, program, config.batch_size, train=True)
  if features.are_cached(config, program, num_train):
    backbone = {"backbone": state.params["backbone"]}
    traced = program.feature_step.trace(backbone, {"images": batch["images"]})
    return 0, flops.count(traced.jaxpr) // config.batch_size
  traced = program.train_step.trace(state, batch)
  return flops.count(traced.jaxpr) // config.batch_size, 0


def work_of(
  config: ConfigDict,
  sizes: Sizes,
  image_flops: tuple[int, int],
  *,
  num_trials: int,
  num_finals: int,
  num_programs: int = 1,
  grid: str = "",
) -> Work:
  """Returns the work of one row on one task.

  Args:
    config: of its runs.
    sizes: of the task's splits.
    image_flops: from `flops_of`.
    num_trials: as in `Work`.
    num_finals: as in `Work`.
    num_programs: as in `Work`.
    grid: as in `Work`.
  """
  trial_steps = config_lib.num_steps(config, sizes.train)[0]
  final_steps = config_lib.num_steps(config, sizes.final)[0]
  of_training, of_feature = image_flops
  # Trials see train and val, final runs their own split and test.
  num_cached = (sizes.train + sizes.val) * bool(num_trials) + sizes.test
  if not num_trials or sizes.final != sizes.train:
    num_cached += sizes.final
  return Work(
    num_trials,
    num_finals,
    trial_steps * config.batch_size + _EVALUATION * sizes.val,
    final_steps * config.batch_size + _EVALUATION * sizes.test,
    float(of_training),
    trial_steps,
    final_steps,
    num_cached if of_feature else 0,
    float(of_feature),
    num_programs,
    grid,
  )


@dataclasses.dataclass(frozen=True)
class Times:
  """How long the first steps of trials that train together took, in seconds.

  Attributes:
    start: of what comes before the first step, features apart.
    feature: computing that of one training image; 0 without a cache.
    compilation: of the step.
    image: training on one image, of one trial.
  """

  start: float
  feature: float
  compilation: float
  image: float


def time_steps(
  configs: Sequence[ConfigDict],
  prepared: Prepared,
  params: Mapping[str, Any],
  num_steps: int,
) -> Times:
  """Takes some steps on a state of its own, and returns how long they took.

  No result changes by it: the first state of a run, its batches and all that it draws
  are functions of its config, and the run makes them anew. What was compiled, and
  features that were computed, are there for the run.

  Args:
    configs: of the trials, as for `tune.train_trials`.
    prepared: for them.
    params: that they start from.
    num_steps: to be measured, after a first one. No clock decides how many, because all
      processes have to take the same.
  """
  config, program = configs[0], prepared.program
  split = prepared.data.splits[config.data.train_split]
  clock = [time.perf_counter()]

  def tick(results: Any) -> float:
    jax.block_until_ready(results)
    clock.append(time.perf_counter())
    return clock[-1] - clock[-2]

  if len(configs) == 1:
    state = create_state(config, program, params)
  else:
    state = population.stack_state(configs, program, params)
  start = tick(state)
  cached = prepared.features(config, config.data.train_split, state.params)
  in_features = tick(cached)
  route = prepared.route(config, config.data.train_split, state.params, train=True)
  start += tick(route)
  feed = batches.create_feed(config, program, split, state, cached, route)
  with contextlib.closing(feed):
    state, metrics = feed.step(state, feed.next(1))
    first = tick(metrics)
    # Calls of many steps are as short as those of the run.
    per_call = min(feed.max_steps, _STEPS_PER_MEASURED)
    num_calls = max(1, num_steps // per_call)
    for _ in range(num_calls):
      state, metrics = feed.step(state, feed.next(per_call))
    step = tick(metrics) / (num_calls * per_call)
  return Times(
    start=start,
    feature=0.0 if cached is None else in_features / len(split),
    compilation=max(0.0, first - step),
    image=step / (config.batch_size * len(configs)),
  )


@dataclasses.dataclass(frozen=True)
class Pace:
  """What the first steps of one row say of the time that all runs take.

  Attributes:
    label: of the row.
    trial: of its trials; of its final runs where there are no trials.
    final: of its final runs; as `trial` where a single trial was measured.
    together: how many trials train together.
    num_compiled: programs whose train step has been compiled.
    num_cached: images whose features have been computed.
  """

  label: str
  trial: Times
  final: Times
  together: int = 1
  num_compiled: int = 1
  num_cached: int = 0


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
      grid = f" ({work.grid})" if work.grid else ""
      trials = f"{work.num_trials} trial{plural} of {work.trial_steps} steps{grid}"
      final = f"{work.num_finals} final of {work.final_steps}"
      both = f"{trials} and {final}" if work.num_trials else f"{final} steps"
      parts.append(f"{label} {both}")
    total = self.whole.num_runs
    runs = "1 run" if total == 1 else f"{total} runs"
    return f"{runs}: {', '.join(parts)}; those that are finished are kept"

  def to_measure(self, left: Mapping[str, tuple[int, int]]) -> tuple[str, int] | None:
    """Returns (label, steps) of the row whose first steps tell how long all takes.

    None where all is done in seconds, where one run is left, or where measuring would
    be a good part of it.

    Args:
      left: (trials, final runs) of each row that are not finished.
    """
    works = {label: work.to_do(left[label]) for label, work in self._works.items()}
    missing = [label for label, work in works.items() if work.images]
    total = sum(works[label].total_flops for label in missing)
    # A single run says so itself from its first steps on.
    if total < _WORTH_MEASURING or sum(map(sum, left.values())) < 2:
      return None
    # Steps on cached features say nothing of the others.
    label = next((each for each in missing if works[each].flops), missing[0])
    work = works[label]
    num_steps = work.num_trials * work.trial_steps + work.num_finals * work.final_steps
    if work.flops and num_steps < 10 * _MEASURED:
      return None
    return label, max(2, min(_MEASURED, num_steps // _STEPS_PER_MEASURED))

  def seconds(
    self,
    pace: Pace,
    left: Mapping[str, tuple[int, int]] | None = None,
    works: Mapping[str, Work] | None = None,
  ) -> float:
    """Returns how long runs are going to take.

    Args:
      pace: of one of the rows on this task.
      left: (trials, final runs) of each row that are not finished; None for all.
      works: of the rows on another task; None for this one.
    """
    is_other, works = works is not None, works or self._works
    if left is not None:
      works = {label: work.to_do(left[label]) for label, work in works.items()}
    measured, trial = works[pace.label], pace.trial
    total, num_programs, by_label = 0.0, 0, self._flops
    for label, work in works.items():
      ratio = by_label[label] / by_label[pace.label]
      total += work.num_trials * work.trial_images * trial.image * ratio
      total += work.num_finals * work.final_images * pace.final.image * ratio
      num_calls = -(-work.num_trials // pace.together) + work.num_finals
      total += num_calls * trial.start
      # A head alone is compiled in no time beside the others.
      if bool(work.flops) == bool(measured.flops):
        num_programs += min(work.num_programs, work.num_trials) + bool(work.num_finals)
    num_compiled = max(0, num_programs - (0 if is_other else pace.num_compiled))
    total += trial.compilation * (num_compiled + _EVALUATION_COMPILES * num_programs)
    # Rows share the features of a split.
    dearest = max(works.values(), key=lambda work: work.num_cached * work.feature_flops)
    num_cached = dearest.num_cached - (0 if is_other else pace.num_cached)
    by_flops = dearest.feature_flops * pace.final.image / by_label[pace.label]
    return total + max(0, num_cached) * (trial.feature or by_flops)

  def row(self, label: str) -> Row:
    """Returns what a row tells of its runs."""
    work, flops = self._works[label], self._flops[label]
    # Steps on cached features say nothing of the others.
    is_typical = bool(work.flops) or not any(w.flops for w in self._works.values())
    return Row(
      self.whole, work.trial_images * flops, work.final_images * flops, is_typical
    )


def about(seconds: float | int) -> str:
  """Returns a time as one says it beforehand: "40 s", "14 min", "4.4 h", "2.5 days"."""
  for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
    if seconds < 95 * size:
      digits = 1 if unit == "h" else 0
      return f"{max(1, round(seconds / size, digits)):.{digits}f} {unit}"
  return f"{seconds / 86400:.1f} days"


def forecast(
  seconds: float | int,
  later: Sequence[float | int] = (),
  now: datetime.datetime | None = None,
) -> str:
  """Returns the line that says beforehand how long a search takes, and until when.

  Args:
    seconds: of the runs that are left.
    later: the seconds of each task that comes after this one.
    now: the time of day; None asks the clock.
  """
  now = now or datetime.datetime.now()

  def until(seconds: float | int) -> str:
    end = now + datetime.timedelta(seconds=seconds)
    form = "%H:%M" if end.date() == now.date() else "%a %d %b, %H:%M"
    return f"{about(seconds)}, until about {end.strftime(form)}"

  line = f"search: about {until(seconds)}"
  if not later:
    return line
  everything = until(seconds + sum(later))
  return f"{line}; the {1 + len(later)} tasks that are left about {everything}"
