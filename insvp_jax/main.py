"""The command line: `python -m insvp_jax.main --config=configs/quickstart.py`.

Exit status: 0 done; 2 bad input, one line on stderr says what and how to mend it;
42 SIGTERM and 130 Ctrl-C, both after a checkpoint was written (the same command
resumes); anything else is a bug and comes with its traceback.
"""

import os
from pathlib import Path
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from insvp_jax import errors

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, e.g. configs/quickstart.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run goes; default runs/<name of the config file>."
)
_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Show the whole traceback of an input error too."
)
# What ml_collections raises for a wrong flag.
_FLAG_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError)


def main(argv: list[str]) -> None:
  """Trains, or tunes, as the config says."""
  if len(argv) > 1:
    _fail(f"unexpected argument {argv[1]!r}; every option starts with --.")
  if _CONFIG.value is None:
    _fail("no config; give one, e.g. --config=configs/quickstart.py.")
  config_file = flags.FLAGS["config"].config_filename.split(":")[0]
  workdir = Path(_WORKDIR.value or Path("runs") / Path(config_file).stem)
  _setup_jax()
  # After the flags: a wrong one costs no start-up time.
  from insvp_jax import partition, tune
  from insvp_jax.stopping import Stopped

  try:
    partition.initialize_distributed(_CONFIG.value.multihost)
    tune.run(_CONFIG.value, workdir)
    _draw_prompts(_CONFIG.value, workdir)
  except Stopped as stopped:
    print(f"insvp_jax: {stopped}", file=sys.stderr)
    sys.exit(stopped.exit_status)
  except errors.INPUT_ERRORS as error:
    if _TRACEBACK.value or not errors.is_ours(error):
      raise
    _fail(errors.one_line(error))


def _draw_prompts(config, workdir: Path) -> None:
  """Draws the prompts of InsVP's first final run, if the config asks for it."""
  import jax

  from insvp_jax import run, tune
  from insvp_jax.tools import visualize

  run_dir = tune.first_run(config, workdir, "insvp")
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
  try:
    return app.parse_flags_with_usage(argv)
  except _FLAG_ERRORS as error:
    _fail(errors.one_line(error))
    raise


def run() -> None:
  """Runs `main` under absl, as `python -m insvp_jax.main` does."""
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
  run()
