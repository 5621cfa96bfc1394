"""One run, from a config to a result, readable top to bottom.

`train(config, workdir)` is what the command line, the tuner and notebooks call.
"""

from collections.abc import Mapping
import contextlib
from pathlib import Path
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.data.preprocess import get_preset
from insvp_jax.distributed import lock, processes
from insvp_jax.distributed.stopping import Stopped, StopSignal
from insvp_jax.logs import prompt_panels
from insvp_jax.logs.writers import Writers, remove_partial, write_json
from insvp_jax.train import parameters, report
from insvp_jax.train import program as program_lib
from insvp_jax.train.loop import Loop
from insvp_jax.train.preparation import Prepared, prepare
from insvp_jax.train.program import Program


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
  params = parameters.init_params(
    program.model, config.seed, prepared.weights, config.backbone.init
  )
  state = program_lib.create_state(config, program, params)
  backbone = parameters.identify(prepared.backbone, config.seed, params["backbone"])
  data_sha256 = report.data_digest(config, prepared.data, test)
  meta = report.describe_run(config, prepared, backbone, data_sha256)
  check_processes(meta)
  _check_profile(config, program.total_steps)
  with (
    own(workdir),
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
      writers.log(report.announce(config, prepared, int(state.step)))
      writers.text("config", report.config_table(config))
      loop = Loop(config, prepared, checkpointer, writers, stop, workdir)
      state = loop.run(state)
      writers.log(loop.clock.describe())
      result = report.result(config, prepared, state, loop.clock, meta, test)
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
    num_classes=program.model.head.num_classes,
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
  processes.check_same("its data, backbone or versions", shared)


def _check_profile(config: ConfigDict, total_steps: int) -> None:
  steps = config_lib.profile_steps(config)
  if steps and steps[1] > total_steps:
    raise ValueError(
      f"config.profile is {config.profile!r}, but the run has only {total_steps} steps."
    )


def _show_prompts(prepared: Prepared, state, writers: Writers, preset) -> None:
  """Draws prompts of images that the run has been tested on, if it has any."""
  split = prepared.data.splits.get("test") or prepared.data.splits.get("val")
  if split is not None:
    model = prepared.program.model
    panels = prompt_panels.prompt_panels(model, state.params, split, preset)
    writers.images(int(state.step), panels)
