"""The one training loop, readable top to bottom.

`train(config, workdir)` is what the command line, the tuner and notebooks call.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import math
from pathlib import Path
import signal
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from insvp_jax import cluster, lock, memory, partition, prompt_panels, trees
from insvp_jax import config as config_lib
from insvp_jax import program as program_lib
from insvp_jax.checkpoints import Checkpointer
from insvp_jax.clock import Clock
from insvp_jax.data import TaskData, load_data, pipeline
from insvp_jax.data.preprocess import get_preset
from insvp_jax.models.classifier import create_backbone
from insvp_jax.profiling import Profiler
from insvp_jax.program import Program
from insvp_jax.stopping import Stopped, StopSignal
from insvp_jax.versions import versions
from insvp_jax.writers import Writers, param_overview, remove_partial, write_json


class Diverged(FloatingPointError):
  """The loss, a gradient or a parameter is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What several runs on one task and backbone share.

  Attributes:
    data: the decoded task.
    weights: the backbone's parameters; None for random ones.
    backbone: the backbone's identity, as stored with each run.
    program: the compiled program.
  """

  data: TaskData
  weights: Mapping[str, Any] | None
  backbone: Mapping[str, Any]
  program: Program


def prepare(
  config: ConfigDict, like: Prepared | None = None, numbers: tuple[str, ...] = ()
) -> Prepared:
  """Reads data and weights and builds the program; trains nothing.

  Args:
    config: the whole configuration.
    like: a preparation for the same task and backbone, whose data and weights are
      used again (another method, another training split).
    numbers: the method's fields that shall be data; see `create_program`.

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  config_lib.validate(config)
  get_preset(config.data.preset)
  mesh = partition.create_mesh(fsdp=config.backbone.fsdp)
  partition.check_batch_size(config.batch_size, mesh)
  backbone = create_backbone(
    config.backbone.name, config.image_size, config_lib.backbone_kwargs(config)
  )
  data = like.data if like else load_data(config.task, config.data, backbone.image_size)
  split = config.data.train_split
  if split not in data.splits:
    raise ValueError(
      f"the task {data.name!r} has no split {split!r}, only "
      f"{', '.join(data.splits)}; set config.data.train_split to one of them."
    )
  program = program_lib.create_program(
    config, data.num_classes, len(data.splits[split]), mesh, numbers
  )
  if like:
    return Prepared(data, like.weights, like.backbone, program)
  weights, identity = program_lib.load_weights(config, program.model)
  return Prepared(data, weights, identity, program)


def train(
  config: ConfigDict,
  workdir: str | Path,
  *,
  prepared: Prepared | None = None,
  test: bool = True,
) -> dict[str, Any]:
  """Trains one model, resuming where an earlier call was stopped.

  Args:
    config: the whole configuration, from `config.defaults()`.
    workdir: gets config.json, metrics.jsonl, checkpoints/, result.json.
    prepared: from `prepare`, to share data and compiled steps between runs.
    test: whether the test split is evaluated, once, after the last step. A search
      leaves it out: the test split never selects anything.

  Returns:
    The contents of result.json; accuracies in [0, 1], None where not evaluated.

  Raises:
    ValueError, FileNotFoundError: bad input, or another run that is under way owns
      the workdir; see the message.
    Diverged: the loss became NaN or infinite; the last good checkpoint stays.
    Stopped: SIGINT or SIGTERM came; a checkpoint was written.
    OSError: the disk is full or read-only.
  """
  prepared = prepared or prepare(config)
  program = prepared.program
  workdir = Path(workdir)
  params = program_lib.init_params(
    program.model, config.seed, prepared.weights, config.backbone.init
  )
  state = program_lib.create_state(config, program, params)
  backbone = program_lib.identify(prepared.backbone, config.seed, params["backbone"])
  data_sha256 = data_digest(config, prepared.data, test)
  meta = describe_run(config, prepared, backbone, data_sha256)
  check_processes(meta)
  _check_profile(config, program.total_steps)
  with (
    own(workdir),
    # Of several processes all must stop at the same step: there JAX's preemption
    # service has to hear of the signal.
    StopSignal().listen(jax.process_count() == 1) as stop,
    open_checkpoints(config, workdir, program, meta) as checkpointer,
  ):
    remove_partial(workdir)
    state = checkpointer.restore(state) or state
    write_json(workdir / "config.json", config_lib.to_dict(config))
    with Writers(
      workdir,
      total_steps=program.total_steps,
      start_step=int(state.step),
      start_lines=checkpointer.progress().get("metrics_lines"),
      tensorboard=config.tensorboard,
      name=f"{prepared.data.name} {config.method}",
    ) as writers:
      writers.log(announce(config, prepared, int(state.step)))
      writers.text("config", _table(config))
      loop = Loop(config, prepared, checkpointer, writers, stop, workdir)
      state = loop.run(state)
      writers.log(loop.clock.describe())
      result = _result(config, prepared, state, loop, meta, test)
      accuracies = {k: v for k, v in result.items() if k.endswith("_accuracy")}
      writers.scalars(
        int(state.step), {k: v for k, v in accuracies.items() if v is not None}
      )
      if test and writers.shows_images:
        _show_prompts(prepared, state, writers, get_preset(config.data.preset))
    # Who has a result has the last checkpoint, too.
    checkpointer.wait()
    write_json(workdir / "result.json", result)
  if stop.signum is not None:
    # The signal came after the last step; a search must not go on to its next run.
    raise Stopped(stop.signum, int(state.step))
  return result


def data_digest(config: ConfigDict, data: TaskData, test: bool) -> str:
  """Returns the digest of the splits that a run reads."""
  splits = {config.data.train_split, "val"} | ({"test"} if test else set())
  return data.digest(splits)


def _report(text: str) -> None:
  """Says on the first of several processes what came before there are writers."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def own(workdir: Path) -> contextlib.AbstractContextManager[None]:
  """Returns the context in which a workdir is this run's alone."""
  return lock.hold(workdir) if jax.process_index() == 0 else contextlib.nullcontext()


def open_checkpoints(
  config: ConfigDict, workdir: Path, program: Program, meta: Mapping[str, Any]
) -> Checkpointer:
  """Returns the checkpoints of a run, from `describe_run`; close them."""
  return Checkpointer(
    workdir,
    mask=program.mask,
    meta=meta,
    keep=config.keep_checkpoints,
    report=_report,
  )


def check_processes(meta: Mapping[str, Any]) -> None:
  """Checks that all processes have the same data, backbone and versions.

  Raises:
    ValueError: they do not.
  """
  shared = {key: meta[key] for key in ("data_sha256", "versions")}
  # Wherever a host has its files.
  shared["backbone"] = {
    k: v for k, v in meta["backbone"].items() if k not in ("id", "source")
  }
  cluster.check_same("its data, backbone or versions", shared)


def _check_profile(config: ConfigDict, total_steps: int) -> None:
  steps = config_lib.profile_steps(config)
  if steps and steps[1] > total_steps:
    raise ValueError(
      f"config.profile is {config.profile!r}, but the run has only {total_steps} steps."
    )


def _table(config: ConfigDict) -> str:
  """Returns the config as a Markdown table."""
  flat = trees.flatten(config_lib.to_dict(config))
  rows = [f"| {name.replace('/', '.')} | {value} |" for name, value in flat.items()]
  return "\n".join(["| config | |", "|---|---|", *rows])


def _show_prompts(prepared: Prepared, state, writers: Writers, preset) -> None:
  """Draws prompts of images that the run has been tested on, if it has any."""
  split = prepared.data.splits.get("test") or prepared.data.splits.get("val")
  if split is not None:
    model = prepared.program.model
    panels = prompt_panels.prompt_panels(model, state.params, split, preset)
    writers.images(int(state.step), panels)


def announce(config: ConfigDict, prepared: Prepared, step: int) -> str:
  """Returns what a run prints first: parameters, data, protocol, devices."""
  if step:
    return f"resumed at step {step} of {prepared.program.total_steps}"
  program, mesh = prepared.program, prepared.program.mesh
  shapes = program_lib.param_shapes(program.model)
  return "\n".join(
    [
      param_overview(shapes, program.mask),
      prepared.data.describe(),
      get_preset(config.data.preset).describe(),
      f"{config.method} on {config.data.train_split}: {program.total_steps} steps of "
      f"{config.batch_size} images, lr {program_lib.peak_lr(config):g}, "
      f"wd {config.optim.wd:g}, seed {config.seed}; {mesh.size} x "
      f"{mesh.devices.flat[0].device_kind}, {config.backbone.dtype}"
      + (
        f", backbone split over {config.backbone.fsdp}" if "fsdp" in mesh.shape else ""
      ),
    ]
  )


class Loop:
  """The loop over batches, with all that happens between two steps."""

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

  def batches(self, start_step: int):
    """Returns the iterator over the batches from a step on."""
    program = self.prepared.program
    return pipeline.train_batches(
      self.prepared.data.splits[self.config.data.train_split],
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      preset=get_preset(self.config.data.preset),
      image_size=program.model.backbone.image_size,
      start_step=start_step,
      sharding=partition.batch_sharding(program.mesh),
    )

  def run(self, state):
    """Returns the state after the last step."""
    batches = self.batches(int(state.step))
    # A stream has threads, which end with it.
    with contextlib.closing(batches), contextlib.closing(self.profiler):
      return self._run(state, batches)

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
    found = program_lib.evaluate_split(
      self.config, self.prepared.program, state.params, self.prepared.data, "val"
    )
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


def describe_run(
  config: ConfigDict,
  prepared: Prepared,
  backbone: Mapping[str, Any],
  data_sha256: str,
) -> dict[str, Any]:
  """Returns what a run is, as stored with each of its checkpoints."""
  program = prepared.program
  trainable = [n for n, chosen in trees.flatten(program.mask).items() if chosen]
  return {
    "format": 1,
    "model": config_lib.to_dict(program.model_kwargs),
    "backbone": dict(backbone),
    "class_names": list(prepared.data.class_names),
    "preset": config.data.preset,
    "image_size": program.model.backbone.image_size,
    "method": config.method,
    "task": prepared.data.name,
    "data_sha256": data_sha256,
    "trainable": trainable,
    "config": config_lib.to_dict(config),
    "versions": versions(),
  }


def _result(
  config, prepared: Prepared, state, loop: Loop, meta, test: bool
) -> dict[str, Any]:
  """Evaluates the final model and returns what result.json holds."""
  program, data = prepared.program, prepared.data
  params = state.params

  def accuracy(split):
    if split not in data.splits:
      return None, 0
    found = program_lib.evaluate_split(config, program, params, data, split)
    return found["accuracy"], found["num_examples"]

  # After training on train_val, an accuracy on val would be one on training data.
  trained_on_val = config.data.train_split == "train_val"
  val_accuracy, _ = (None, 0) if trained_on_val else accuracy("val")
  test_accuracy, num_test = accuracy("test") if test else (None, 0)
  trainable, _ = trees.split(params, program.mask)
  prompter = {n: v for n, v in trainable.items() if n.startswith("prompter/")}
  return {
    "task": data.name,
    "method": config.method,
    "method_kwargs": config_lib.to_dict(config_lib.method_kwargs(config)),
    "preset": config.data.preset,
    "seed": config.seed,
    "train_split": config.data.train_split,
    "lr": config.optim.lr,
    "wd": config.optim.wd,
    "steps": int(state.step),
    "val_accuracy": val_accuracy,
    "test_accuracy": test_accuracy,
    "num_test_examples": num_test,
    "trainable_params": sum(int(v.size) for v in trainable.values()),
    "prompter_params": sum(int(v.size) for v in prompter.values()),
    "total_params": trees.count(params),
    "backbone": meta["backbone"],
    "data_sha256": meta["data_sha256"],
    "train_seconds": loop.clock.seconds,
    "images_per_second": loop.clock.images_per_second,
    "compile_seconds": loop.clock.compile_seconds,
    "input_wait_seconds": loop.clock.input_wait_seconds,
    "step_seconds": loop.clock.step_seconds,
    "peak_host_mb": memory.peak_host_mb(),
    "peak_device_mb": memory.peak_device_mb(),
    "devices": jax.device_count(),
    "versions": versions(),
  }
