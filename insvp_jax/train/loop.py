"""The loop over batches, with all that happens between two steps."""

from collections.abc import Mapping
import contextlib
import functools
import math
import signal

import jax
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.data import pipeline
from insvp_jax.data.preprocess import get_preset
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.train import calls
from insvp_jax.train import program as program_lib
from insvp_jax.train.batches import create_feed
from insvp_jax.train.profiling import Profiler
from insvp_jax.train.timing import Clock


class Diverged(FloatingPointError):
  """The loss, a gradient or a parameter is no longer a number."""


class Loop:
  """Runs the steps; logs, evaluates, saves and stops between them."""

  def __init__(self, config, prepared, checkpointer, writers, stop, workdir):
    """Takes what `train` opened; runs nothing."""
    self.config = config
    self.prepared = prepared
    self.checkpointer = checkpointer
    self.writers = writers
    self.stop = stop
    self.before = checkpointer.progress()
    known = {k: v for k, v in self.before.items() if k in Clock().state()}
    self.clock = Clock(**known)
    steps = config_lib.profile_steps(config)
    self.profiler = Profiler(steps, workdir / "profile")
    self.peak_lr = program_lib.peak_lr(config)

  def features(self, state, split: str):
    """Returns what of a split is on the devices if its features are cached."""
    return self.prepared.features(self.config, split, state.params)

  @property
  def seed(self):
    """What the order of the data is drawn from, as an argument of a program."""
    return np.uint32(self.config.seed % 2**32)

  def batches(self, start_step: int, arrays=None):
    """Returns the iterator over the batches from a step on.

    Args:
      start_step: number of batches before the first one.
      arrays: images or features of the split and labels, if on the devices.
    """
    return pipeline.train_batches(
      self._split if arrays is None else arrays,
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      preset=get_preset(self.config.data.preset),
      image_size=self.prepared.program.model.backbone.image_size,
      start_step=start_step,
      sharding=mesh_lib.batch_sharding(self.prepared.program.mesh),
    )

  @property
  def _split(self):
    return self.prepared.data.splits[self.config.data.train_split]

  def run(self, state):
    """Returns the state after the last step."""
    start = int(state.step)
    if self.before.get("evaluation_due"):
      self._evaluate(start, state)
    # A run that has finished is only evaluated again.
    if start == self.prepared.program.total_steps:
      return state
    # A stream has threads, which end with it.
    with (
      contextlib.closing(self._feed(state, start)) as feed,
      contextlib.closing(self.profiler),
    ):
      return self._run(state, feed, start)

  def _feed(self, state, start: int):
    self.clock.skip()
    with self.clock.waiting():
      features = self.features(state, self.config.data.train_split)
    with self.clock.compiling():
      feed = create_feed(
        self.config,
        self.prepared.program,
        self._split,
        state,
        features=features,
        seed=self.seed,
        batches=functools.partial(self.batches, start),
      )
    self.clock.add(0, 0)
    return feed

  def _run(self, state, feed, start: int):
    self._asked = step = marked = start
    seen = None
    while step < self.prepared.program.total_steps:
      first = step == start
      alone = first or feed.most == 1
      count = 1 if alone else self._next_end(step, feed.most) - step
      self.profiler.before(step + 1)
      with self.clock.compiling(first), self.clock.waiting(not first):
        given = feed.next(count)
      with self.clock.compiling(first):
        state, metrics, at = feed.advance(state, given)
      step += count
      # The call before this one is done: looking at it does not stall the device.
      self._check_finite(*(seen or (None, 0)))
      seen = metrics, step if at is None else at
      self.profiler.after(step, metrics)
      stopping = self._is_stopping(step)
      if not (first or stopping or any(self._is_at(step))):
        continue
      self._check_finite(*seen)
      self.clock.add(0 if first else step - marked, self.config.batch_size)
      marked = step
      self._at_end_of_call(step, state, metrics, stopping)
      self.clock.skip()
    return state

  def _at_end_of_call(self, step: int, state, metrics, stopping: bool) -> None:
    """Logs, evaluates and saves what is due, and stops if it has to."""
    logs, saves, evaluates = self._is_at(step)
    if logs:
      self._log(step, metrics)
    # There may be little time left before the machine is gone.
    due = evaluates and stopping
    if evaluates and not stopping:
      self._evaluate(step, state)
    if saves or stopping:
      progress = {
        **self.clock.state(),
        "evaluation_due": int(due),
        "metrics_lines": self.writers.lines,
      }
      self.checkpointer.save(state, progress=progress, force=stopping)
    if stopping:
      raise Stopped(self.stop.signum or self.stop.passed_on or signal.SIGTERM, step)

  def _is_at(self, step: int) -> tuple[bool, bool, bool]:
    """Returns whether a step is one to log, to save and to evaluate at."""
    last = step == self.prepared.program.total_steps
    log, save, evaluate = (bool(p) and step % p == 0 for p in self._periods())
    return step == 1 or last or log, last or save, evaluate and not last

  def _next_end(self, step: int, most: int) -> int:
    """Returns the last step of the call after a step."""
    limit = min(step + most, self.prepared.program.total_steps)
    first, last = config_lib.profile_steps(self.config) or (1, 0)
    return calls.next_end(step, limit, self._periods(), [first - 1, last])

  def _periods(self) -> tuple[int, int, int]:
    """Returns every how many steps it logs, saves and evaluates; 0 is never."""
    config, per_epoch = self.config, self.prepared.program.steps_per_epoch
    epochs = config.checkpoint_every_epochs, config.eval_every_epochs
    save, evaluate = (max(1, round(n * per_epoch)) if n > 0 else 0 for n in epochs)
    return config.log_every_steps, save, evaluate

  def _is_stopping(self, step: int) -> bool:
    # Every process has to ask JAX's preemption service about each step in turn.
    steps, self._asked = range(self._asked + 1, step + 1), step
    reached = [self.checkpointer.reached_preemption(each) for each in steps]
    return self.stop.signum is not None or any(reached)

  def _check_finite(self, metrics, step) -> None:
    if metrics is None:
      return
    metrics, step = jax.device_get((metrics, step))
    found = {name: float(value) for name, value in metrics.items()}
    if wrong := divergence(found, int(step), self.config):
      raise Diverged(f"{wrong} {kept(self.checkpointer)}")

  def _log(self, step: int, metrics) -> None:
    program = self.prepared.program
    update = (step - 1) // self.config.optim.accumulate_steps
    lr = float(program.schedule(update)) * self.peak_lr
    epoch = step / program.steps_per_epoch
    self.writers.train(
      step,
      {**metrics, "lr": lr, "epoch": epoch},
      images_per_second=self.clock.images_per_second,
    )

  def _evaluate(self, step: int, state) -> None:
    on_train = self.config.data.train_split == "train"
    if not on_train or "val" not in self.prepared.data.splits:
      return
    found = self.prepared.evaluate(self.config, "val", state.params)
    scalars = {"val_accuracy": found["accuracy"], "val_loss": found["loss"]}
    self.writers.scalars(step, scalars)
    self.writers.log(f"step {step}: val accuracy {100 * found['accuracy']:.2f}%")


def divergence(metrics: Mapping[str, float], step: int, config: ConfigDict) -> str:
  """Returns what is wrong with the metrics of a step, and how to mend it, or ""."""
  # The loss is that before the update: the norms tell of what a save would keep.
  wrong = {name: v for name, v in metrics.items() if not math.isfinite(v)}
  if not wrong:
    return ""
  name, value = ("loss", wrong["loss"]) if "loss" in wrong else wrong.popitem()
  return (
    f"the {name} is {value} at step {step}. Lower config.optim.lr "
    f"(now {config.optim.lr:g}) or set config.optim.grad_clip_norm."
  )


def kept(checkpointer: Checkpointer) -> str:
  """Returns which checkpoint of a run there is."""
  last = checkpointer.latest_step()
  return f"The checkpoint of step {last} is kept." if last else "No checkpoint yet."
