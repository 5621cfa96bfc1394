"""The loop over batches, with all that happens between two steps."""

from collections.abc import Mapping
import contextlib
import math
import signal

import jax
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import partition
from insvp_jax import program as program_lib
from insvp_jax.checkpoints import Checkpointer
from insvp_jax.clock import Clock
from insvp_jax.data import pipeline
from insvp_jax.data.preprocess import get_preset
from insvp_jax.profiling import Profiler
from insvp_jax.stopping import Stopped


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

  def batches(self, start_step: int, arrays):
    """Returns the iterator over the batches from a step on.

    Args:
      start_step: number of batches before the first one.
      arrays: from `features`; None for batches of images.
    """
    program = self.prepared.program
    sharding = partition.batch_sharding(program.mesh)
    if arrays is not None:
      return pipeline.resident_batches(
        arrays,
        batch_size=self.config.batch_size,
        seed=self.config.seed,
        start_step=start_step,
        sharding=sharding,
      )
    return pipeline.train_batches(
      self.prepared.data.splits[self.config.data.train_split],
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      preset=get_preset(self.config.data.preset),
      image_size=program.model.backbone.image_size,
      start_step=start_step,
      sharding=sharding,
    )

  def run(self, state):
    """Returns the state after the last step."""
    self.clock.skip()
    with self.clock.waiting():
      arrays = self._resident(state)
    self.clock.add(0, 0)
    batches = self.batches(int(state.step), arrays)
    # A stream has threads, which end with it.
    with contextlib.closing(batches), contextlib.closing(self.profiler):
      return self._run(state, batches)

  def _resident(self, state):
    # A run that has finished is only evaluated again.
    if int(state.step) == self.prepared.program.total_steps:
      return None
    return self.features(state, self.config.data.train_split)

  def _run(self, state, batches):
    config, program = self.config, self.prepared.program
    start = marked = int(state.step)
    if self.before.get("evaluation_due"):
      self._evaluate(start, state)
    self.clock.skip()
    previous = None
    for step in range(start + 1, program.total_steps + 1):
      first, last = step == start + 1, step == program.total_steps
      self.profiler.before(step)
      with self.clock.compiling(first), self.clock.waiting(not first):
        batch = next(batches)
      with self.clock.compiling(first):
        state, metrics = program.train_step(state, batch)
      # The step before this one is done: looking at it does not stall the device.
      self._check_finite(previous, step - 1)
      previous = metrics
      self.profiler.after(step, metrics)
      stopping = self._is_stopping(step)
      logs = step == 1 or last or step % config.log_every_steps == 0
      saves = last or stopping or self._is_due(step, config.checkpoint_every_epochs)
      evaluates = not last and self._is_due(step, config.eval_every_epochs)
      if not (first or logs or saves or evaluates):
        continue
      self._check_finite(metrics, step)
      self.clock.add(0 if first else step - marked, config.batch_size)
      marked = step
      if logs:
        self._log(step, metrics)
      # There may be little time left before the machine is gone.
      due = evaluates and stopping
      if evaluates and not stopping:
        self._evaluate(step, state)
      if saves:
        progress = {
          **self.clock.state(),
          "evaluation_due": int(due),
          "metrics_lines": self.writers.lines,
        }
        self.checkpointer.save(state, progress=progress, force=stopping)
      if stopping:
        raise Stopped(self.stop.signum or signal.SIGTERM, step)
      self.clock.skip()
    return state

  def _is_due(self, step: int, every_epochs: float) -> bool:
    if every_epochs <= 0:
      return False
    every = max(1, round(every_epochs * self.prepared.program.steps_per_epoch))
    return step % every == 0

  def _is_stopping(self, step: int) -> bool:
    return self.stop.signum is not None or self.checkpointer.reached_preemption(step)

  def _check_finite(self, metrics, step: int) -> None:
    if metrics is None:
      return
    found = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if wrong := divergence(found, step, self.config):
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
