"""Command-line tools for finished runs; notebooks call the same functions."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
import sys

from insvp_jax import errors

RUN_HELP = "the run's workdir, such as runs/folder/insvp/seed0"


def argument_parser(doc: str, module: str, prog: str | None) -> argparse.ArgumentParser:
  """Returns the parser of a tool's arguments, without any yet.

  Args:
    doc: the docstring of the tool's module; its first line is the description.
    module: name of the module.
    prog: the command that was typed, for usage and errors, e.g. "insvp predict"; None
      for `python -m` and the module.
  """
  return argparse.ArgumentParser(
    prog=prog or f"python -m insvp_jax.tools.{module}", description=doc.splitlines()[0]
  )


def run_tool(main: Callable[[], None]) -> int:
  """Runs a tool and returns its exit status.

  Bad input, which this package reports as a ValueError, KeyError or OSError, gives
  one line on stderr, and what the error's notes list, and status 2. Other errors are
  bugs and keep their traceback.
  """
  try:
    main()
  except errors.INPUT_ERRORS as error:
    if not errors.is_ours(error):
      raise
    notes = getattr(error, "__notes__", ())
    lines = [f"insvp_jax: {errors.one_line(error)}", *notes]
    print("\n".join(lines), file=sys.stderr)
    return 2
  return 0


def find_images(paths: Sequence[str]) -> list[Path]:
  """Returns the image files among the paths and in the folders among them.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: a folder holds no image file.
  """
  from insvp_jax.data.decode import IMAGE_SUFFIXES

  images = []
  for path in map(Path, paths):
    if not path.exists():
      raise FileNotFoundError(f"there is no image file or folder {path}.")
    if not path.is_dir():
      images.append(path)
      continue
    in_folder = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not in_folder:
      raise ValueError(
        f"the folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)})."
      )
    images.extend(in_folder)
  return images
