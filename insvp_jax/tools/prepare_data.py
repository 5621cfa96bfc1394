"""Downloads and prepares published data sets, or reports what each of them needs.

insvp prepare --list                                      # the table of tasks
insvp prepare --list --task=svhn                          # all about one of them
insvp prepare --task=vtab --data_dir=datasets --check     # what is there, what it takes
insvp prepare --task=svhn --data_dir=datasets
insvp prepare --task=svhn --list-indices --split=val

The exit status is 0 if every task is ready, 1 if one is not, 2 after bad input. Without
the command `insvp` it is python -m insvp_jax.tools.prepare_data.
"""

import argparse
import collections
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from pathlib import Path
import string
import sys
import textwrap
from typing import Any

from insvp_jax import tools

# The package's modules are imported late, so that a wrong flag costs no start-up time.

# Columns of what --list prints.
_WIDTH = 100


def select_tasks(names: Sequence[str]) -> list[Any]:
  """Returns the rows of `TASKS` for names of tasks and groups, each once.

  Args:
    names: keys of `TASKS` and `GROUPS`, or "all"; or several joined by commas.

  Raises:
    ValueError: an unknown name.
  """
  from insvp_jax import trees
  from insvp_jax.data import LIST_COMMAND
  from insvp_jax.data.tasks import GROUPS, TASKS

  known = {name: (name,) for name in TASKS} | GROUPS | {"all": tuple(TASKS)}
  parts = [part for name in names for part in name.split(",") if part]
  if not parts:
    raise ValueError(f"no task is named, expected some of those of {LIST_COMMAND}.")
  found = [trees.lookup(known, part, "task", LIST_COMMAND) for part in parts]
  tasks = [name for names in found for name in names]
  return [TASKS[name] for name in dict.fromkeys(tasks)]


def make_ready(task: Any, places: Any, errors: dict[str, str]) -> Any:
  """Prepares a task by TFDS, where that is possible, and returns its state.

  Args:
    task: a row of the table.
    places: the folders of the data.
    errors: {TFDS builder: what went wrong, or ""} of those that were tried; added to
      here, since tasks share data sets.
  """
  from insvp_jax.data import availability, downloads

  state = availability.check_task(task, places)
  if state.status != "downloadable":
    return state
  spec = downloads.prepared_spec(task)
  if spec not in errors:
    print(f"{task.name}: preparing: {state.text}", flush=True)
    errors[spec] = availability.prepare_task(state, places)
  if errors[spec]:
    return dataclasses.replace(state, status="failed", text=errors[spec])
  return availability.check_task(task, places)


def split_lines(data: Any) -> Iterator[str]:
  """Yields a line for each split: its images, and how many there are of a class."""
  import numpy as np

  from insvp_jax.data.availability import class_counts

  for name, split in data.splits.items():
    counts = class_counts(data, name)
    counts = counts[counts > 0]
    yield (
      f"{name}: {len(split)} images of {len(counts)} of {data.num_classes} classes, "
      f"smallest {counts.min()}, median {np.median(counts):g}, largest {counts.max()}"
    )


def table(tasks: Sequence[Any]) -> str:
  """Returns a table of tasks; a legend below it has what its columns cannot hold."""
  import tabulate

  from insvp_jax.data import LIST_COMMAND, OTHER_TASKS, downloads

  by_hand, subsets, rows = {}, {}, []
  for task in tasks:
    subset = task.subset()
    sources = ["TFDS"] * bool(task.spec) + ["folder"] * bool(task.folder_format)
    what = downloads.fetched_by_hand(task)
    letter = string.ascii_lowercase[len(by_hand)]
    mark = by_hand.setdefault(what, letter) if what else ""
    subsets.setdefault(tuple(task.subsets), []).append(task)
    counts = [task.num_classes, subset.train, subset.val, task.num_test]
    rows.append([task.name, task.group, *counts, ", ".join(sources), mark])
  titles = "task", "group", "classes", "train", "val", "test", "read from", "by hand"
  lines = [tabulate.tabulate(rows, titles), ""]
  if by_hand:
    lines.append("by hand: what only you can download; --list --task=... says where")
    lines += [f"  {mark}: {what}" for what, mark in by_hand.items()]
  lines.append("subsets: which training images; the first is the default, as above")
  for names, members in subsets.items():
    lines.append(_wrapped(f"  {', '.join(names)}:", _group_names(members)))
  lines += [
    "group: natural, specialized and structured are VTAB-1k",
    _wrapped("other tasks:", OTHER_TASKS),
    f"all about one task: {LIST_COMMAND} --task={tasks[0].name}",
  ]
  return "\n".join(lines)


def _group_names(tasks: Sequence[Any]) -> list[str]:
  """Returns names for tasks: of groups that are whole, and of the other tasks."""
  from insvp_jax.data.tasks import GROUPS

  names = {task.name for task in tasks}
  return list(
    dict.fromkeys(
      task.group if names.issuperset(GROUPS[task.group]) else task.name
      for task in tasks
    )
  )


def _wrapped(title: str, items: Iterable[str]) -> str:
  """Returns a title and items on lines of at most `_WIDTH` columns."""
  return textwrap.fill(
    f"{title} {', '.join(items)}", _WIDTH, subsequent_indent="      "
  )


def details(task: Any) -> str:
  """Returns all that the table of tasks knows of a task, on several lines."""
  from insvp_jax.data import downloads

  needs = downloads.requirements(task)
  group = task.group if task.group == task.benchmark else f"vtab {task.group}"
  lines = [f"group: {group}", f"classes: {task.num_classes}"]
  for name, subset in task.subsets.items():
    final = task.final_split(name).replace("_", " + ")
    lines.append(
      f"subset {name}: {subset.train} train, {subset.val} val, {task.num_test} test "
      f"images; the final model trains on {final}"
    )
  if task.spec:
    lines.append(f"read from TFDS: {task.spec}")
  if task.folder_format:
    lines.append(f"read from a folder: {downloads.folder_content(task)}")
  if what := downloads.fetched_by_hand(task):
    lines.append(f"by hand: {what}")
  if needs.manual:
    where = needs.manual.how.format(manual_dir="<manual_dir>")
    lines.append(f"{needs.manual.what}: from {needs.manual.where}, {where}")
  lines += [f"note: {text}" for text in (needs.gone, needs.note) if text]
  fill = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
  # Addresses and patterns of file names stay in one piece.
  fill.break_long_words = fill.break_on_hyphens = False
  return "\n".join([task.name, *map(fill.fill, lines)])


def _parser(prog: str | None) -> argparse.ArgumentParser:
  parser = tools.argument_parser(__doc__, "prepare_data", prog)
  parser.add_argument(
    "--task", nargs="+", help="names of tasks or groups (vtab, fgvc, ...), or all"
  )
  # None: TFDS's own folder, or none; an empty value is most often a variable not set.
  parser.add_argument("--data_dir", help="TFDS's folder")
  parser.add_argument("--root", help="folder or .zip of image files")
  parser.add_argument("--lists", help="folder of VPT's lists")
  parser.add_argument("--subset", default="", help="which training images")
  parser.add_argument("--manual_dir", help="of files fetched by hand")
  action = parser.add_mutually_exclusive_group()
  action.add_argument("--check", action="store_true", help="report, download nothing")
  action.add_argument(
    "--list", action="store_true", help="print a table of tasks, or all about one"
  )

  action.add_argument(
    "--list-indices",
    action="store_true",
    help="print which rows of the original files the splits are",
  )
  parser.add_argument(
    "--split", nargs="+", help="splits of --list-indices: train, val, test"
  )
  return parser


def _checked_folder(flag: str, path: str | None) -> str:
  """Returns the folder that a flag names, "" for none, after checking it."""
  from insvp_jax import config_checks

  if path is None:
    return ""
  expected = "a folder or a .zip archive" if flag == "root" else "a folder"
  if not path.strip():
    raise ValueError(f"--{flag} is empty, expected {expected}; or leave it out.")
  config_checks.check_folder(f"--{flag}", path)
  place = Path(path).expanduser()
  # TFDS makes its own.
  if flag != "data_dir" and not place.exists():
    raise FileNotFoundError(f"--{flag} is {path!r}, but there is nothing.")
  # What there is of it: folders, or an archive at its end.
  there = next((p for p in (place, *place.parents) if p.exists()), place)
  is_archive = flag == "root" and there == place and there.is_file()
  if there.exists() and not there.is_dir() and not is_archive:
    raise ValueError(
      f"--{flag} is {path!r}, but {there} is no folder; expected {expected}."
    )
  return str(path)


def _report(args: argparse.Namespace, tasks: Sequence[Any]) -> bool:
  """Prepares and reports all tasks; returns whether they are ready."""
  from insvp_jax.data import availability

  flags = ("data_dir", "root", "lists", "manual_dir")
  places = {flag: _checked_folder(flag, getattr(args, flag)) for flag in flags}
  for task in tasks:
    task.subset(args.subset)
  places = availability.Locations(**places, subset=args.subset)
  statuses, errors = [], {}
  for task in tasks:
    if args.check:
      state = availability.check_task(task, places)
    else:
      state = make_ready(task, places, errors)
    print(state.summary(), flush=True)
    for line in split_lines(state.data) if state.ready else ():
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
  if unknown := [name for name in splits if name not in original_rows.SPLITS]:
    known = ", ".join(original_rows.SPLITS)
    raise ValueError(f"--split has {unknown[0]!r}, expected some of {known}.")
  for task in tasks:
    for split in splits:
      source, rows = original_rows.rows_of_split(task, split, args.subset)
      print(f"{task.name} {split}, {len(rows)} rows of {source}:", *rows, flush=True)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool as `tools.argument_parser` says; returns its exit status."""
  parser = _parser(prog)
  args = parser.parse_args(argv)
  if not args.task and not args.list:
    parser.error("--task is missing; --list shows all of them")
  if args.split and not args.list_indices:
    parser.error("--split belongs to --list-indices")
  all_ready = True

  def work() -> None:
    nonlocal all_ready
    tasks = select_tasks(args.task or ["all"])
    if args.list:
      print(details(*tasks) if len(tasks) == 1 else table(tasks))
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
