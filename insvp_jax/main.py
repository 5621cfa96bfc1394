"""The command line: `python -m insvp_jax.main --config=configs/quickstart.py`.

Exit status: 0 done; 2 bad input, one line on stderr says what and how to mend it;
42 SIGTERM and 130 Ctrl-C, both after a checkpoint was written (the same command
resumes); anything else is a bug and comes with its traceback.
"""

import os
from pathlib import Path
import re
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from insvp_jax import errors, stopping

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
_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Show the whole traceback of an input error too."
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
  """Trains, or tunes, as the config says."""
  if len(argv) > 1:
    _fail(f"unexpected argument {argv[1]!r}; every option starts with --.")
  if _CONFIG.value is None:
    _fail("no config; give one, e.g. --config=configs/quickstart.py.")
  config_file = flags.FLAGS["config"].config_filename.split(":")[0]
  workdir = Path(_WORKDIR.value or Path("runs") / Path(config_file).stem)
  if "://" in (_WORKDIR.value or ""):
    _fail(
      f"--workdir is {_WORKDIR.value}, a URL; expected a folder. Mount the bucket "
      "(gcsfuse does) and name the folder."
    )
  _setup_jax()
  # After the flags: a wrong one costs no start-up time.
  from insvp_jax import partition, suite

  try:
    partition.initialize_distributed(_CONFIG.value.multihost)
    suite.run(_CONFIG.value, workdir, _MODE.value)
    for config, where in suite.members(_CONFIG.value, workdir):
      _draw_prompts(config, where)
  except errors.INPUT_ERRORS as error:
    if _TRACEBACK.value or not errors.is_ours(error):
      raise
    _fail(errors.one_line(error))


def _draw_prompts(config, workdir: Path) -> None:
  """Draws the prompts of InsVP's first final run, if the config asks for it."""
  import jax

  from insvp_jax import run, tune
  from insvp_jax.tools import visualize

  run_dir = tune.first_run(config, workdir, "insvp", _MODE.value)
  if config.prompt_images and run_dir and jax.process_index() == 0:
    picture = run_dir / "prompts.png"
    visualize.draw(run.load_run(run_dir), picture, rows=config.prompt_images)
    print(f"The prompts of {config.prompt_images} test images: {picture}")


def _fail(message: str) -> None:
  print(f"insvp_jax: {message}", file=sys.stderr)
  sys.exit(2)


def _setup_jax() -> None:
  """Keeps compiled programs on disk, so that the second start is quick."""
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if cache is None:
    import jax

    base = os.environ.get("INSVP_CACHE", str(Path.home() / ".cache" / "insvp_jax"))
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jax"))


def _parse_flags(argv: list[str]) -> list[str]:
  """Returns what is left after the flags; a wrong one ends in one line."""
  for arg in argv:
    file = re.match(r"--?config=([^:]+)", arg)
    if file and not Path(file[1]).is_file():
      _fail(f"there is no config file {file[1]}; --config wants a path to one.")
  try:
    return flags.FLAGS(argv)
  except _FLAG_ERRORS as error:
    if "--traceback" in argv:
      raise
    _fail(_explain(error, argv))
    raise


def _explain(error: Exception, argv: list[str]) -> str:
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
  inner = error
  while "whilst parsing config file" in str(inner) and inner.__context__:
    inner = inner.__context__
  where = "" if inner is error else f"{' '.join(a for a in argv if 'config=' in a)}: "
  # A locked ConfigDict lists all of its fields.
  text = re.sub(r' Other fields present: "\{.*\}"', "", errors.one_line(inner))
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
