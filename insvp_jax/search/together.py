"""Searches and repeated runs as populations: the loop, and what each run leaves behind.

Two kinds of runs train together:

- Trials of a search (`search`) leave nothing but what is returned. Interrupted, the
  trials under way start again.
- Runs with a workdir (`train`) each leave what `trainer.train` leaves. Interrupted,
  they go on from their checkpoints, together.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax.distributed.stopping import Stopped, StopSignal
from insvp_jax.logs.writers import Writers, remove_partial, write_json
from insvp_jax.search.member_files import (
  MeanWriter,
  MemberFiles,
  MemberWriters,
  NoFiles,
)
from insvp_jax.search.population import Population
from insvp_jax.train import features, parameters, report, trainer
from insvp_jax.train import program as program_lib
from insvp_jax.train.loop import Diverged, Loop, divergence
from insvp_jax.train.preparation import Prepared


class PopulationLoop(Loop):
  """The loop of `loop` over a stacked state.

  Attributes:
    lost: what became of the members that diverged, by index. They go on as numbers
      that nobody looks at.
  """

  def __init__(
    self, configs, prepared, population, checkpointer, writers, stop, workdir
  ):
    """Takes the members' configs, and what stands for all their files."""
    program = dataclasses.replace(
      prepared.program,
      train_step=population.train_step,
      train_call=population.train_call,
    )
    prepared = dataclasses.replace(prepared, program=program)
    super().__init__(configs[0], prepared, checkpointer, writers, stop, workdir)
    self.configs = configs
    self.population = population
    self.peak_lr = np.array([program_lib.peak_lr(config) for config in configs])
    self.lost: dict[int, str] = {}
    checkpointer.lost = writers.lost = self.lost

  def features(self, state, split):
    # Backbones of their own would each have other features.
    return super().features(state, split) if self.population.one_backbone else None

  @property
  def seed(self):
    if self.population.one_seed:
      return super().seed
    return np.array([config.seed % 2**32 for config in self.configs], np.uint32)

  def batches(self, start_step, arrays=None):
    return self.population.batches(self.configs, self._split, start_step, arrays)

  def _check_finite(self, metrics, step):
    if metrics is None:
      return
    found, steps = jax.device_get((metrics, step))
    steps = np.broadcast_to(steps, len(self.configs))
    for i, config in enumerate(self.configs):
      mine = {name: float(values[i]) for name, values in found.items()}
      wrong = "" if i in self.lost else divergence(mine, int(steps[i]), config)
      if wrong:
        self.lost[i] = f"{wrong} {self.checkpointer.kept(i)}".strip()
    if len(self.lost) == len(self.configs):
      raise Diverged(self.lost[0])

  def _evaluate(self, step, state):
    on_train = self.config.data.train_split == "train"
    if not on_train or "val" not in self.prepared.data.splits:
      return
    found = self.evaluate(state)
    scalars = {f"val_{name}": values for name, values in found.items()}
    self.writers.scalars(step, scalars)
    best = np.nanmax(found["accuracy"])
    self.writers.log(f"step {step}: val accuracy up to {100 * best:.2f}%")

  def evaluate(self, state) -> dict[str, np.ndarray]:
    """Returns accuracy and loss on val of each member."""
    arrays = self.features(state, "val")
    program, split = self.prepared.program, self.prepared.data.splits["val"]
    batches = features.eval_batches(self.config, program, split, arrays)
    return self.population.evaluate(state, batches)


def search(
  configs: Sequence[ConfigDict],
  prepared: Prepared,
  population: Population,
  drawn: Mapping[int, Mapping[str, Any]],
  workdir: Path,
  name: str,
) -> list[dict[str, Any]]:
  """Trains trials on train and evaluates them on val; never looks at test.

  Args:
    configs: of the trials; alike but for lr, wd and the program's numbers.
    prepared: for any of them.
    population: of them.
    drawn: initial parameters, from `Population.draw`.
    workdir: gets the progress of these trials, metrics.jsonl.
    name: for the progress line.

  Returns:
    For each, `val_accuracy` in [0, 1] and `val_loss` in nats after the last epoch,
    `diverged`: None, or what went wrong in place of these, and its share of the time.
  """
  files = NoFiles()
  config = configs[0].copy_and_resolve_references()
  # The choice is the last epoch's; nothing before it counts.
  config.eval_every_epochs = config.checkpoint_every_epochs = 0.0
  config.profile = ""
  configs = [config, *configs[1:]]
  state = population.create(configs, drawn)
  total = prepared.program.total_steps
  with Writers(workdir, total_steps=total, tensorboard=False, name=name) as writers:
    writers = MeanWriter(writers)
    loop = PopulationLoop(
      configs, prepared, population, files, writers, StopSignal(), workdir
    )
    try:
      state = loop.run(state)
    except Diverged:
      return [_trial(loop, i, None) for i in range(len(configs))]
    found = loop.evaluate(state)
  return [_trial(loop, i, found) for i in range(len(configs))]


def _trial(loop: PopulationLoop, i: int, found: Mapping | None) -> dict[str, Any]:
  rate, seconds = loop.clock.images_per_second, loop.clock.seconds
  number = len(loop.configs)
  trial = {
    "val_accuracy": None,
    "val_loss": None,
    "diverged": loop.lost.get(i),
    "train_seconds": seconds / number,
    "images_per_second": rate * number,
  }
  if i not in loop.lost:
    trial["val_accuracy"] = float(found["accuracy"][i])
    trial["val_loss"] = float(found["loss"][i])
  return trial


def train(
  configs: Sequence[ConfigDict],
  workdirs: Sequence[Path],
  prepared: Prepared,
  population: Population,
) -> list[dict[str, Any]]:
  """Trains several runs together; each ends, and can be resumed, as one of its own.

  Runs that were interrupted together go on together; one that stands elsewhere, since
  it was trained alone or lost its newest checkpoint, goes on alone.

  Args:
    configs: alike but for seed, lr, wd.
    workdirs: of each; see `trainer.train`.
    prepared: for any of them.
    population: of them.

  Returns:
    The results of `trainer.train`, whose train_seconds are a run's share of the time.

  Raises:
    As `trainer.train`. Diverged comes when the other runs are finished.
  """
  lost = _train(configs, workdirs, prepared, population)
  results = [
    trainer.train(config, workdir, prepared=prepared)
    for i, (config, workdir) in enumerate(zip(configs, workdirs, strict=True))
    if i not in lost
  ]
  if lost:
    i, message = min(lost.items())
    raise Diverged(f"{workdirs[i]}: {message}")
  return results


def _train(configs, workdirs, prepared, population) -> dict[int, str]:
  """Trains to the last checkpoints; returns what became of diverged members."""
  drawn = population.draw(configs, prepared.weights)
  data_sha256 = report.data_digest(configs[0], prepared.data, True)
  with contextlib.ExitStack() as stack:
    for workdir in workdirs:
      stack.enter_context(trainer.own(workdir))
    stop = stack.enter_context(StopSignal().listen(jax.process_count() == 1))
    checkpointers = []
    for config, workdir in zip(configs, workdirs, strict=True):
      backbone = parameters.identify(
        prepared.backbone, config.seed, drawn[config.seed]["backbone"]
      )
      meta = report.describe_run(config, prepared, backbone, data_sha256)
      trainer.check_processes(meta)
      opened = trainer.open_checkpoints(config, workdir, prepared.program, meta)
      checkpointers.append(stack.enter_context(opened))
      remove_partial(workdir)
    state = population.create(configs, drawn)
    if {c.latest_step() for c in checkpointers} != {None}:
      states = [
        checkpointer.restore(population.member(state, i))
        for i, checkpointer in enumerate(checkpointers)
      ]
      # One that stands elsewhere would hold up the others.
      if None in states or len({int(s.step) for s in states}) > 1:
        return {}
      state = population.stack(states)
    files = MemberFiles(population, checkpointers)
    progress = checkpointers[0].progress()
    writers = _open_writers(stack, configs, workdirs, prepared, progress)
    loop = PopulationLoop(
      configs, prepared, population, files, writers, stop, workdirs[0]
    )
    try:
      state = loop.run(state)
    except Diverged:
      return loop.lost
  if stop.signum is not None:
    raise Stopped(stop.signum, int(state.step))
  return loop.lost


def _open_writers(stack, configs, workdirs, prepared, progress) -> MemberWriters:
  silent = stack.enter_context(open(os.devnull, "w"))
  name = f"{prepared.data.name} {configs[0].method}, {len(configs)} runs"
  opened, step = [], progress.get("step", 0)
  for i, (config, workdir) in enumerate(zip(configs, workdirs, strict=True)):
    write_json(workdir / "config.json", config_lib.to_dict(config))
    writers = Writers(
      workdir,
      total_steps=prepared.program.total_steps,
      start_step=step,
      start_lines=progress.get("metrics_lines"),
      tensorboard=config.tensorboard,
      name=name,
      # They are at the same step: one progress line will do.
      stream=silent if i else None,
    )
    opened.append(stack.enter_context(writers))
  opened[0].log(report.announce(configs[0], prepared, step))
  return MemberWriters(opened)
