"""The command line: `python -m insvp_jax.main --config=configs/quickstart.py`.

With the installed package that is `insvp train --config=quickstart`; see `cli`.

Exit status: 0 done; 2 bad input, one line on stderr says what and how to mend it;
42 SIGTERM and 130 Ctrl-C, both after a checkpoint was written (the same command
resumes); of several processes 42 also where another one was lost; anything else is a
bug and comes with its traceback.
"""

from insvp_jax.distributed import stopping

if __name__ == "__main__":
  # First of all: the imports below take their time.
  stopping.handle(stopping.end)

import gc
import importlib.util
from pathlib import Path
import re
import sys
import textwrap
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from insvp_jax import config_files, errors, paths
from insvp_jax.config_files import ConfigMistakeError

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A file, or the name of one that comes with the package; NAME:task=..., method=..., "
  "root=..., seed=..., backbone=... sets what most runs differ in.",
  lock_config=True,
)


flags.FLAGS["config"].parser = config_files.ConfigParser()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run goes; default runs/NAME of the config."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "auto",
  ("auto", "train", "tune"),
  "train: one run with config.optim. tune: choose on val, then retrain; the grid is "
  "config.tune's or, where tune.lr is empty, the method's own. auto: tune if there are "
  "lists in config.tune, else train.",
)
_PROFILE = flags.DEFINE_string(
  "profile", "", "Steps to record, e.g. 10:15, for TensorBoard or Perfetto."
)
_PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Train nothing: print every key, its value and what it is."
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
  "join_timeout", 300, "Seconds in which all of several processes have to come."
)
_LOST_TIMEOUT = flags.DEFINE_integer(
  "lost_timeout", 60, "Seconds without a sign of life: that process is lost."
)
_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Show the whole traceback of an input error too."
)


# Devices that are simulated for a plan.
_MOST_PLANNED = 2**12
# Seconds: a year, which every clock takes.
_LONGEST = 365 * 24 * 3600


class _PlanParser(flags.ArgumentParser):
  """Reads `--plan` as 0, `--plan=8` as 8, `--noplan` as None."""

  def parse(self, argument: str) -> int | None:
    if argument in ("true", "false"):
      return 0 if argument == "true" else None
    if not re.fullmatch("[0-9]{1,9}", argument) or not (
      1 <= int(argument) <= _MOST_PLANNED
    ):
      raise ValueError(
        f"expected a number of devices, 1 to {_MOST_PLANNED}, or --plan for those here."
      )
    return int(argument)


_PLAN = flags.DEFINE_flag(
  # Boolean: the value may be left out.
  flags.Flag(
    parser=_PlanParser(),
    serializer=None,
    name="plan",
    default=None,
    help_string="Train nothing: print the bytes and FLOPs that the run would need, on "
    "this machine's devices or, as in --plan=8, on so many. Needs no data, no weights.",
    boolean=True,
  )
)
# What absl and ml_collections raise for a wrong flag.
_FLAG_ERRORS = (
  flags.Error,
  ValueError,
  KeyError,
  TypeError,
  AttributeError,
  OSError,
)


def main(argv: list[str]) -> None:
  """Trains, or tunes, or plans, as the flags and the config say."""
  if len(argv) > 1:
    _exit_for_bad_input(
      f"unexpected argument {argv[1]!r}; every option starts with --."
    )
  if _CONFIG.value is None:
    _exit_for_bad_input("no config; give one, e.g. --config=quickstart.")
  for flag in (_JOIN_TIMEOUT, _LOST_TIMEOUT):
    if not 1 <= flag.value <= _LONGEST:
      _exit_for_bad_input(
        f"--{flag.name} is {flag.value}, expected at least 1 second and at most "
        f"{_LONGEST:,}."
      )
  # After the flags: a wrong one costs no start-up time.
  from insvp_jax import config as config_lib
  from insvp_jax import config_checks, config_variants

  config_file = flags.FLAGS["config"].config_filename.split(":")[0]
  workdir = Path(_WORKDIR.value or Path("runs") / Path(config_file).stem)
  config = _CONFIG.value
  config.profile = _PROFILE.value or config.profile
  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  try:
    config_lib.apply_overrides(config, overrides, _MODE.value == "tune")
    if _MODE.value != "train":
      config_variants.check_overrides(config, overrides)
  except ValueError as error:
    _exit_for_bad_input(str(error))
  if _PRINT_CONFIG.value:
    print(config_lib.format_keys(config))
    return
  _use_float32()
  paths.cache_compiled_programs()
  from insvp_jax.distributed import processes
  from insvp_jax.search import suite  # noqa: F401

  if not gc.isenabled():
    # What has been imported stays: no collection need look through it again.
    gc.freeze()
    gc.enable()
  # Libraries that are only half imported would make other errors of what this raises.
  stopping.handle(stopping.interrupt)
  try:
    config_checks.check_folder("--workdir", _WORKDIR.value or "")
    config_checks.check_workdir(workdir)
    if _PLAN.value is not None:
      _plan(config, _PLAN.value)
      return
    with processes.joined(
      config.multihost,
      join_timeout=_JOIN_TIMEOUT.value,
      lost_timeout=_LOST_TIMEOUT.value,
    ) as watch:
      if watch is None:
        _train_or_tune(config, workdir)
      else:
        _train_or_tune_together(config, workdir, watch)
  except errors.INPUT_ERRORS as error:
    if _needs_traceback(error):
      raise
    _exit_for_bad_input(errors.one_line(error))
  except (MemoryError, RuntimeError) as error:
    if _TRACEBACK.value or not errors.is_out_of_memory(error):
      raise
    _exit_for_bad_input(
      f"there is too little memory: {errors.one_line(error)[:200]}. --plan says what a "
      "run needs; smaller are config.microbatch_size, config.batch_size, "
      "config.eval_batch_size, config.image_size and the method's own sizes."
    )


def _plan(config: ConfigDict, num_devices: int) -> None:
  """Prints what each row needs, and writes plan.json if a workdir was given."""
  from insvp_jax import config_checks, config_variants
  from insvp_jax.logs import writers
  from insvp_jax.tools import plan

  config_checks.validate(config)
  devices = plan.find_devices(num_devices)
  plans = {}
  for variant in config_variants.variants_of(config):
    label = variant.label
    plans[label] = plan.plan(
      variant.config(config), devices, are_simulated=num_devices > 0
    )
    title = f"{label}: " if label != variant.method else ""
    print(f"{title}{plan.format_plan(plans[label])}", flush=True)
  if _WORKDIR.value:
    writers.write_json(Path(_WORKDIR.value) / "plan.json", plans)


def _train_or_tune(config: ConfigDict, workdir: Path) -> None:
  """Does what the config says, and ends with what came of it and where it lies."""
  from insvp_jax.distributed import processes
  from insvp_jax.search import suite
  from insvp_jax.train.objectives import Segmentation, objective_of

  results = suite.run(config, workdir, _MODE.value)
  pictures = [
    _draw_prompts(task_config, task_workdir)
    for task_config, task_workdir in suite.members(config, workdir)
  ]
  best = suite.best_run(config, workdir, _MODE.value, results)
  masks = "--output=MASKS " if objective_of(config.task) is Segmentation else ""
  tool = "insvp " if Path(sys.argv[0]).name == "insvp" else "python -m insvp_jax.tools."
  lines = {
    "table": workdir / "table.md",
    "runs": f"{workdir}, the best in {best}" if best != workdir else workdir,
    "picture": next(filter(None, pictures), ""),
    "logs": f"metrics.jsonl of each run, or tensorboard --logdir={workdir}"
    if config.tensorboard
    else "metrics.jsonl of each run",
    "next": f"{tool}predict --run={best} {masks}IMAGES",
  }
  if best == workdir:
    del lines["table"]
  else:
    table = (workdir / "table.md").read_text(encoding="utf-8")
    processes.print_once(f"\n{table}")
  block = "\n".join(f"{name:<9}{text}" for name, text in lines.items() if text)
  processes.print_once(block)


def _train_or_tune_together(config: ConfigDict, workdir: Path, watch) -> None:
  """Does the same as one of several processes, and tells the others where it fails.

  Args:
    config: of all processes, but for where their data are.
    workdir: shared by all of them.
    watch: from `processes.joined`.
  """
  from insvp_jax import config as config_lib
  from insvp_jax.distributed import processes

  try:
    settings = {
      "config": config_lib.shared_settings(config),
      "workdir": str(workdir),
      "mode": _MODE.value,
    }
    processes.check_same(
      "its settings", settings, "Start the same command on all hosts."
    )
    _train_or_tune(config, workdir)
  except stopping.Stopped:
    # All processes stop at the same step.
    raise
  except BaseException as error:
    watch.await_verdict(error)
    error = stopping.raised() or error
    line = errors.one_line(error)
    if isinstance(error, stopping.Interrupted):
      status = error.exit_status
      print(f"insvp_jax: {line}", file=sys.stderr)
    elif isinstance(error, errors.INPUT_ERRORS) and not _needs_traceback(error):
      status = 2
      print(f"insvp_jax: {line}", file=sys.stderr)
    else:
      status = 1
      traceback.print_exc()
      line = f"{type(error).__name__}: {line[:500]}"
    watch.fail(status, line)


def _draw_prompts(config: ConfigDict, workdir: Path) -> str:
  """Draws the prompts of InsVP's first final run that has any on images, if asked to.

  Returns:
    Where the picture is, or why there is none; "" where none was asked for.
  """
  from insvp_jax.distributed import processes
  from insvp_jax.search import tune

  if not (config.prompt_images and processes.is_main_process()):
    return ""
  run_dirs = tune.first_runs(config, workdir, _MODE.value).values()
  prompted = list(filter(None, map(_image_prompts, run_dirs)))
  if not prompted:
    return ""
  run_dir = next((run_dir for run_dir, is_on in prompted if is_on), None)
  if run_dir is None:
    return "none: no run of InsVP has image prompts to draw"
  if not importlib.util.find_spec("matplotlib"):
    return "not drawn without matplotlib: pip install 'insvp_jax[plots]'"
  from insvp_jax import run
  from insvp_jax.tools import visualize

  loaded, picture = run.load_run(run_dir), run_dir / "prompts.png"
  visualize.draw(loaded, picture, rows=config.prompt_images)
  return f"{picture}, the prompts of {config.prompt_images} test images"


def _image_prompts(run_dir: Path) -> tuple[Path, bool] | None:
  """Returns a run of InsVP and whether it has image prompts; None for other methods."""
  from insvp_jax.checkpoints.files import load_json

  config = load_json(run_dir / "config.json")
  if config["method"] != "insvp":
    return None
  # None is the default: there is one.
  is_off = [config["insvp"][name] is False for name in ("use_patch", "use_global")]
  return run_dir, not all(is_off)


def _needs_traceback(error: BaseException) -> bool:
  """Returns whether one line would not do: for a bug, or where the flag asks for it."""
  return _TRACEBACK.value or not errors.is_ours(error)


def _exit_for_bad_input(message: str) -> NoReturn:
  print(f"insvp_jax: {message}", file=sys.stderr)
  sys.exit(2)


def _use_float32() -> None:
  """Turns off what JAX_ENABLE_X64 turns on: other random numbers, other results."""
  import jax

  if jax.config.jax_enable_x64:
    jax.config.update("jax_enable_x64", False)
    print(
      "note: JAX_ENABLE_X64 is ignored: all is computed in float32", file=sys.stderr
    )


def _usage() -> str:
  """Returns all flags with their help, on one screen."""
  lines = [
    "usage: insvp train --config=NAME[:task=...,method=...,root=...] [flags]",
    "   or: python -m insvp_jax.main --config=configs/NAME.py [flags]",
    "",
    *textwrap.wrap(f"Configs: {', '.join(config_files.installed())}", 88),
    "",
  ]
  for flag in (
    *(_CONFIG, _WORKDIR, _MODE, _PRINT_CONFIG, _PLAN, _PROFILE),
    *(_JOIN_TIMEOUT, _LOST_TIMEOUT, _TRACEBACK),
  ):
    first, *rest = textwrap.wrap(flags.FLAGS[flag.name].help, 70)
    lines += [f"  --{flag.name:<14}{first}", *(f"{' ' * 18}{line}" for line in rest)]
  lines += [
    "  --config.KEY    Any key of the config, e.g. --config.optim.lr=0.01;",
    "                  --config=NAME --print_config lists them all.",
  ]
  return "\n".join(lines)


def _parse_flags(argv: list[str]) -> list[str]:
  """Returns what is left after the flags; a wrong one ends in one line."""
  if {"-h", "--help", "-help", "--helpshort"} & set(argv):
    print(_usage())
    sys.exit(0)
  if {"--mode=eval", "--mode=evaluate"} & set(argv):
    _exit_for_bad_input(
      "a finished run is evaluated by a tool: insvp evaluate --run=<its workdir> "
      "--splits test (or python -m insvp_jax.tools.evaluate ...)."
    )
  words, argv = iter(argv), []
  for word in words:
    if word in ("--config", "-config"):
      word = f"--config={next(words, '')}"
    if word.startswith(("--config=", "-config=")):
      try:
        word = f"--config={config_files.find(word.partition('=')[2])}"
      except ConfigMistakeError as error:
        _exit_for_bad_input(str(error))
    argv.append(word)
  try:
    return flags.FLAGS(argv)
  except ConfigMistakeError as error:
    if "--traceback" in argv:
      raise
    _exit_for_bad_input(str(error))
  except _FLAG_ERRORS as error:
    if "--traceback" in argv:
      raise
    _exit_for_bad_input(_explain_flag_error(error, argv))


def _explain_flag_error(error: Exception, argv: list[str]) -> str:
  """Returns what is wrong with the flags; ml_collections leaves out which one."""
  from insvp_jax import config, trees

  defaults = config.defaults().to_dict()
  known = [name.replace("/", ".") for name in trees.flatten(defaults)]
  for arg in argv:
    match = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    if match and not any(f"{name}.".startswith(f"{match[1]}.") for name in known):
      hint = trees.did_you_mean(match[1], known)
      return f"unknown config key {match[1]!r} in {arg}.{hint}"
  return config_files.without_fields(errors.one_line(error))


def run(argv: list[str] | None = None) -> None:
  """Runs `main` under absl, as `python -m insvp_jax.main` does.

  Args:
    argv: the program's name and its arguments; None is those of this process.
  """
  errors.print_anything()
  logging.set_verbosity(logging.WARNING)
  stopping.handle(stopping.end)
  sys.unraisablehook = stopping.report_unraisable
  if "jax" not in sys.modules:
    # While libraries come in there is no garbage; looking for it takes a fifth of the
    # time. `main` turns it on again.
    gc.disable()
  try:
    app.run(main, argv, flags_parser=_parse_flags)
  except BaseException as error:
    is_stop = isinstance(error, stopping.Stopped | stopping.Interrupted)
    is_done = isinstance(error, SystemExit) and not error.code
    # An error after a signal may be what some library made of it.
    stopped = error if is_stop or is_done else stopping.raised()
    if is_done or stopped is None:
      raise
    print(f"insvp_jax: {stopped}", file=sys.stderr)
    sys.exit(stopped.exit_status)
  finally:
    gc.enable()


if __name__ == "__main__":
  run()
