"""Several tasks by one command: each its own run, and one table over all.

`config.task` may name a group of tasks: VTAB's "natural", "specialized" and
"structured", or a whole benchmark: "vtab", "fgvc", "hta", "cifar100_lt".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import statistics
from typing import Any

from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import config_checks
from insvp_jax.data import GROUPS, TASKS, check_data
from insvp_jax.distributed.processes import print_once
from insvp_jax.logs.writers import write_json, write_text
from insvp_jax.models.classifier import create_backbone
from insvp_jax.search import tables
from insvp_jax.search import tune as tune_lib
from insvp_jax.search.outlook import Sizes
from insvp_jax.train import report
from insvp_jax.train.program import fill_preset


def members(config: ConfigDict, workdir: str | Path) -> list[tuple[ConfigDict, Path]]:
  """Returns (config, workdir) of each task that a config stands for."""
  if config.task not in GROUPS:
    return [(config, Path(workdir))]
  result = []
  for task in GROUPS[config.task]:
    task_config = config.copy_and_resolve_references()
    task_config.task = task
    result.append((task_config, Path(workdir) / task))
  return result


def run(config: ConfigDict, workdir: str | Path, mode: str = "auto") -> dict[str, Any]:
  """Does what a config asks for, for one task or for each of a group.

  The data of all tasks are looked at before the first one trains. Started again, the
  same command goes on with what is missing.

  Args:
    config: the whole configuration.
    workdir: of a single task as in `tune.run`; of a group the parent of `<task>/`,
      and the place of suite.json, table.md and table.csv.
    mode: as for `tune.run`.

  Returns:
    What `tune.run` returns; for a group a dict of these by task.

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  workdir = Path(workdir)
  tasks = members(config, workdir)
  if config.task not in GROUPS:
    return tune_lib.run(config, workdir, mode)
  config_checks.validate(config)
  size = create_backbone(
    config.backbone.name, config.image_size, config_lib.backbone_kwargs(config)
  ).image_size
  sizes = {}
  for task_config, _ in tasks:
    fill_preset(task_config)
    data = check_data(task_config.task, task_config.data, size)
    sizes[task_config.task] = Sizes.of(data)
  results: dict[str, Any] = {}
  for task_config, task_dir in tasks:
    task = task_config.task
    print_once(f"\n{task} ({len(results) + 1} of {len(tasks)})")
    del sizes[task]
    # What has a summary is nearly always finished, and a guess will do.
    later = [
      sizes[other.task]
      for other, folder in tasks
      if other.task in sizes and not (folder / "summary.json").exists()
    ]
    results[task] = tune_lib.run(task_config, task_dir, mode, later=later)
    # After each task: an interrupted suite has the table of what is done.
    _write(workdir, results, GROUPS[config.task])
  return results


def tune(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Searches for lr and wd on val and trains the final runs: `run` in mode "tune".

  Args:
    config: the whole configuration, from `config.defaults()`; an empty `tune.lr` stands
      for the method's own grid.
    workdir: the parent of `<row>/` or, of a group of tasks, of `<task>/`.

  Returns:
    The summary by the rows' labels: the choice and the test accuracies in [0, 1].

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  return run(config, workdir, "tune")


def best_run(
  config: ConfigDict, workdir: str | Path, mode: str, results: Mapping[str, Any]
) -> Path:
  """Returns the first final run of the row that is best on the test split.

  Of a group that is of its first task.

  Args:
    config: as for `run`.
    workdir: as for `run`.
    mode: as for `run`.
    results: from `run`.
  """
  task_config, task_dir = members(config, workdir)[0]
  summary = results if config.task not in GROUPS else results[task_config.task]
  if report.metric_keys(summary)[1] in summary:  # a single run
    return task_dir
  best = max(summary, key=lambda label: summary[label]["mean"] or 0.0)
  return tune_lib.first_runs(task_config, task_dir, mode)[best]


def accuracies(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
  """Returns {label: {task: mean test accuracy in [0, 1]}} of `run`'s results."""
  table: dict[str, dict[str, float | None]] = {}
  for task, result in results.items():
    if "test_accuracy" in result:  # a single run
      result = {result["method"]: {"mean": result["test_accuracy"]}}
    for label, summary in result.items():
      table.setdefault(label, {})[task] = summary["mean"]
  return table


def group_accuracies(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Returns {label: {"<task> <group>": mean test accuracy in [0, 1]}}.

  Groups are of classes by their training images; see `train.evaluate.by_group`.

  Args:
    results: of `run`.
  """
  table: dict[str, dict[str, float]] = {}
  for task, result in results.items():
    if "test_accuracy" in result:  # a single run
      groups = (result["test_by_class"] or {}).get("groups", {})
      means = {name: group["accuracy"] for name, group in groups.items()}
      result = {result["method"]: {"group_means": means}}
    for label, summary in result.items():
      means = summary.get("group_means", {})
      table.setdefault(label, {}).update(
        {f"{task} {name}": means[name] for name in tables.GROUPS if name in means}
      )
  return table


def _are_errors(tasks: Sequence[str]) -> bool:
  """Returns whether tables show error rates, as papers on long tails do."""
  return all(TASKS[task].subset().imbalance > 1 for task in tasks)


def _columns(tasks: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
  """Returns (title, its tasks): each task, each of several groups, all."""
  columns = [(task, (task,)) for task in tasks]
  groups = list(dict.fromkeys(TASKS[task].group for task in tasks))
  if len(groups) > 1:
    columns += [
      (f"{group} mean", [task for task in tasks if TASKS[task].group == group])
      for group in groups
    ]
  return [*columns, ("mean", tasks)]


def _rows(table, tasks: Sequence[str]) -> list[list[str]]:
  """Returns the cells of the table; a mean needs all of its tasks."""
  columns, are_errors = _columns(tasks), _are_errors(tasks)
  kind = "error" if are_errors else "accuracy"
  rows = [[f"test {kind}, %", *(title for title, _ in columns)]]
  for label, by_task in table.items():
    cells = []
    for _, column_tasks in columns:
      values = [by_task.get(task) for task in column_tasks]
      known = [
        100 * (1 - value if are_errors else value)
        for value in values
        if value is not None
      ]
      is_complete = len(known) == len(values)
      cells.append(f"{statistics.mean(known):.2f}" if is_complete else "")
    rows.append([label, *cells])
  return rows


def format_table(
  table: Mapping[str, Mapping[str, float | None]], tasks: Sequence[str]
) -> str:
  """Returns a Markdown table: a row per label, a column per task, and means.

  The means are VTAB's: unweighted over tasks. Of long tails it shows error rates.

  Args:
    table: from `accuracies`.
    tasks: all tasks of the group, done or not.
  """
  titles, *rows = _rows(table, tasks)
  return tables.markdown(rows, titles)


def _write(workdir: Path, results: Mapping[str, Any], tasks: Sequence[str]) -> None:
  """Writes suite.json, table.md and table.csv."""
  table, by_group = accuracies(results), group_accuracies(results)
  write_json(workdir / "suite.json", results)
  (_, *titles), *rows = _rows(table, tasks)
  text = format_table(table, tasks)
  groups = list(dict.fromkeys(name for row in by_group.values() for name in row))
  group_rows = [[tables.percents(by_group[m].get(g)) for g in groups] for m in table]
  if groups:
    group_titles = ["test accuracy by training images, %", *groups]
    named = [[m, *cells] for m, cells in zip(table, group_rows, strict=True)]
    text += f"\n{tables.markdown(named, group_titles)}"
  write_text(workdir / "table.md", text)
  if _are_errors(tasks):
    titles = [f"{title} error" for title in titles]
  rows = [[*a, *b] for a, b in zip(rows, group_rows, strict=True)]
  csv_rows = [["label", *titles, *groups], *rows]
  write_text(workdir / "table.csv", tables.csv_text(csv_rows))
