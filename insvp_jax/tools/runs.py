"""Which run a tool is about, and how it is loaded: --run, --backbone, --best, ..."""

import argparse
from collections.abc import Sequence
import dataclasses
import os
from pathlib import Path
import sys
from typing import Any

from insvp_jax import paths, tools
from insvp_jax.errors import printable

_BEST_HELP = (
  "of the runs in the folder --run take the one with the highest val accuracy"
)
_DTYPE_HELP = (
  "how frozen weights are stored, if not as in training: float32, bfloat16 or int8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that `load` reads."""
  parser.add_argument("--run", required=True, help=tools.RUN_HELP)
  parser.add_argument("--backbone", help=tools.BACKBONE_HELP)
  parser.add_argument("--best", action="store_true", help=_BEST_HELP)
  parser.add_argument("--frozen_dtype", help=_DTYPE_HELP)


def load(args: argparse.Namespace) -> Any:
  """Returns the `Run` that the arguments name.

  With --best a line on stderr says which one of how many it is.

  Raises:
    ValueError, FileNotFoundError: as `load_run` and `best_run`.
  """
  # Imported late, so that a wrong flag costs no start-up time.
  from insvp_jax.run import load_run

  paths.cache_compiled_programs()
  path = args.run
  if args.best:
    path, lines = best_run(path)
    for line in lines:
      print(f"insvp_jax: {printable(line)}", file=sys.stderr)
  try:
    return load_run(path, backbone=args.backbone, frozen_dtype=args.frozen_dtype)
  except FileNotFoundError as error:
    # What lies in a folder of runs is listed.
    if getattr(error, "__notes__", ()):
      error.add_note("  or pass --best: the one with the highest val accuracy")
    raise


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """A run with a val accuracy in [0, 1], and what has to be alike to compare it.

  Of segmentation it is the mIoU.
  """

  path: Path
  accuracy: float
  task: tuple[Any, ...]
  data: Any
  title: str


def best_run(path: str | os.PathLike) -> tuple[Path, list[str]]:
  """Returns the run below a folder with the highest val accuracy, and what to say.

  The test accuracy never chooses. Of several equal ones it is the first by name. A run
  has no val accuracy if it has not finished, or if it was trained on val, too.

  Args:
    path: a folder with runs at any depth; a run itself is the only one.

  Raises:
    FileNotFoundError: there is no run.
    ValueError: none has a val accuracy, or those that have are of several tasks.
  """
  from insvp_jax.checkpoints import files

  runs = files.runs_below(path)
  if not runs:
    # A checkpoint, an exported adapter, or nothing: `load_run` knows.
    return Path(path), []
  found = [candidate for run in runs if (candidate := _candidate(run))]
  without = len(runs) - len(found)
  left_out = (
    f"{without} of {len(runs)} runs in {path} have no val accuracy, as they have not "
    "finished, or were trained on val, too"
  )
  if not found:
    raise ValueError(
      f"--best chooses by val accuracy, but {left_out}. Give one of them."
    )
  _check_one_task(found)
  highest = max(candidate.accuracy for candidate in found)
  best = [candidate.path for candidate in found if candidate.accuracy == highest]
  lines = [
    f"the best of {len(found)} runs by val {found[0].title}, {100 * highest:.2f}%, is "
    f"{best[0]}"
  ]
  if best[1:]:
    lines.append(f"as good, and later by name: {', '.join(map(str, best[1:]))}")
  if without:
    lines.append(left_out)
  if len({candidate.data for candidate in found}) > 1:
    lines.append("note: they were not trained and validated on the same images")
  return best[0], lines


def _candidate(run: Path) -> _Candidate | None:
  """Returns what there is to compare a run by; None if it has no val accuracy."""
  from insvp_jax.checkpoints import files
  from insvp_jax.train import objectives

  try:
    meta = files.read_meta(files.find_steps(run)[0])
    result = files.load_json(run / "result.json")
  except files.Damaged:
    return None
  metric = objectives.metric_of(result)
  accuracy = result.get(f"val_{metric}")
  if isinstance(accuracy, bool) or not isinstance(accuracy, float | int):
    return None
  task = (meta.get("task"), *meta.get("class_names", ()))
  title = objectives.title_of(metric)
  return _Candidate(run, float(accuracy), task, meta.get("data_sha256"), title)


def _check_one_task(found: Sequence[_Candidate]) -> None:
  first = found[0]
  for other in found[1:]:
    if other.task != first.task:
      what = "tasks" if other.task[0] != first.task[0] else "classes"
      raise ValueError(
        f"--best compares runs of one task, but {first.path} and {other.path} have "
        f"different {what}: give a folder with runs of one alone."
      )
