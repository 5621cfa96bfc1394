"""What runs and searches have written beside their checkpoints, read to be drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
import sys
from typing import Any

import numpy as np

from insvp_jax import files
from insvp_jax.checkpoints.files import load_json
from insvp_jax.config_variants import Variant
from insvp_jax.errors import printable
from insvp_jax.logs.writers import METRICS_FILE
from insvp_jax.tools.plots import Curve, Trained
from insvp_jax.train.objectives import OBJECTIVES, metric_of, title_of
from insvp_jax.train.report import metric_keys

SUMMARY_FILE, RESULT_FILE = "summary.json", "result.json"
CURVES = ("loss", "val_loss", *(f"val_{o.METRIC}" for o in OBJECTIVES.values()))


def read_summary(workdir: Path) -> dict[str, Any]:
  """Returns {label: what `search.tune.run` returned of that row}.

  Raises:
    FileNotFoundError: no search has written its summary there.
    ValueError: it is one of a group of tasks; or the file is damaged.
  """
  if (workdir / "suite.json").exists():
    tasks = sorted(path.parent.name for path in workdir.glob(f"*/{SUMMARY_FILE}"))
    raise ValueError(
      f"{workdir} has the searches of several tasks; name the folder of one of "
      f"{', '.join(tasks)}."
    )
  path = workdir / SUMMARY_FILE
  if not path.exists():
    raise FileNotFoundError(
      f"there is no {path}; --run wants the workdir of a search, which writes it after "
      "its first row."
    )
  return load_json(path)


def first_final_run(workdir: Path, label: str, row: Mapping[str, Any]) -> Path:
  """Returns the folder of the first final run of a row of a search."""
  folder = Variant(label, row.get("method", label)).folder
  return workdir / folder / f"seed{row['seeds'][0]}"


def read_metrics(run: Path) -> list[dict[str, Any]]:
  """Returns the lines of a run's metrics.jsonl; none where there is none.

  Raises:
    ValueError: a line is damaged; the message names it.
  """
  path, rows = run / METRICS_FILE, []
  lines = files.read_bytes(path).splitlines() if path.exists() else ()
  for number, line in enumerate(lines, 1):
    try:
      row = files.parse_json(line)
    except ValueError as error:
      raise ValueError(f"{path} is damaged in line {number}: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
      raise ValueError(f"{path} is damaged in line {number}: it has no step.")
    rows.append(row)
  return rows


def read_losses(run: Path) -> dict[str, Curve]:
  """Returns (steps, nats) by name, "loss" and "val_loss", of a run's metrics.jsonl."""
  curves = _curves(read_metrics(run))
  return {name: curves[name] for name in ("loss", "val_loss") if name in curves}


def read_curves(run: Path) -> dict[str, Curve]:
  """Returns (epochs, values) of the `CURVES` that a run's metrics.jsonl has.

  What is not finite there, of a run that diverged, is left out; a line on standard
  error says so.

  Raises:
    ValueError: there are no metrics with epochs, or the file is damaged.
  """
  rows = read_metrics(run)
  # Lines of val have no epoch of their own.
  steps = next((row["step"] / row["epoch"] for row in rows if row.get("epoch")), None)
  if steps is None:
    raise ValueError(
      f"{run / METRICS_FILE} has no line of a training step; --run wants the workdir "
      "of a run that has trained, or of a search."
    )
  lost = sum(name in row and row[name] is None for row in rows for name in CURVES)
  if lost:
    print(
      f"note: {printable(str(run))}: {lost} numbers that are not finite are left out",
      file=sys.stderr,
    )
  return {name: (x / steps, y) for name, (x, y) in _curves(rows).items()}


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
  """Returns (steps, values) by name of `CURVES`, one for each step, of finite ones."""
  curves = {}
  for name in CURVES:
    # The last line repeats the accuracy of the last evaluation.
    points = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    if points:
      steps, values = zip(*points.items(), strict=True)
      curves[name] = (np.array(steps, float), np.array(values, float))
  return curves


def run_folders(workdir: Path, label: str) -> dict[str, Path]:
  """Returns {label: folder} of a run, or of a search each row's first final run."""
  if not (workdir / SUMMARY_FILE).exists() and not (workdir / "suite.json").exists():
    return {label: workdir}
  return {
    row_label: first_final_run(workdir, row_label, row)
    for row_label, row in read_summary(workdir).items()
  }


def read_trained(workdir: Path, label: str) -> list[Trained]:
  """Returns the metric on test and the trained parameters of a run, or a search's rows.

  What has none of one of them is left out; a line on standard error says so.

  Args:
    workdir: of a finished run, or of a search.
    label: of a run; rows of a search have their own.

  Raises:
    FileNotFoundError: there is neither.
    ValueError: a file is damaged.
  """
  if (workdir / RESULT_FILE).is_file():
    result = load_json(workdir / RESULT_FILE)
    rows = {label: (result, metric_keys(result)[1])}
  elif (workdir / SUMMARY_FILE).exists() or (workdir / "suite.json").exists():
    rows = {name: (row, "mean") for name, row in read_summary(workdir).items()}
  else:
    raise FileNotFoundError(
      f"there is no {workdir / RESULT_FILE} and no {SUMMARY_FILE}; --run wants the "
      "workdir of a finished run or of a search."
    )
  found = []
  for name, (row, key) in rows.items():
    accuracy, params = row.get(key), row.get("trainable_params")
    if accuracy is None or not params:
      metric = f"test {title_of(metric_of(row))}"
      lacks = metric if accuracy is None else "trained parameters"
      print(
        f"note: {printable(str(workdir))}: {printable(name)} has no {lacks} and is "
        "left out",
        file=sys.stderr,
      )
      continue
    point = Trained(name, params, accuracy, row.get("std"), metric_of(row))
    found.append(point)
  return found
