"""The command line: `python -m insvp_jax.main --config=configs/quickstart.py`.

Exit status: 0 done; 2 bad input, one line on stderr says what and how to mend it;
42 SIGTERM and 130 Ctrl-C, both after a checkpoint was written (the same command
resumes); of several processes 42 also where another one was lost; anything else is a
bug and comes with its traceback.
"""

import os
from pathlib import Path
import re
import signal
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from insvp_jax import errors, paths
from insvp_jax.distributed import stopping

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, e.g. configs/quickstart.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run goes; default runs/<name of the config file>."
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


class _PlanParser(flags.ArgumentParser):
  """Reads `--plan` as 0, `--plan=8` as 8, `--noplan` as None."""

  def parse(self, argument: str) -> int | None:
    if argument in ("true", "false"):
      return 0 if argument == "true" else None
    if not argument.isdigit() or int(argument) == 0:
      raise ValueError("expected a number of devices, or --plan for those here.")
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
    _exit_for_bad_input("no config; give one, e.g. --config=configs/quickstart.py.")
  for flag in (_JOIN_TIMEOUT, _LOST_TIMEOUT):
    if flag.value < 1:
      _exit_for_bad_input(f"--{flag.name} is {flag.value}, expected at least 1 second.")
  config_file = flags.FLAGS["config"].config_filename.split(":")[0]
  workdir = Path(_WORKDIR.value or Path("runs") / Path(config_file).stem)
  config = _CONFIG.value
  config.profile = _PROFILE.value or config.profile
  if _PRINT_CONFIG.value:
    from insvp_jax import config as config_lib

    print(config_lib.format_keys(config))
    return
  _cache_compiled_programs()
  # After the flags: a wrong one costs no start-up time.
  from insvp_jax import config_checks
  from insvp_jax.distributed import processes

  try:
    config_checks.check_folder("--workdir", _WORKDIR.value or "")
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


def _plan(config: ConfigDict, num_devices: int) -> None:
  """Prints what each method needs, and writes plan.json if a workdir was given."""
  from insvp_jax.logs import writers
  from insvp_jax.tools import plan

  devices = plan.find_devices(num_devices)
  plans = {}
  for method in config.tune.methods or (config.method,):
    config.method = method
    plans[method] = plan.plan(config, devices)
    print(plan.format_plan(plans[method]), flush=True)
  if _WORKDIR.value:
    writers.write_json(Path(_WORKDIR.value) / "plan.json", plans)


def _train_or_tune(config: ConfigDict, workdir: Path) -> None:
  """Does what the config says: one run, a search, or a suite of them."""
  from insvp_jax.search import suite

  suite.run(config, workdir, _MODE.value)
  for task_config, task_workdir in suite.members(config, workdir):
    _draw_prompts(task_config, task_workdir)


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


def _draw_prompts(config: ConfigDict, workdir: Path) -> None:
  """Draws the prompts of InsVP's first final run, if the config asks for it."""
  from insvp_jax import run
  from insvp_jax.distributed import processes
  from insvp_jax.search import tune
  from insvp_jax.tools import visualize

  run_dir = tune.first_run(config, workdir, "insvp", _MODE.value)
  if config.prompt_images and run_dir and processes.is_main_process():
    picture = run_dir / "prompts.png"
    visualize.draw(run.load_run(run_dir), picture, rows=config.prompt_images)
    print(f"The prompts of {config.prompt_images} test images: {picture}")


def _needs_traceback(error: BaseException) -> bool:
  """Returns whether one line would not do: for a bug, or where the flag asks for it."""
  return _TRACEBACK.value or not errors.is_ours(error)


def _exit_for_bad_input(message: str) -> NoReturn:
  print(f"insvp_jax: {message}", file=sys.stderr)
  sys.exit(2)


def _cache_compiled_programs() -> None:
  """Keeps compiled programs on disk, so that the second start is quick."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  import jax

  jax.config.update("jax_compilation_cache_dir", str(paths.cache_dir("jax")))


def _parse_flags(argv: list[str]) -> list[str]:
  """Returns what is left after the flags; a wrong one ends in one line."""
  for arg in argv:
    file = re.match(r"--?config=([^:]+)", arg)
    if file and not Path(file[1]).is_file():
      _exit_for_bad_input(
        f"there is no config file {file[1]}; --config wants a path to one."
      )
  try:
    return flags.FLAGS(argv)
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
  # An error inside of get_config comes wrapped, with its traceback as the message.
  cause = error
  while "whilst parsing config file" in str(cause) and cause.__context__:
    cause = cause.__context__
  where = "" if cause is error else f"{' '.join(a for a in argv if 'config=' in a)}: "
  # A locked ConfigDict lists all of its fields.
  text = re.sub(r' Other fields present: "\{.*\}"', "", errors.one_line(cause))
  return f"{where}{text}"


def run() -> None:
  """Runs `main` under absl, as `python -m insvp_jax.main` does."""
  logging.set_verbosity(logging.WARNING)
  for signum in stopping.EXIT_STATUS:
    signal.signal(signum, stopping.interrupt)
  try:
    app.run(main, flags_parser=_parse_flags)
  except (stopping.Stopped, stopping.Interrupted) as stopped:
    print(f"insvp_jax: {stopped}", file=sys.stderr)
    sys.exit(stopped.exit_status)


if __name__ == "__main__":
  run()
