"""The figure of an ablation: a curve over what is a number, bars where it is none.

The rows of a search over `config.tune.variants` differ in one thing. Where that is a
number (a learning rate, prompt tokens, a share of the training images), accuracy is
drawn over it, a curve for each of the other things that differ; rows without it are
lines across. Of labels such as "beta_I 0.3" the number is read off the label. All else
is bars.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from insvp_jax.search import tables
from insvp_jax.search.trials import val_key
from insvp_jax.tools import visualize
from insvp_jax.train import objectives

# From this ratio of the largest to the smallest value on, an axis is logarithmic.
LOG_RATIO = 10
_MOST_TICKS = 10
CSV_TITLES = (
  *("label", "method", "series", "parameter", "value", "test_mean", "test_std"),
  "num_seeds",
)


@dataclasses.dataclass(frozen=True)
class Point:
  """A row of a search, and where it is drawn.

  Attributes:
    label: of the row.
    row: what the summary has of it.
    series: the curve that it is of; "" for the only one.
    parameter: what the x axis is; "" where there is none.
    value: of the parameter; None where the row has none.
  """

  label: str
  row: Mapping[str, Any]
  series: str = ""
  parameter: str = ""
  value: float | int | None = None


def is_ablation(summary: Mapping[str, Mapping[str, Any]]) -> bool:
  """Returns whether the rows of a search are variants, and not methods alone."""
  return any(row.get("changes") for row in summary.values())


def points_of(summary: Mapping[str, Mapping[str, Any]]) -> list[Point]:
  """Returns a point for each row, or several where its label has several numbers.

  Args:
    summary: {label: row} of a search.
  """
  changes = {label: _changes(label, row) for label, row in summary.items()}
  values: dict[str, set] = {}
  for of_row in changes.values():
    for key, value in of_row.items():
      values.setdefault(key, set()).add(_number(value))
  # With several numbers the one that takes most values is the axis.
  numeric = [
    k for k, of_key in values.items() if None not in of_key and len(of_key) > 1
  ]
  if not numeric:
    return _points_of_labels(summary)
  axis = max(numeric, key=lambda key: len(values[key]))
  fixed = _shared(changes, axis)
  return [
    Point(
      label,
      row,
      ", ".join(
        f"{key.rpartition('.')[2]} {value}" if key != "method" else str(value)
        for key, value in changes[label].items()
        if key != axis and key not in fixed
      ),
      axis,
      _number(changes[label].get(axis)),
    )
    for label, row in summary.items()
  ]


def _changes(label: str, row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a row changes, its method too; a method's fields without its name."""
  method = row.get("method", label)
  changes = {"method": method, **(row.get("changes") or {})}
  return {key.removeprefix(f"{method}."): value for key, value in changes.items()}


def _shared(changes: Mapping[str, Mapping[str, Any]], axis: str) -> set[str]:
  """Returns the keys in which the rows that have the axis do not differ."""
  rows = [each for each in changes.values() if axis in each]
  keys = {key for each in rows for key in each}
  return {key for key in keys if len({str(each.get(key)) for each in rows}) == 1}


def _number(value: Any) -> float | int | None:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number else None


def _points_of_labels(summary: Mapping[str, Mapping[str, Any]]) -> list[Point]:
  """Returns points by labels such as "beta_I 0.3" or "beta_I 0.7, beta_F 0.5"."""
  pattern = r"(.*\S) (-?[0-9.]+(?:e-?[0-9]+)?)"
  points = []
  for label, row in summary.items():
    for part in label.split(", "):
      match = re.fullmatch(pattern, part)
      if match is None:
        return [Point(each, of_row) for each, of_row in summary.items()]
      points.append(Point(label, row, match[1], match[1], float(match[2])))
  return points


def ablation_figure(
  summary: Mapping[str, Mapping[str, Any]], title: str, colors: Sequence[str]
) -> Any:
  """Returns the figure of an ablation.

  Test accuracies are means over the seeds with their standard deviation; those on val
  are of what was chosen.

  Args:
    summary: {label: row} of a search.
    title: of the figure.
    colors: of curves; the first one is that of bars.

  Returns:
    A `matplotlib.figure.Figure`; it belongs to no window.

  Raises:
    ValueError: matplotlib is not installed.
  """
  visualize.check_matplotlib()
  from matplotlib.figure import Figure

  points = points_of(summary)
  is_curve = any(point.value is not None for point in points)
  height = 4.2 if is_curve else 1.2 + 0.42 * len(points)
  figure = Figure(figsize=(6.5, height), layout="constrained")
  axis = figure.subplots()
  figure.suptitle(title, parse_math=False, fontsize=11)
  draw = _draw_curves if is_curve else _draw_bars
  draw(axis, points, colors)
  return figure


def _percent(share: float | int | None) -> float:
  """Returns a share in percent; of none NaN, which is not drawn."""
  return math.nan if share is None else 100.0 * share


def _all_missing(values: Sequence[float]) -> bool:
  return all(map(math.isnan, values))


def _draw_curves(axis: Any, points: Sequence[Point], colors: Sequence[str]) -> None:
  """Draws a curve for each series: test with its deviation, val of the choice."""
  names = list(dict.fromkeys(p.series for p in points if p.value is not None))
  for i, name in enumerate(names):
    color = colors[i % len(colors)]
    series = [p for p in points if p.series == name and p.value is not None]
    series.sort(key=lambda point: point.value)
    x = [point.value for point in series]
    test = [_percent(point.row["mean"]) for point in series]
    spread = [100.0 * (point.row["std"] or 0.0) for point in series]
    prefix = f"{name}: " if len(names) > 1 else ""
    look = {"color": color, "markersize": 5}
    if not _all_missing(test):
      label = f"{prefix}test" + (", mean ± std" if any(spread) else "")
      errors = spread if any(spread) else None
      axis.errorbar(x, test, errors, fmt="D-", capsize=3, label=label, **look)
    val = [_percent(point.row.get(val_key(point.row))) for point in series]
    if not _all_missing(val):
      look["markerfacecolor"] = "none"
      axis.plot(x, val, "o--", label=f"{prefix}val", linewidth=1, **look)
  for i, point in enumerate(p for p in points if p.value is None):
    color = colors[(len(names) + i) % len(colors)]
    if point.row["mean"] is not None:
      look = {"linestyle": ":", "color": color, "label": f"{point.label}: test"}
      axis.axhline(_percent(point.row["mean"]), **look)
  _scale(axis, sorted({p.value for p in points if p.value is not None}))
  axis.set_xlabel(", ".join(dict.fromkeys(p.parameter for p in points if p.parameter)))
  axis.set_ylabel(_metric_title(points))
  axis.grid(color="0.92")
  axis.set_axisbelow(True)
  _legend(axis)


def _metric_title(points: Sequence[Point]) -> str:
  return f"{objectives.title_of(objectives.metric_of(points[0].row))}, %"


def _scale(axis: Any, values: Sequence[float | int]) -> None:
  """Makes an axis logarithmic where its values ask for it; with a tick for each."""
  positive = [value for value in values if value > 0]
  is_wide = positive and positive[-1] / positive[0] >= LOG_RATIO and values[0] >= 0
  if is_wide and values[0] == 0:
    axis.set_xscale("symlog", linthresh=positive[0])
  elif is_wide:
    axis.set_xscale("log")
  if len(values) <= _MOST_TICKS:
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def _draw_bars(axis: Any, points: Sequence[Point], colors: Sequence[str]) -> None:
  """Draws a bar for each row: test with its deviation; val of the choice as a mark.

  Without any test the bars are val's.
  """
  rows = range(len(points))
  bars = [_percent(point.row["mean"]) for point in points]
  spread = [100.0 * (point.row["std"] or 0.0) for point in points]
  val = [_percent(point.row.get(val_key(point.row))) for point in points]
  label = "test" + (", mean ± std" if any(spread) else "")
  if _all_missing(bars):
    bars, val, label = val, bars, "val of the choice"
  if not _all_missing(bars):
    errors = {"ecolor": "black", "error_kw": {"capsize": 3, "elinewidth": 1}}
    errors["xerr"] = spread if any(spread) else None
    axis.barh(rows, bars, 0.6, color=colors[0], alpha=0.55, label=label, **errors)
  if not _all_missing(val):
    look = {"color": "black", "markerfacecolor": "none", "markersize": 5}
    axis.plot(val, rows, "o", label="val of the choice", **look)
  for i, point in enumerate(points):
    # From zero on, bars of near accuracies look alike: their numbers do not.
    if not math.isnan(bars[i]):
      text = f"{bars[i]:.2f}" + (f" ± {spread[i]:.2f}" if point.row["std"] else "")
      at = (max(bars[i] + spread[i], 0.0 if math.isnan(val[i]) else val[i]), i)
      axis.annotate(
        text, at, xytext=(7, 0), textcoords="offset points", va="center", fontsize=8
      )
  labels = [point.label for point in points]
  axis.set_yticks(rows, labels, parse_math=False, fontsize=9)
  axis.set_ylim(len(points) - 0.5, -0.5)
  # Room for the numbers.
  axis.set_xlim(0, 130)
  axis.set_xticks(range(0, 101, 20))
  axis.set_xlabel(_metric_title(points))
  axis.grid(axis="x", color="0.92")
  axis.set_axisbelow(True)
  _legend(axis, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _legend(axis: Any, **where: Any) -> None:
  """Draws the legend of what is there; of nothing none."""
  handles, _ = axis.get_legend_handles_labels()
  if handles:
    for text in axis.legend(fontsize=8, frameon=False, **where).get_texts():
      text.set_parse_math(False)


def data(summary: Mapping[str, Mapping[str, Any]]) -> list[Sequence[Any]]:
  """Returns what is drawn as rows, the titles first; accuracies in [0, 1].

  Args:
    summary: {label: row} of a search.
  """
  metric = tables.metric_of(summary)
  key, val = tables.values_key(metric), f"val_{metric}"
  rows: list[Sequence[Any]] = [(*CSV_TITLES, key, val)]
  for point in points_of(summary):
    row = point.row
    cells = (
      *(point.label, row.get("method", point.label), point.series, point.parameter),
      *(point.value, row["mean"], row["std"], len(row["seeds"])),
      " ".join(map(str, row.get(key) or ())),
      row.get(val),
    )
    rows.append(cells)
  return rows
