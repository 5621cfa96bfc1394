"""The tables of a search and its final runs: Markdown and CSV."""

from collections.abc import Mapping, Sequence
import csv
import io
from typing import Any

import tabulate

from insvp_jax.errors import printable
from insvp_jax.train import objectives

# Of classes by their number of training images; see `train.evaluate.by_group`.
GROUPS = ("many", "medium", "few")
# What a row of unequal or ordered classes has beside its accuracy, and its title.
_MEANS = {
  "balanced_mean": "balanced, %",
  "macro_f1_mean": "macro-F1, %",
  "kappa_mean": "quadratic kappa",
}


def markdown(rows: Sequence[Sequence[str]], titles: Sequence[str]) -> str:
  """Returns a Markdown table: the first column of words, the others of numbers."""
  aligned = ("left", *["right"] * (len(titles) - 1))

  def cells(row: Sequence[str]) -> list[str]:
    # A folder's name may hold what ends a cell.
    return [printable(cell).replace("|", "\\|") for cell in row]

  text = tabulate.tabulate(
    map(cells, rows),
    headers=cells(titles),
    tablefmt="github",
    disable_numparse=True,
    colalign=aligned,
  )
  return f"{text}\n"


def values_key(metric: str) -> str:
  """Returns under which key a row has its metric on test, a number for each seed."""
  return "test_accuracies" if metric == "accuracy" else f"test_{metric}s"


def metric_of(summary: Mapping[str, Any]) -> str:
  """Returns the metric of a table's rows, by its name in keys."""
  return objectives.metric_of(next(iter(summary.values()), {}))


def group_names(summary: Mapping[str, Any]) -> list[str]:
  """Returns which of `GROUPS` any row has test classes of."""
  means = [result.get("group_means", {}) for result in summary.values()]
  return [name for name in GROUPS if any(name in mean for mean in means)]


def percents(share: float | None) -> str:
  """Returns a share as percents, "-" for none."""
  return "-" if share is None else f"{100 * share:.2f}"


def format_table(task: str, summary: Mapping[str, Any]) -> str:
  """Returns the summary as a Markdown table, a row per label."""
  hparams = _searched_hparams(summary)
  means = [
    name
    for name in _MEANS
    if any(result.get(name) is not None for result in summary.values())
  ]
  groups = group_names(summary)
  title = objectives.title_of(metric_of(summary))
  titles = [task, f"test {title}, %", *(_MEANS[name] for name in means)]
  titles += [f"{name}, %" for name in groups]
  titles += ["seeds", "lr", "wd", *hparams]
  titles += ["prompter + head", "seconds a run"]
  rows = []
  for label, result in summary.items():
    mean = percents(result["mean"])
    spread = f" ± {100 * result['std']:.2f}" if result["std"] is not None else ""
    cells = [label, f"{mean}{spread}"]
    cells += [_mean(name, result.get(name)) for name in means]
    cells += [percents(result.get("group_means", {}).get(name)) for name in groups]
    cells.append(f"{len(result['seeds'])}")
    cells += [_number(result.get(name, "")) for name in ("lr", "wd", *hparams)]
    cells += [f"{result['trainable_params']:,}", f"{result['train_seconds']:.0f}"]
    rows.append(cells)
  return markdown(rows, titles)


def format_csv(task: str, summary: Mapping[str, Any]) -> str:
  """Returns the summary as CSV, a row per label; metrics in [0, 1]."""
  hparams, metric = _searched_hparams(summary), metric_of(summary)
  columns = (
    "method",
    "mean",
    "std",
    *_MEANS,
    *GROUPS,
    "seeds",
    values_key(metric),
    f"val_{metric}",
    "lr",
    "wd",
  )
  columns = (*columns, *hparams, "trainable_params", "prompter_params", "train_seconds")
  rows: list[tuple] = [("task", "label", *columns)]
  for label, result in summary.items():
    cells = ({**result, **result.get("group_means", {})}.get(name) for name in columns)
    rows.append((task, label, *map(_cell, cells)))
  return csv_text(rows)


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
  """Returns rows, the titles first, as CSV."""
  file = io.StringIO()
  csv.writer(file, lineterminator="\n").writerows(rows)
  return file.getvalue()


def _searched_hparams(summary: Mapping[str, Any]) -> list[str]:
  """Returns the hparams beside lr and wd that any row was searched for."""
  names = (name for result in summary.values() for name in result["searched"])
  return [name for name in dict.fromkeys(names) if name not in ("lr", "wd")]


def _mean(name: str, value: float | None) -> str:
  """Returns the cell of one of `_MEANS`; a kappa is no share."""
  if name == "kappa_mean" and value is not None:
    return f"{value:.3f}"
  return percents(value)


def _number(value: Any) -> str:
  if isinstance(value, tuple | list):
    return ", ".join(map(_number, value))
  is_number = isinstance(value, float | int) and not isinstance(value, bool)
  return f"{value:g}" if is_number else str(value)


def _cell(value: Any) -> Any:
  return " ".join(map(str, value)) if isinstance(value, tuple | list) else value
