"""Training against validation loss, of the metrics that a run has written."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import statistics
from typing import Any

from insvp_jax.logs.writers import METRICS_FILE
from insvp_jax.search import tables

Points = list[dict[str, Any]]


def read(workdir: Path) -> Points:
  """Returns a point for each evaluation on val, by step; [] where there was none.

  Its "loss" is the mean of the training losses that were logged since the point before
  it, each of one batch with dropout on; None where none was. "val_loss" and
  "val_accuracy" are of the whole val split.

  Raises:
    FileNotFoundError: there is no run.
  """
  points: Points = []
  losses: list[float] = []
  for line in (workdir / METRICS_FILE).read_text().splitlines():
    metrics = json.loads(line)
    if metrics.get("loss") is not None:
      losses.append(metrics["loss"])
    if "val_loss" in metrics:
      names = ("step", "val_loss", "val_accuracy")
      mean = statistics.fmean(losses) if losses else None
      points.append({**{name: metrics[name] for name in names}, "loss": mean})
      losses = []
  return points


def table(name: str, points: Points) -> str:
  """Returns the points as a table, or a line that says why there are none."""
  if not points:
    return (
      f"{name}: no validation loss by step; train with config.eval_every_epochs=1 (and "
      "log_every_steps below the steps of an epoch).\n"
    )
  rows = [
    [
      f"{point['step']}",
      "-" if point["loss"] is None else f"{point['loss']:.3f}",
      f"{point['val_loss']:.3f}",
      f"{100 * point['val_accuracy']:.1f}",
    ]
    for point in points
  ]
  titles = [f"{name}, step", "training loss", "val loss", "val accuracy, %"]
  return tables.markdown(rows, titles)


def figure(found: Mapping[str, Points]) -> Any:
  """Returns a figure of the losses by step, a panel for each run."""
  from matplotlib.figure import Figure

  result = Figure(figsize=(4.5 * len(found), 3.2), layout="constrained")
  panels: Sequence[Any] = result.subplots(1, len(found), squeeze=False)[0]
  for axis, (name, points) in zip(panels, found.items(), strict=True):
    axis.set_title(name, fontsize=9, parse_math=False)
    for key, label in (("loss", "training"), ("val_loss", "validation")):
      known = [(p["step"], p[key]) for p in points if p[key] is not None]
      axis.plot(*zip(*known, strict=True) if known else ((), ()), "o-", label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats")
    axis.legend(fontsize=8)
  return result
