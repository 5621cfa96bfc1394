"""One run, from a config to a result: read it from top to bottom.

`train` opens what a run needs, resumes, goes through `train_loop` and evaluates. The
command line, the search and notebooks call it. `train_loop` is THE loop over batches; a
search calls it, too, with a state that may be that of several trials at once.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import math
from pathlib import Path
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import config_checks, methods
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.data import SPLITS_FILE, TaskData, load_data
from insvp_jax.data.preprocess import get_preset
from insvp_jax.data.sources import stored_splits
from insvp_jax.distributed import lock, processes, stopping
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed.stopping import Interrupted, Stopped, StopSignal
from insvp_jax.logs import prompt_panels, weights_and_biases
from insvp_jax.logs.progress import Whole
from insvp_jax.logs.writers import Writers, remove_partial, write_json, write_text
from insvp_jax.methods import Method
from insvp_jax.train import batches, optim, report
from insvp_jax.train import state as state_lib
from insvp_jax.train.features import FeatureCache, RouteCache, are_cached
from insvp_jax.train.preparation import prepare_params, refresh_state
from insvp_jax.train.program import (
  Program,
  create_program,
  create_state,
  fill_preset,
  input_size,
)
from insvp_jax.train.state import TrainState
from insvp_jax.train.steps import METRICS
from insvp_jax.train.timing import Profiler, Timer

# What reads a task's data: as `load_data`.
ReadData = Callable[[str, ConfigDict, int], TaskData]


class Diverged(FloatingPointError):
  """The loss, a gradient or a parameter is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What several runs on one task and backbone share.

  Attributes:
    data: the task's splits.
    weights: the backbone's parameters; None for random ones.
    backbone: the backbone's identity, as stored with each run.
    program: the model and its steps.
    cache: features of the splits, where they are constant.
    routes: of the splits, where the method has a route.
    loaded: what loading the backbone did, in a line; "" for random weights.
    kept: how many of the training images are used: (shots, fraction) of config.data.
    read: how the data were read; see `prepare`.
  """

  data: TaskData
  weights: Mapping[str, Any] | None
  backbone: Mapping[str, Any]
  program: Program
  cache: FeatureCache = dataclasses.field(default_factory=FeatureCache)
  routes: RouteCache = dataclasses.field(default_factory=RouteCache)
  loaded: str = ""
  kept: tuple[int, float] = (0, 1.0)
  read: ReadData | None = None

  def features(
    self, config: ConfigDict, split: str, params: Mapping[str, Any]
  ) -> dict[str, Array] | None:
    """Returns a split's features and labels; None where they are not cached.

    Args:
      config: of the run.
      split: its name.
      params: whose "backbone" is applied.
    """
    # Random backbones differ from seed to seed, and so do their features.
    seed = config.seed if self.weights is None else None
    return self.cache.arrays(
      config, self.program, self.data.splits[split], params["backbone"], seed
    )

  def route(
    self, config: ConfigDict, split: str, params: Mapping[str, Any], *, train: bool
  ) -> Array | None:
    """Returns the route of a split's images; None where it is not cached.

    Args:
      config: of the run.
      split: its name.
      params: of the whole model, or of several trials.
      train: whether the images are to be trained on.
    """
    return self.routes.array(
      config,
      self.program,
      self.data.splits[split],
      params,
      train=train,
      seed=config.seed if self.weights is None else None,
    )

  def first_params(self, config: ConfigDict) -> Mapping[str, Any]:
    """Returns the parameters before the first step, drawn by the config's seed."""
    return state_lib.init_params(
      self.program.model,
      config.seed,
      self.weights,
      config.backbone.init,
      draws=self.program.draws,
    )

  def prepare_params(
    self, config: ConfigDict, params: Mapping[str, Any]
  ) -> Mapping[str, Any]:
    """Returns them with what the method computes of the training images."""
    split = self.data.splits[config.data.train_split]
    return prepare_params(config, self.program, split, params)

  def evaluate(
    self, config: ConfigDict, split: str, state: TrainState
  ) -> dict[str, Any]:
    """Returns what a model is worth on one split; see `Objective.evaluate`."""
    features = self.features(config, split, state.params)
    route = self.route(config, split, state.params, train=False)
    examples = self.data.splits[split]
    return self.program.objective.evaluate(
      lambda batch: self.program.eval_step(state.params, batch, state.hparams),
      batches.eval_batches(config, self.program, examples, features, route),
    )


def prepare(
  config: ConfigDict,
  like: Prepared | None = None,
  hparams: tuple[str, ...] = (),
  read: ReadData | None = None,
) -> Prepared:
  """Reads data and weights and builds the program; trains nothing.

  Args:
    config: the whole configuration.
    like: a preparation for the same task and backbone, whose data and weights are
      used again (for another method, or another training split). Data are read anew
      for another image size, or where another number of the training images is used.
    hparams: as for `create_program`.
    read: takes the arguments of `load_data` and reads the data in its place, where they
      are not what `config.task` names; None is that of `like`.

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  config_checks.validate(config)
  weights_and_biases.check_project(config.wandb)
  fill_preset(config)
  get_preset(config.data.preset)
  mesh = mesh_lib.create_mesh(fsdp=config.backbone.fsdp)
  # `create_program` checks it again: here a wrong size shows before data are read.
  mesh_lib.check_batch_size(config.batch_size, mesh)
  size = input_size(config)
  kept = (config.data.shots, float(config.data.fraction))
  read = read or (like.read if like else None)
  # Methods may take images of different sizes.
  if like and like.program.model.input_size == size and like.kept == kept:
    data = like.data
  else:
    data = (read or load_data)(config.task, config.data, size)
  split = config.data.train_split
  if split not in data.splits:
    raise ValueError(
      f"the task {data.name!r} has no split {split!r}, only "
      f"{', '.join(data.splits)}; set config.data.train_split to one of them."
    )
  program = create_program(
    config,
    data.num_classes,
    len(data.splits[split]),
    mesh,
    hparams,
    class_counts=data.splits[split].class_counts(data.num_classes),
    like=like.program if like else None,
  )
  # What follows may be a search of hours.
  stopping.check()
  if like:
    return dataclasses.replace(like, data=data, program=program, kept=kept)
  loaded: list[str] = []
  weights, identity = state_lib.load_weights(config, program.model, loaded.append)
  return Prepared(
    data,
    weights,
    identity,
    program,
    loaded="".join(loaded),
    kept=kept,
    read=read,
  )


def train(
  config: ConfigDict,
  workdir: str | Path,
  *,
  prepared: Prepared | None = None,
  test: bool = True,
  method: type[Method] | None = None,
  whole: Whole | None = None,
  read: ReadData | None = None,
) -> dict[str, Any]:
  """Trains one model, resuming where an earlier call was stopped.

  Args:
    config: the whole configuration, from `config.defaults()`.
    workdir: gets config.json, metrics.jsonl, checkpoints/, result.json.
    prepared: from `prepare`, to share data and compiled steps between runs. What the
      runs share is then not printed again.
    test: whether the test split is evaluated, once, after the last step. A search
      leaves it out: the test split never selects anything.
    method: a class of your own in place of `config.method`; see `methods.register`.
    whole: how far the search is that this run is a part of.
    read: as for `prepare`.

  Returns:
    The contents of result.json; accuracies in [0, 1], None where not evaluated.

  Raises:
    ValueError, FileNotFoundError: bad input, or another run that is under way owns
      the workdir; see the message.
    Diverged: the loss became NaN or infinite; the last good checkpoint stays.
    Stopped: SIGINT or SIGTERM came; a checkpoint was written.
    OSError: the disk is full or read-only.
  """
  # Preparing it writes what it leaves open, such as an automatic batch size.
  config = config.copy_and_resolve_references()
  if method is not None:
    config.method = methods.register(method)
    config_lib.complete(config)
  is_alone = prepared is None
  prepared = prepared or prepare(config, read=read)
  fill_preset(config)
  program, data, workdir = prepared.program, prepared.data, Path(workdir)
  _check_profile(config, program.total_steps)

  # The state before the first step, and what identifies this run.
  params = prepared.first_params(config)
  backbone = state_lib.backbone_identity(
    prepared.backbone, config.seed, params["backbone"]
  )
  data_sha256 = report.data_digest(config, data, test)
  meta = report.run_meta(config, program, data, backbone, data_sha256)
  _check_processes_agree(meta)

  with (
    hold_workdir(workdir),
    StopSignal().listen(jax.process_count() == 1) as stop,
    _open_checkpoints(config, workdir, program, meta) as checkpointer,
  ):
    remove_partial(workdir)
    if checkpointer.latest_step() is None:
      params = prepared.prepare_params(config, params)
    state = create_state(config, program, params)
    state = checkpointer.restore(state) or state
    if int(state.step) == 0:
      checkpointer.try_out(state)
    if is_alone:
      print_shared(config, prepared)
      print_params(config, prepared)
    # What the interrupted run counted; {} for a new one.
    progress = checkpointer.progress()
    start_step, timer = int(state.step), Timer.of(progress)
    spare = report.spare_params(program, state)
    write_json(workdir / "config.json", config_lib.stored(config))
    if data.files:
      lists = stored_splits.to_json(data.class_names, data.files, data.are_listed)
      write_json(workdir / SPLITS_FILE, lists)
    table = report.param_table(config, program)
    write_text(workdir / "parameters.txt", f"{table}\n")

    with Writers(
      workdir,
      total_steps=program.total_steps,
      start_step=start_step,
      start_lines=progress.get("metrics_lines"),
      tensorboard=config.tensorboard,
      wandb=config.wandb,
      config=config_lib.stored(config),
      name=f"{data.name} {config.method}",
      whole=whole,
    ) as writers:
      if start_step:
        writers.log(f"resumed at step {start_step} of {program.total_steps}")
      else:
        writers.log(report.run_text(config, program, data, spare))
      writers.text("config", report.config_table(config))

      if start_step < program.total_steps and processes.is_main_process():
        # That of a shorter run, which goes on.
        (workdir / "result.json").unlink(missing_ok=True)
      state = train_loop(
        config,
        prepared,
        state,
        workdir=workdir,
        writers=writers,
        stop=stop,
        timer=timer,
        checkpointer=checkpointer,
        progress=progress,
      )
      writers.log(timer.summary_line())

      # After training on train + val, an accuracy on val would be one on training data.
      has_val = "val" in data.splits and config.data.train_split != "train_val"
      has_test = test and "test" in data.splits
      result = report.result(
        config,
        program,
        timer,
        meta,
        step=int(state.step),
        spare=spare,
        val=prepared.evaluate(config, "val", state) if has_val else None,
        test=prepared.evaluate(config, "test", state) if has_test else None,
      )
      metrics = {k: result[k] for k in report.metric_keys(result)}
      writers.scalars(
        int(state.step), {k: v for k, v in metrics.items() if v is not None}
      )
      if test and writers.shows_images:
        _write_prompt_images(prepared, state, writers, get_preset(config.data.preset))
    # Whoever finds a result.json finds the last checkpoint, too.
    checkpointer.wait()
    write_json(workdir / "result.json", result)
  if stop.signum is not None:
    # The signal came after the last step; a search must not go on to its next run.
    raise Stopped(stop.signum, int(state.step))
  return result


def print_shared(config: ConfigDict, prepared: Prepared) -> None:
  """Says on standard error what all runs with this preparation share."""
  text = report.shared_text(config, prepared.program, prepared.data, prepared.loaded)
  processes.print_once(text, file=sys.stderr)


def print_params(config: ConfigDict, prepared: Prepared) -> None:
  """Says on standard error how many parameters the parts of the model have."""
  text = report.param_summary(config, prepared.program)
  processes.print_once(f"\n{text}\n", file=sys.stderr)


def train_loop(
  config: ConfigDict,
  prepared: Prepared,
  state: TrainState,
  *,
  workdir: Path,
  writers: Writers,
  stop: StopSignal,
  timer: Timer,
  checkpointer: Checkpointer | None = None,
  progress: Mapping[str, Any] | None = None,
  diverged: dict[int, str] | None = None,
) -> TrainState:
  """Takes all steps that are left; logs, evaluates, saves and stops between them.

  The state may be that of m trials (`search.population`): then each metric is [m], the
  writers get the mean over the trials that have not diverged, and the loop goes on
  until all of them have.

  Args:
    config: the whole configuration; of trials that of any of them.
    prepared: data and steps.
    state: before the next step. It is donated.
    workdir: gets profile/, the trace that `config.profile` asks for.
    writers: get the metrics.
    stop: asks the loop to end.
    timer: counts where the time goes.
    checkpointer: gets the state; None where nothing is saved.
    progress: what a run that goes on had stored with its checkpoint.
    diverged: gets {index: what went wrong} of each trial whose metrics are not finite.

  Returns:
    The state after the last step.

  Raises:
    Diverged: metrics are not finite; of trials, those of all of them.
    Stopped: the loop was asked to end, and did after a checkpoint; `Interrupted` where
      nothing is saved.
  """
  program, progress = prepared.program, progress or {}
  split_name, total_steps = config.data.train_split, program.total_steps
  num_members = np.size(state.peak_lr)
  step = start_step = int(state.step)
  # Every how many steps to log, save and evaluate; 0 is never.
  periods = log_every, save_every, eval_every = _periods(config, program)
  refresh_epochs = program.model.prompter.refresh_every_epochs()
  refresh_every = refresh_epochs * program.steps_per_epoch
  has_val = split_name == "train" and "val" in prepared.data.splits
  diverged = {} if diverged is None else diverged

  # A run that had to stop left out the evaluation that was due.
  if progress.get("evaluation_due") and has_val:
    _evaluate(config, prepared, state, writers, step)
  # A run that has finished is only evaluated again.
  if step == total_steps:
    return state

  timer.restart()
  split = prepared.data.splits[split_name]
  passes = are_cached(config, program, len(split)) or program.model.prompter.routes()
  with timer.computing_features() if passes else contextlib.nullcontext():
    features = prepared.features(config, split_name, state.params)
    route = prepared.route(config, split_name, state.params, train=True)
  with timer.compiling():
    feed = batches.create_feed(config, program, split, state, features, route)
  timer.add(0, 0)

  profile_steps = config_lib.profile_steps(config)
  profiler = Profiler(profile_steps, workdir / "profile")
  # A call of many steps ends where one of them is to be profiled alone.
  marks = [profile_steps[0] - 1, profile_steps[1]] if profile_steps else []
  pending = None  # metrics of the last call, which nobody has waited for
  timed_step = start_step  # up to which the timer has counted

  # A stream has threads, which end with it.
  with contextlib.closing(feed), contextlib.closing(profiler):
    while step < total_steps:
      # After what is saved at this step, so that a resumed run does it, too.
      if refresh_every and step % refresh_every == 0:
        state = refresh_state(config, program, split, state)
      # One call takes the steps up to `end`. The first one is a single step, which
      # compiles: it is timed apart.
      is_first = step == start_step
      max_steps = 1 if is_first else min(feed.max_steps, total_steps - step)
      end = batches.next_end(step, max_steps, (*periods, refresh_every), marks)
      profiler.before(step + 1)
      with timer.compiling() if is_first else timer.waiting():
        batch = feed.next(end - step)
      with timer.compiling() if is_first else contextlib.nullcontext():
        state, metrics = feed.step(state, batch)
      # The device is still busy with this call. The one before it is done, so that
      # looking at its metrics does not stall the device.
      _check_finite(pending, diverged, num_members, state, checkpointer)
      pending = metrics
      profiler.after(end, metrics)

      # Asked in any case: all processes have to ask about the same steps.
      is_preempted = _is_preempted(step + 1, end)
      is_stopping = is_preempted or stop.signum is not None
      step, is_last = end, end == total_steps
      logs = step == 1 or is_last or _is_multiple(step, log_every)
      saves = is_last or _is_multiple(step, save_every)
      evaluates = _is_multiple(step, eval_every) and not is_last
      if not (is_first or is_stopping or logs or saves or evaluates):
        continue

      # From here on the host waits for the device.
      _check_finite(metrics, diverged, num_members, state, checkpointer)
      num_steps = 0 if is_first else step - timed_step
      num_images = 0 if features else num_steps * config.batch_size * num_members
      timer.add(num_steps, num_images)
      timed_step = step
      if logs:
        _log(config, program, metrics, diverged, writers, timer, step)
      # A process that has to stop may have little time left: it evaluates later.
      if evaluates and has_val and not is_stopping:
        _evaluate(config, prepared, state, writers, step)
      if checkpointer and (saves or is_stopping):
        progress = {
          **timer.state(),
          "evaluation_due": int(evaluates and is_stopping),
          "metrics_lines": writers.lines,
        }
        checkpointer.save(state, progress=progress, force=is_stopping)
      if is_stopping:
        signum = stop.signum or stop.passed_on or signal.SIGTERM
        raise Stopped(signum, step) if checkpointer else Interrupted(signum)
      timer.restart()
  return state


def _periods(config: ConfigDict, program: Program) -> tuple[int, int, int]:
  """Returns every how many steps to log, save and evaluate; 0 is never."""

  def steps(epochs: float) -> int:
    return max(1, round(epochs * program.steps_per_epoch)) if epochs > 0 else 0

  return (
    config.log_every_steps,
    steps(config.checkpoint_every_epochs),
    steps(config.eval_every_epochs),
  )


def _is_multiple(step: int, period: int) -> bool:
  return period > 0 and step % period == 0


def _is_preempted(first: int, last: int) -> bool:
  """Returns whether the cluster is about to take a machine of this run away.

  Every process has to ask JAX's preemption service about each step in turn; all get
  the same answer for the same step.
  """
  try:
    answers = [
      multihost_utils.reached_preemption_sync_point(step)
      for step in range(first, last + 1)
    ]
  except RuntimeError:  # The service is turned off.
    return False
  return any(answers)


def _check_finite(
  metrics: Mapping[str, Any] | None,
  diverged: dict[int, str],
  num_members: int,
  state: TrainState,
  checkpointer: Checkpointer | None,
) -> None:
  """Adds the members whose metrics are not finite to `diverged`.

  The loss is that before the update; the norms tell of what a checkpoint would keep.

  Raises:
    Diverged: no member is left.
  """
  if metrics is None:
    return
  values = {name: np.atleast_1d(v) for name, v in jax.device_get(metrics).items()}
  for member in set(range(num_members)) - set(diverged):
    wrong = [name for name in METRICS if not math.isfinite(values[name][member])]
    if wrong:
      name = wrong[0]
      peak_lr = np.atleast_1d(jax.device_get(state.peak_lr))[member]
      diverged[member] = (
        f"the {name} is {values[name][member]} at step {values['step'][member]}. Lower "
        f"config.optim.lr (now {peak_lr:g}) or set config.optim.grad_clip_norm."
      )
  if len(diverged) == num_members:
    message = diverged[0]
    if checkpointer:
      last = checkpointer.latest_step()
      message += (
        f" The checkpoint of step {last} is kept." if last else " No checkpoint yet."
      )
    raise Diverged(message)


def _log(
  config: ConfigDict,
  program: Program,
  metrics: Mapping[str, Any],
  diverged: Mapping[int, str],
  writers: Writers,
  timer: Timer,
  step: int,
) -> None:
  """Writes the metrics of a step; of several trials the mean of those left."""
  names = (*METRICS, *program.functions.measures)
  scalars = {name: np.asarray(metrics[name]) for name in names}
  scalars["epoch"] = step / program.steps_per_epoch
  if np.ndim(metrics["loss"]) == 0:
    # As `steps.update_params` computes it; trials each have their own.
    factor = float(program.lr_factor(np.int32(step - 1)))
    scalars["lr"] = factor * optim.peak_lr(config.optim, config.batch_size)
  else:
    left = [i for i in range(len(metrics["loss"])) if i not in diverged]
    scalars |= {name: np.mean(scalars[name][left]) for name in names}
    scalars["diverged"] = len(diverged)
  writers.train(step, scalars, images_per_second=timer.images_per_second or 0.0)


def _evaluate(
  config: ConfigDict, prepared: Prepared, state: TrainState, writers: Writers, step: int
) -> None:
  """Evaluates on val while training."""
  objective = prepared.program.objective
  val = prepared.evaluate(config, "val", state)
  scalars = {f"val_{name}": value for name, value in objective.scalars(val).items()}
  writers.scalars(step, scalars)
  value = 100 * val[objective.METRIC]
  writers.log(f"step {step}: val {objective.TITLE} {value:.2f}%")


def hold_workdir(workdir: Path) -> contextlib.AbstractContextManager[None]:
  """Returns the context in which no other run may use a workdir."""
  return lock.hold(workdir) if processes.is_main_process() else contextlib.nullcontext()


def _open_checkpoints(
  config: ConfigDict, workdir: Path, program: Program, meta: Mapping[str, Any]
) -> Checkpointer:
  """Returns the checkpoints of a run, from `run_meta`; close them."""

  def report_damage(text: str) -> None:
    # There are no writers yet.
    if processes.is_main_process():
      print(text, file=sys.stderr, flush=True)

  return Checkpointer(
    workdir,
    mask=program.mask,
    meta=meta,
    keep=config.keep_checkpoints,
    report=report_damage,
  )


def _check_processes_agree(meta: Mapping[str, Any]) -> None:
  """Checks that all processes have the same data, backbone and versions.

  Raises:
    ValueError: they do not.
  """
  shared = {key: meta[key] for key in ("data_sha256", "versions")}
  # Each host has its files wherever it likes.
  shared["backbone"] = {
    k: v for k, v in meta["backbone"].items() if k not in ("id", "source")
  }
  processes.check_same("its data, backbone or versions", shared)


def _check_profile(config: ConfigDict, total_steps: int) -> None:
  steps = config_lib.profile_steps(config)
  if steps and steps[1] > total_steps:
    raise ValueError(
      f"config.profile is {config.profile!r}, but the run has only {total_steps} steps."
    )


def _write_prompt_images(prepared: Prepared, state, writers: Writers, preset) -> None:
  """Draws prompts of images that the run has been tested on, if it has any."""
  split = prepared.data.splits.get("test") or prepared.data.splits.get("val")
  if split is not None:
    model = prepared.program.model
    panels = prompt_panels.prompt_panels(model, state.params, split, preset)
    writers.images(int(state.step), panels)
