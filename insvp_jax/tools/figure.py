"""Draws what runs and searches have found, and writes the numbers beside it.

insvp figure --run=runs/methods --output=methods.png
insvp figure --run=runs/ablation --output=ablation.png --data=ablation.csv
insvp figure --kind=gradcam --run=runs/insvp --run=runs/vpt_deep --output=gradcam.png
insvp figure --kind=rollout --run=runs/insvp --images photos/ --data=rollout.npz
insvp figure --kind=tsne --run=runs/insvp --vectors=specific --data=tsne.csv
insvp figure --kind=curves --run=runs/insvp --run=runs/vpt_deep --data=curves.csv
insvp figure --kind=parameters --run=runs/insvp --run=runs/ablation --label insvp all

Without the command `insvp` it is python -m insvp_jax.tools.figure. The other kinds are
in `run_figures`; this one is of a search, and the default.

A search over variants is drawn as an ablation: a curve or bars, see `ablation_figure`.
Others, and with --trials these too, as follows.

On the left each row of the table: the accuracy on val of every trial, by lr, the chosen
one ringed, and the accuracy on test, mean and standard deviation over the seeds. On the
right the loss of each row's first final run by step; trials keep none. The loss on val
is there where a final run is evaluated on it while it trains: with
config.eval_every_epochs, on tasks whose final runs leave val out. The numbers are those
of summary.json, table.csv and the runs' metrics.jsonl.
"""

import argparse
from collections.abc import Mapping, Sequence
import functools
from pathlib import Path
import sys
from typing import Any

import numpy as np

from insvp_jax import tools
from insvp_jax.errors import printable
from insvp_jax.search import tables
from insvp_jax.search.trials import val_key
from insvp_jax.tools import ablation_figure, run_figures, tsne, visualize
from insvp_jax.tools.plots import COLORS, DPI, STYLES, Curve, averaged
from insvp_jax.tools.run_files import first_final_run, read_losses, read_summary
from insvp_jax.train import objectives

ROW_INCHES = 0.5
_CHOSEN = {"markersize": 7.5, "markeredgecolor": "black", "markeredgewidth": 1.4}


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
      steps, nats = curve if is_val else averaged(curve)
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


def search_data(
  summary: Mapping[str, Any], losses: Mapping[str, Mapping[str, Curve]]
) -> list[tuple]:
  """Returns what `search_figure` shows as rows of a table, the titles first.

  x is the lr of a trial and the step of a loss.
  """
  data: list[tuple] = [("row", "what", "x", "value", "std")]
  for label, row in summary.items():
    data += [
      (label, val_key(row), trial["lr"], trial[val_key(row)], None)
      for trial in row["trials"]
    ]
    if row["mean"] is not None:
      metric = f"test_{objectives.metric_of(row)}"
      data.append((label, metric, None, row["mean"], row["std"]))
    for name, curve in losses.get(label, {}).items():
      points = curve if name == "val_loss" else averaged(curve)
      data += [
        (label, name, float(x), float(y), None) for x, y in zip(*points, strict=True)
      ]
  return data


def draw(
  workdir: str | Path,
  path: str | Path,
  data: str | Path | None = None,
  dpi: int = 150,
  trials: bool = False,
) -> None:
  """Draws a search and writes the figure.

  Args:
    workdir: of the search.
    path: the figure's file; a .csv gets what it would show, and nothing is drawn.
    data: a .csv for what it shows; None for none.
    dpi: pixels per inch of the figure.
    trials: whether a search over variants is drawn trial by trial, too.

  Raises:
    ValueError, FileNotFoundError, OSError: as `read_summary`, `search_figure` and
      `visualize.save_figure`.
  """
  workdir, path = Path(workdir), Path(path)
  files = [data] if data else []
  if path.suffix.lower() == ".csv":
    files, path = [*files, path], None
  else:
    visualize.check_format(path)
  summary = read_summary(workdir)
  if ablation_figure.is_ablation(summary) and not trials:
    rows = ablation_figure.data(summary)
    create = functools.partial(ablation_figure.ablation_figure, colors=COLORS)
  else:
    losses = {
      label: read_losses(first_final_run(workdir, label, row))
      for label, row in summary.items()
    }
    rows = search_data(summary, losses)
    create = functools.partial(search_figure, losses=losses)
  if path:
    visualize.save_figure(create(summary, title=workdir.name), path, dpi)
  for file in files:
    run_figures.write_data(file, rows)


# --- The command.

_KINDS = ("search", *run_figures.KINDS)
# The fewest and the most pixels per inch.
_DPI = (30, 1200)
# Flags that some kinds have.
_FLAGS = {
  *("backbone", "images", "num_images", "label", "class_name", "vectors", "seed")
}


def _parser(prog: str | None) -> argparse.ArgumentParser:
  parser = tools.argument_parser(__doc__, "figure", prog)
  parser.add_argument(
    "--run",
    required=True,
    action="append",
    help="the workdir of a run or of a search; several times where runs are compared",
  )
  parser.add_argument(
    "--kind",
    choices=_KINDS,
    default="search",
    help="search: accuracies and losses of a search; prompts: of images; gradcam, "
    "rollout: where runs look; tsne: images as points; curves: losses and accuracy by "
    "epoch; parameters: against accuracy",
  )
  parser.add_argument(
    "--output",
    default="figure.png",
    help="the figure's file; .csv for the data of a search alone",
  )
  parser.add_argument(
    "--data",
    help="a file for the numbers: .npz of prompts, gradcam, rollout, else .csv",
  )
  parser.add_argument(
    "--trials",
    action="store_true",
    default=None,
    help="draw all trials and losses of a search over variants",
  )
  parser.add_argument(
    "--dpi", type=int, help="pixels per inch; 300, or 150 of a search"
  )
  parser.add_argument("--backbone", help=tools.BACKBONE_HELP)
  parser.add_argument(
    "--images",
    nargs="+",
    help="image files, or folders of them; test images of the first run's task without",
  )
  parser.add_argument("--num_images", type=int, help="how many images at most")
  parser.add_argument(
    "--label", nargs="+", help="names of the runs in the figure, in their order"
  )
  parser.add_argument(
    "--class_name", help="that Grad-CAM is of; each image's predicted one without it"
  )
  parser.add_argument(
    "--vectors",
    choices=tsne.VECTORS,
    help="of t-SNE: features, or InsVP's specific prompts",
  )
  parser.add_argument(
    "--seed", type=int, help="of the draw of test images, and of t-SNE; 0"
  )
  return parser


def _check(args: argparse.Namespace) -> None:
  """Checks flags before anything is read.

  Raises:
    ValueError: one does not fit the kind, or is missing a part.
  """
  kind = run_figures.KINDS.get(args.kind)
  flags = kind.flags if kind else frozenset()
  for name in sorted(_FLAGS - flags):
    if getattr(args, name) is not None:
      takers = [other for other, k in run_figures.KINDS.items() if name in k.flags]
      raise ValueError(
        f"--{name} is nothing to --kind={args.kind}; it is of {', '.join(takers)}."
      )
  if args.trials and kind:
    raise ValueError(f"--trials is nothing to --kind={args.kind}; it is of search.")
  if len(args.run) > 1 and not (kind and kind.several):
    several = [other for other, k in run_figures.KINDS.items() if k.several]
    raise ValueError(
      f"--kind={args.kind} takes one --run, got {len(args.run)}; {', '.join(several)} "
      "take several."
    )
  if args.label and len(args.label) != len(args.run):
    raise ValueError(
      f"--label has {len(args.label)} names for {len(args.run)} runs; name each."
    )
  if args.label and len(set(args.label)) < len(args.label):
    raise ValueError("--label names two runs alike; they could not be told apart.")
  if args.num_images is not None and args.num_images < 1:
    raise ValueError(f"--num_images is {args.num_images}, expected at least 1.")
  if args.seed is not None and not 0 <= args.seed < 2**32:
    raise ValueError(f"--seed is {args.seed}, expected 0 to {2**32 - 1}.")
  if args.dpi is not None and not _DPI[0] <= args.dpi <= _DPI[1]:
    raise ValueError(f"--dpi is {args.dpi}, expected {_DPI[0]} to {_DPI[1]}.")
  if not _is_data(args):
    visualize.check_format(Path(args.output))
  suffix = kind.suffix if kind else ".csv"
  if args.data and Path(args.data).suffix.lower() != suffix:
    raise ValueError(
      f"cannot write the data of --kind={args.kind} to {args.data!r}; its name has to "
      f"end with {suffix}."
    )


def _is_data(args: argparse.Namespace) -> bool:
  """Returns whether the output is the data of a search, without a figure."""
  return args.kind == "search" and Path(args.output).suffix.lower() == ".csv"


def _draw_kind(args: argparse.Namespace) -> None:
  """Draws what is no search, and writes figure and data."""
  kind = run_figures.KINDS[args.kind]
  labels = args.label or run_figures.labels_of(args.run)
  labels = map(printable, labels)
  given = {
    name: getattr(args, name)
    for name in ("backbone", "class_name", "vectors", "seed")
    if getattr(args, name) is not None
  }
  request = run_figures.Request(
    runs=dict(zip(labels, map(Path, args.run), strict=True)),
    images=tools.find_images(args.images) if args.images else (),
    num_images=args.num_images or kind.num_images,
    **given,
  )
  drawn = kind.draw(request)
  visualize.save_figure(drawn.figure, args.output, args.dpi or DPI)
  if args.data:
    run_figures.write_data(args.data, drawn.data)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  args = _parser(prog).parse_args(argv)

  def work() -> None:
    _check(args)
    if not _is_data(args):
      visualize.check_matplotlib()
    if args.kind == "search":
      draw(args.run[0], args.output, args.data, args.dpi or 150, bool(args.trials))
    else:
      _draw_kind(args)
    print(f"wrote {' and '.join(filter(None, (args.output, args.data)))}")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
