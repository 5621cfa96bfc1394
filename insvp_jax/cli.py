"""The command `insvp`: what is to be done, then the flags of that.

`insvp train`, `tune` and `plan` are `python -m insvp_jax.main`; the others are the
tools in `insvp_jax.tools`, each with a `--help` of its own.
"""

from collections.abc import Sequence
import importlib
import re
import sys

import insvp_jax
from insvp_jax import errors
from insvp_jax.distributed import stopping

# What each command does, and for a tool its module.
COMMANDS = {
  "train": ("train what a config says: a run, or a search and its final runs", ""),
  "tune": ("search for lr and wd on val, then train the final runs", ""),
  "plan": ("print what a run needs, here or on --devices=8", ""),
  "predict": ("print a run's predictions for images", "predict"),
  "evaluate": ("print a run's accuracy on the splits of its task", "evaluate"),
  "visualize": ("draw the prompts of a run", "visualize"),
  "demo": ("serve a page to try runs on one's own images", "demo"),
  "figure": ("draw where runs look, t-SNE, curves, a search", "figure"),
  "report": ("make the papers' tables, or one of all tasks, from runs", "report"),
  "prepare": ("list the published data sets, check or prepare them", "prepare_data"),
  "meta_init": ("learn a border over several tasks for dam_vp and vp", "meta_init"),
  "export": ("write a run for others: a program, an adapter, its backbone", "export"),
}
# The flags of `insvp_jax.main` that a command stands for.
_FLAGS = {"train": [], "tune": ["--mode=tune"], "plan": ["--plan"]}


def usage() -> str:
  """Returns the help of the command itself."""
  lines = [
    "usage: insvp COMMAND [flags], and insvp COMMAND --help for its flags",
    "",
    *(f"  {name:<10} {text}" for name, (text, _) in COMMANDS.items()),
    "",
    "  insvp train --config=quickstart",
    "  insvp train --config=folder:root=photos.zip,method=insvp",
    "  insvp predict --run=runs/folder/insvp/seed0 new_photos/",
    "  insvp --version",
  ]
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the words after `insvp`; None is those of this process.
  """
  errors.print_anything()
  name, *flags = list(sys.argv[1:] if argv is None else argv) or ["--help"]
  if name in ("-h", "--help", "-help", "help"):
    print(usage())
    return 0
  if name in ("--version", "-V", "version"):
    print(f"insvp_jax {insvp_jax.__version__}")
    return 0
  if name not in COMMANDS:
    from insvp_jax import trees

    print(
      f"insvp_jax: unknown command {name!r}.{trees.did_you_mean(name, COMMANDS)} "
      f"Known: {', '.join(COMMANDS)}.",
      file=sys.stderr,
    )
    return 2
  if tool := COMMANDS[name][1]:
    # Imported late: each needs other libraries.
    module = importlib.import_module(f"insvp_jax.tools.{tool}")
    return module.main(flags, prog=f"insvp {name}")
  if name == "plan":
    flags = [re.sub("^--?devices=", "--plan=", flag) for flag in flags]
  # Before what takes time to import.
  stopping.handle(stopping.end)
  from insvp_jax import main as trainer_main

  trainer_main.run([f"insvp {name}", *_FLAGS[name], *flags])
  return 0
