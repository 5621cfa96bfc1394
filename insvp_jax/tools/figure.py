"""Draws a search: accuracies of its trials and final runs by row, and their losses.

insvp figure --run=runs/methods --output=methods.png
insvp figure --run=runs/ablation --output=ablation.png --data=ablation.csv

Without the command `insvp` it is python -m insvp_jax.tools.figure.

A search over variants is drawn as an ablation: a curve or bars, see `ablation_figure`.
Others, and with --trials these too, as follows.

On the left each row of the table: the accuracy on val of every trial, by lr, the chosen
one ringed, and the accuracy on test, mean and standard deviation over the seeds. On the
right the loss of each row's first final run by step; trials keep none. The loss on val
is there where a final run is evaluated on it while it trains: with
config.eval_every_epochs, on tasks whose final runs leave val out. The numbers are those
of summary.json, table.csv and the runs' metrics.jsonl.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import sys
from typing import Any

import numpy as np

from insvp_jax import files, tools
from insvp_jax.checkpoints.files import load_json
from insvp_jax.config_variants import Variant
from insvp_jax.logs.writers import METRICS_FILE, write_text
from insvp_jax.search import tables
from insvp_jax.search.trials import val_key
from insvp_jax.tools import ablation_figure, visualize
from insvp_jax.train import objectives

# Okabe and Ito's colours, which the colour-blind can tell apart; no yellow on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--", ":")
ROW_INCHES = 0.5
# Points of a curve: more of them are averaged, as the loss of one batch is noisy.
NUM_POINTS = 40
_CHOSEN = {"markersize": 7.5, "markeredgecolor": "black", "markeredgewidth": 1.4}

Curve = tuple[np.ndarray, np.ndarray]


def read_summary(workdir: Path) -> dict[str, Any]:
  """Returns {label: what `search.tune.run` returned of that row}.

  Raises:
    FileNotFoundError: no search has written its summary there.
    ValueError: it is one of a group of tasks; or the file is damaged.
  """
  if (workdir / "suite.json").exists():
    tasks = sorted(path.parent.name for path in workdir.glob("*/summary.json"))
    raise ValueError(
      f"{workdir} has the searches of several tasks; name the folder of one of "
      f"{', '.join(tasks)}."
    )
  path = workdir / "summary.json"
  if not path.exists():
    raise FileNotFoundError(
      f"there is no {path}; --run wants the workdir of a search, which writes it after "
      "its first row."
    )
  return load_json(path)


def read_losses(run: Path) -> dict[str, Curve]:
  """Returns (steps, nats) by name, "loss" and "val_loss", of a run's metrics.jsonl."""
  path, curves = run / METRICS_FILE, {}
  lines = files.read_bytes(path).splitlines() if path.exists() else ()
  rows = [files.parse_json(line) for line in lines]
  for name in ("loss", "val_loss"):
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
      curves[name] = tuple(np.array(points, float).T)
  return curves


def search_figure(
  summary: Mapping[str, Any], losses: Mapping[str, Mapping[str, Curve]], title: str
) -> Any:
  """Returns the figure of a search, with a line for each row.

  Args:
    summary: from `read_summary`.
    losses: from `read_losses`, by label; the right part is left out if there are none.
    title: of the figure.

  Returns:
    A `matplotlib.figure.Figure`; it belongs to no window.

  Raises:
    ValueError: matplotlib is not installed.
  """
  visualize.check_matplotlib()
  from matplotlib.figure import Figure

  has_losses = any(losses.values())
  height = 1.6 + ROW_INCHES * max(3, len(summary))
  figure = Figure(figsize=(11 if has_losses else 6.5, height), layout="constrained")
  axes = figure.subplots(1, 1 + has_losses, squeeze=False)[0]
  figure.suptitle(title, parse_math=False, fontsize=11)
  _draw_accuracies(axes[0], summary)
  if has_losses:
    _draw_losses(axes[1], losses)
  return figure


def _draw_accuracies(axis: Any, summary: Mapping[str, Any]) -> None:
  """Draws a line per row: a point per trial, and below them the test accuracy."""
  from matplotlib import colormaps
  from matplotlib.lines import Line2D

  rates = sorted({t["lr"] for row in summary.values() for t in row["trials"]})
  # From dark to light, with the lr; the lightest would not show on white.
  shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(1, len(rates))))
  colors = dict(zip(rates, shades, strict=False))
  for i, row in enumerate(summary.values()):
    tried = sorted({trial["lr"] for trial in row["trials"]})
    offsets = np.linspace(-0.3, 0.06, len(tried)) if len(tried) > 1 else (-0.12,)
    heights = dict(zip(tried, i + np.array(offsets), strict=False))
    chosen = {name: row[name] for name in row["searched"] or ("lr",)}
    key = val_key(row)
    for trial in row["trials"]:
      y, color = heights[trial["lr"]], colors[trial["lr"]]
      if trial[key] is None:
        # At the edge: it has no accuracy.
        where = {"transform": axis.get_yaxis_transform(), "clip_on": False}
        axis.plot(0.012, y, "x", color=color, markersize=5, **where)
        continue
      is_chosen = all(trial[name] == value for name, value in chosen.items())
      look = _CHOSEN if is_chosen else {"markersize": 5.5}
      axis.plot(100 * trial[key], y, "o", color=color, **look)
    if row["mean"] is not None:
      spread = None if row["std"] is None else 100 * row["std"]
      axis.errorbar(
        *(100 * row["mean"], i + 0.3),
        xerr=spread,
        **{"fmt": "D", "color": "black", "markersize": 5, "capsize": 3},
      )
  axis.set_yticks(range(len(summary)), summary, parse_math=False, fontsize=9)
  axis.set_ylim(len(summary) - 0.5, -0.5)
  for border in range(1, len(summary)):
    axis.axhline(border - 0.5, color="0.85", linewidth=0.8, zorder=0)
  axis.grid(axis="x", color="0.92", zorder=0)
  axis.set_axisbelow(True)
  axis.set_xlabel(f"{objectives.title_of(tables.metric_of(summary))}, %")

  def handle(label: str, marker: str = "o", color: Any = "0.6", **look: Any) -> Any:
    return Line2D([], [], linestyle="", marker=marker, color=color, label=label, **look)

  handles = [handle(f"val, lr {lr:g}", color=color) for lr, color in colors.items()]
  if rates:
    handles.append(handle("chosen", **_CHOSEN))
  if any(t[val_key(row)] is None for row in summary.values() for t in row["trials"]):
    handles.append(handle("diverged", "x"))
  handles.append(handle("test, mean ± std", "D", "black"))
  axis.legend(
    handles=handles,
    **{"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 4},
    **{"fontsize": 8, "frameon": False, "handletextpad": 0.2, "columnspacing": 1.0},
  )


def _draw_losses(axis: Any, losses: Mapping[str, Mapping[str, Curve]]) -> None:
  """Draws the loss of each row's first final run, on val with points."""
  for i, (label, curves) in enumerate(losses.items()):
    color = COLORS[i % len(COLORS)]
    style = STYLES[i // len(COLORS) % len(STYLES)]
    for name, curve in curves.items():
      is_val = name == "val_loss"
      marks = {"marker": "o", "markersize": 3.5} if is_val else {"label": label}
      steps, nats = curve if is_val else _averaged(curve)
      axis.plot(steps, nats, style, color=color, linewidth=1.3, **marks)
  axis.set_xlabel("step")
  axis.set_ylabel("loss, nats")
  has_val = any("val_loss" in curves for curves in losses.values())
  on_val = "; on val with points" if has_val else ""
  axis.set_title(f"first final run: training loss{on_val}", fontsize=9)
  axis.grid(color="0.92")
  legend = axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
  legend.set_frame_on(False)
  for text in legend.get_texts():
    text.set_parse_math(False)


def _averaged(curve: Curve) -> Curve:
  """Returns at most `NUM_POINTS` points: means over neighbours."""
  parts = min(NUM_POINTS, len(curve[0]))
  steps, nats = (
    np.array([part.mean() for part in np.array_split(values, parts)])
    for values in curve
  )
  return steps, nats


def draw(workdir: str | Path, path: str | Path, trials: bool = False) -> None:
  """Draws a search and writes the figure.

  Args:
    workdir: of the search.
    path: the figure's file.
    trials: whether a search over variants is drawn trial by trial, too.

  Raises:
    ValueError, FileNotFoundError, OSError: as `read_summary`, `search_figure` and
      `visualize.save_figure`.
  """
  workdir = Path(workdir)
  visualize.check_format(Path(path))
  summary = read_summary(workdir)
  if ablation_figure.is_ablation(summary) and not trials:
    figure = ablation_figure.ablation_figure(summary, workdir.name, COLORS)
    visualize.save_figure(figure, path)
    return
  losses = {}
  for label, row in summary.items():
    folder = Variant(label, row.get("method", label)).folder
    losses[label] = read_losses(workdir / folder / f"seed{row['seeds'][0]}")
  visualize.save_figure(search_figure(summary, losses, workdir.name), path)


def write_data(workdir: str | Path, path: str | Path) -> None:
  """Writes the accuracies of a search's rows, and what they differ in, as CSV.

  Args:
    workdir: of the search.
    path: the file.

  Raises:
    ValueError, FileNotFoundError, OSError: as `read_summary` and `write_text`.
  """
  write_text(path, ablation_figure.csv_text(read_summary(Path(workdir))))


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "figure", prog)
  parser.add_argument("--run", required=True, help="the workdir of a search")
  parser.add_argument(
    "--output", default="figure.png", help="the figure's file; .csv for its data alone"
  )
  parser.add_argument("--data", help="a .csv file for the accuracies that are drawn")
  parser.add_argument(
    "--trials", action="store_true", help="draw all trials and losses of an ablation"
  )
  args = parser.parse_args(argv)

  def work() -> None:
    is_data = Path(args.output).suffix.lower() == ".csv"
    if not is_data:
      visualize.check_matplotlib()
      draw(args.run, args.output, args.trials)
      print(f"wrote {args.output}")
    for path in filter(None, (args.data, args.output if is_data else None)):
      write_data(args.run, path)
      print(f"wrote {path}")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
