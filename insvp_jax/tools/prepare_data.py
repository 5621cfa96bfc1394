"""Downloads and prepares published data sets, or says what each of them takes.

python -m insvp_jax.tools.prepare_data --list
python -m insvp_jax.tools.prepare_data --task=vtab --data_dir=datasets --check
python -m insvp_jax.tools.prepare_data --task=svhn --data_dir=datasets
python -m insvp_jax.tools.prepare_data --task=svhn --list-indices --split=val

The exit status is 0 if every task is ready, 1 if one is not, 2 after bad input.
"""

import argparse
import collections
from collections.abc import Iterator, Sequence
import dataclasses
from pathlib import Path
import sys
from typing import Any

from insvp_jax import tools

# What this package needs is imported late, so that a wrong flag costs no start-up time.


def choose(names: Sequence[str]) -> list[Any]:
  """Returns the rows of `TASKS` that names of tasks and groups stand for, each once.

  Args:
    names: keys of `TASKS` and `GROUPS`, or "all"; several between commas too.

  Raises:
    ValueError: an unknown name.
  """
  from insvp_jax import trees
  from insvp_jax.data.tasks import GROUPS, TASKS

  known = {name: (name,) for name in TASKS} | GROUPS | {"all": tuple(TASKS)}
  single = [part for name in names for part in name.split(",") if part]
  found = [name for part in single for name in trees.lookup(known, part, "task")]
  return [TASKS[name] for name in dict.fromkeys(found)]


def make_ready(task: Any, places: Any, tried: dict[str, str]) -> Any:
  """Returns the task's state after TFDS has prepared it, where that is possible.

  Args:
    task: a row of the table.
    places: where data lie and go.
    tried: {TFDS builder: what went wrong}, filled here: tasks share data sets.
  """
  from insvp_jax.data import availability, downloads

  state = availability.check_task(task, places)
  if state.status != "downloadable":
    return state
  spec = downloads.prepared_spec(task)
  if spec not in tried:
    print(f"{task.name}: preparing: {state.text}", flush=True)
    tried[spec] = availability.prepare_task(state, places)
  if tried[spec]:
    return dataclasses.replace(state, status="failed", text=tried[spec])
  return availability.check_task(task, places)


def describe_splits(data: Any) -> Iterator[str]:
  """Yields a line for each split: its images, and how they spread over classes."""
  import numpy as np

  from insvp_jax.data.availability import class_counts

  for name, split in data.splits.items():
    counts = class_counts(data, name)
    there = counts[counts > 0]
    yield (
      f"{name}: {len(split)} images of {len(there)} of {data.num_classes} classes, "
      f"smallest {there.min()}, median {np.median(there):g}, largest {there.max()}"
    )


def table(tasks: Sequence[Any]) -> Iterator[str]:
  """Yields the lines of a table of tasks."""
  from insvp_jax.data import downloads

  head = "task group classes train val test subsets read_from by_hand".split()
  rows = [[name.replace("_", " ") for name in head]]
  for task in tasks:
    subset = task.subset()
    group = task.group if task.group == task.benchmark else f"vtab {task.group}"
    places = [task.spec] if task.spec else []
    places += [f"{task.folder_format} folder"] if task.folder_format else []
    numbers = [task.num_classes, subset.train, subset.val, task.num_test]
    rows.append(
      [task.name, group, *map(str, numbers), ", ".join(task.subsets)]
      + [" or ".join(places), downloads.fetched_by_hand(task)]
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = [
      cell.rjust(width) if 2 <= i <= 5 else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    yield "  ".join(cells).rstrip()


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m insvp_jax.tools.prepare_data", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
    "--task", nargs="+", help="names of tasks or groups (vtab, fgvc, ...), or all"
  )
  parser.add_argument("--data_dir", default="", help="TFDS's folder")
  parser.add_argument("--root", default="", help="folder or .zip of image files")
  parser.add_argument("--lists", default="", help="folder of VPT's lists")
  parser.add_argument("--subset", default="", help="which training images")
  parser.add_argument("--manual_dir", default="", help="of files fetched by hand")
  what = parser.add_mutually_exclusive_group()
  what.add_argument("--check", action="store_true", help="report, download nothing")
  what.add_argument("--list", action="store_true", help="print the table of tasks")
  what.add_argument(
    "--list-indices",
    action="store_true",
    help="print which rows of the original files the splits are",
  )
  parser.add_argument(
    "--split", nargs="+", help="splits of --list-indices: train, val, test"
  )
  return parser


def _report(args: argparse.Namespace, tasks: Sequence[Any]) -> bool:
  """Prepares and reports all tasks; returns whether they are ready."""
  from insvp_jax import config_checks
  from insvp_jax.data import availability

  config_checks.check_folder("--data_dir", args.data_dir)
  for flag in ("root", "lists", "manual_dir"):
    path = getattr(args, flag)
    config_checks.check_folder(f"--{flag}", path)
    if path and not Path(path).expanduser().exists():
      raise FileNotFoundError(f"--{flag} is {path!r}, but there is nothing.")
  for task in tasks:
    task.subset(args.subset)
  places = availability.Locations(
    args.data_dir, args.root, args.lists, args.subset, args.manual_dir
  )
  statuses, tried = [], {}
  for task in tasks:
    if args.check:
      state = availability.check_task(task, places)
    else:
      state = make_ready(task, places, tried)
    print(state.summary(), flush=True)
    for line in describe_splits(state.data) if state.ready else ():
      print(f"  {line}")
    for note in state.notes:
      print(f"  {'warning' if state.ready else 'note'}: {note}")
    statuses.append(state.status)
  counts = collections.Counter(statuses)
  print("tasks:", ", ".join(f"{number} {name}" for name, number in counts.items()))
  return set(statuses) == {"ready"}


def _print_rows(args: argparse.Namespace, tasks: Sequence[Any]) -> None:
  from insvp_jax.data import original_rows

  splits = args.split or ["train", "val"]
  if wrong := [name for name in splits if name not in original_rows.SPLITS]:
    known = ", ".join(original_rows.SPLITS)
    raise ValueError(f"--split has {wrong[0]!r}, expected some of {known}.")
  for task in tasks:
    for split in splits:
      source, rows = original_rows.rows_of_split(task, split, args.subset)
      print(f"{task.name} {split}, {len(rows)} rows of {source}:", *rows, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the tool; returns its exit status."""
  parser = _parser()
  args = parser.parse_args(argv)
  if not args.task and not args.list:
    parser.error("--task is missing; --list shows all of them")
  if args.split and not args.list_indices:
    parser.error("--split belongs to --list-indices")
  all_ready = True

  def work() -> None:
    nonlocal all_ready
    tasks = choose(args.task or ["all"])
    if args.list:
      print("\n".join(table(tasks)))
    elif args.list_indices:
      _print_rows(args, tasks)
    else:
      all_ready = _report(args, tasks)

  try:
    return tools.run_tool(work) or int(not all_ready)
  except KeyboardInterrupt:
    print("insvp_jax: stopped; what is ready stays, run it again", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main())
