"""What predictions are worth: accuracies, F1, calibration, the confusion matrix.

What a run's result says, too, is computed in `train.evaluate`. Classes without examples
are left out of every mean over classes.
"""

from collections.abc import Mapping, Sequence
import csv
import io
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from insvp_jax.errors import printable
from insvp_jax.logs import writers
from insvp_jax.tools import visualize

# Bins of confidence in the calibration error, as in Guo et al. 2017.
NUM_BINS = 15
# Classes in the "top 5".
TOP = 5
# The share of resampled splits whose accuracy is in the interval.
CONFIDENCE = 0.95
_NUM_RESAMPLED = 100_000
# The most classes whose counts are written into the picture of the confusion matrix.
_MOST_WRITTEN = 20


def score(
  labels: Int[np.ndarray, "n"],
  probabilities: Float[np.ndarray, "n k"],
  class_names: Sequence[str],
  *,
  ordered: bool = False,
) -> dict[str, Any]:
  """Returns how good predictions are, as JSON holds it.

  Args:
    labels: the columns of the true classes.
    probabilities: of each class.
    class_names: of the k columns.
    ordered: whether the classes are grades, the next one the nearest: then there is a
      kappa with quadratic weights.

  Returns:
    In [0, 1] "accuracy"; "accuracy_interval", the (2.5%, 97.5%) quantiles of the
    accuracy of this split resampled with replacement; "top_5_accuracy" (None of at
    most 5 classes), "balanced_accuracy" and "macro_f1", means over classes of recall
    and of F1; "calibration_error", the expected one of Guo et al. 2017 with 15 bins;
    "quadratic_kappa" (None unless ordered, or where it is not defined). Besides "loss"
    in nats, "num_examples", and for each class in "classes" its name, "precision",
    "recall", "f1" (None without examples) and "num_examples"; "confusion" counts true
    classes by predicted ones.
  """
  from insvp_jax.train import evaluate

  predicted, columns = probabilities.argmax(axis=1), np.arange(len(class_names))
  is_correct = predicted == labels
  confusion = np.zeros((len(columns), len(columns)), int)
  np.add.at(confusion, (labels, predicted), 1)
  of_class = evaluate.class_scores(
    np.diag(confusion),
    confusion.sum(axis=1),
    confusion.sum(axis=0),
    confusion @ columns,
  )
  means = evaluate.balanced(of_class, class_names, ordered=ordered)
  parts = {"precision": "precision", "recall": "accuracy", "f1": "f1"}
  of_label = probabilities[np.arange(len(labels)), labels]
  # float32 underflows to 0 beyond 100 nats.
  nats = -np.log(np.maximum(of_label, np.finfo(np.float32).tiny))
  top = None
  if len(columns) > TOP:
    nearest = np.argpartition(-probabilities, TOP - 1, axis=1)[:, :TOP]
    top = float(np.mean((nearest == labels[:, None]).any(axis=1)))
  return {
    "accuracy": float(is_correct.mean()),
    "accuracy_interval": _interval(is_correct),
    "top_5_accuracy": top,
    "balanced_accuracy": means["balanced_accuracy"],
    "macro_f1": means["macro_f1"],
    "calibration_error": calibration_error(probabilities.max(axis=1), is_correct),
    "quadratic_kappa": means["quadratic_kappa"],
    "loss": float(nats.mean(dtype=np.float64)),
    "num_examples": len(labels),
    "classes": [
      {
        "name": name,
        **{key: _or_none(of_class[f"class_{part}"][i]) for key, part in parts.items()},
        "num_examples": int(of_class["class_count"][i]),
      }
      for i, name in enumerate(class_names)
    ],
    "confusion": confusion.tolist(),
  }


def _or_none(value: float) -> float | None:
  """Returns a number that JSON holds."""
  return None if np.isnan(value) else float(value)


def _interval(is_correct: np.ndarray) -> list[float]:
  """Returns the bootstrap interval of an accuracy.

  How many of n images drawn with replacement are right is binomial, so nothing has to
  be drawn image by image.
  """
  n, tail = len(is_correct), (1 - CONFIDENCE) / 2
  resampled = np.random.default_rng(0).binomial(n, is_correct.mean(), _NUM_RESAMPLED)
  return (np.quantile(resampled, [tail, 1 - tail]) / n).tolist()


def calibration_error(
  confidence: Float[np.ndarray, "n"], is_correct: np.ndarray
) -> float:
  """Returns the expected calibration error, in [0, 1].

  The mean over images of the distance, in the bin of their confidence, of mean
  confidence and accuracy; bins are of equal width.

  Args:
    confidence: probability of the predicted class.
    is_correct: whether it is the true one, bool [n].

  Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
  """
  bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
  gaps = np.bincount(bins, confidence - is_correct, minlength=NUM_BINS)
  return float(np.abs(gaps).sum() / len(confidence))


def format_scores(scores: Mapping[str, Any]) -> str:
  """Returns a line with what accuracy alone does not say."""
  low, high = scores["accuracy_interval"]
  parts = [f"95% interval of the accuracy {100 * low:.1f} to {100 * high:.1f}%"]
  if scores["top_5_accuracy"] is not None:
    parts.append(f"top-5 {100 * scores['top_5_accuracy']:.2f}%")
  parts.append(f"macro-F1 {100 * scores['macro_f1']:.2f}%")
  if scores["quadratic_kappa"] is not None:
    parts.append(f"quadratic kappa {scores['quadratic_kappa']:.3f}")
  parts.append(f"calibration error {100 * scores['calibration_error']:.2f}%")
  return ", ".join(parts)


def format_classes(scores: Mapping[str, Any]) -> str:
  """Returns a table with a line for each class that has examples."""
  rows = [row for row in scores["classes"] if row["num_examples"]]
  width = max(len(printable(row["name"])) for row in rows)
  lines = [f"{'class':{width}}  precision   recall       F1  images"]
  for row in rows:
    cells = (f"{100 * row[name]:8.2f}%" for name in ("precision", "recall", "f1"))
    lines.append(
      f"{printable(row['name']):{width}} {''.join(cells)}  {row['num_examples']:6}"
    )
  return "\n".join(lines)


def write_confusion(scores: Mapping[str, Any], path: str | Path) -> None:
  """Writes the confusion matrix to a .csv, or draws it.

  Rows are true classes, columns predicted ones. In the picture the shade is the share
  of the row, and up to 20 classes have their counts in it.

  Raises:
    ValueError: the file's ending is neither .csv nor a picture's.
    OSError: the disk is full or read-only.
  """
  names = [printable(row["name"]) for row in scores["classes"]]
  if Path(path).suffix.lower() == ".csv":
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class, by predicted class", *names])
    rows = zip(names, scores["confusion"], strict=True)
    writer.writerows([name, *row] for name, row in rows)
    writers.write_text(path, text.getvalue())
    return
  visualize.save_figure(_confusion_figure(np.array(scores["confusion"]), names), path)


def _confusion_figure(counts: np.ndarray, names: Sequence[str]) -> Any:
  from matplotlib.figure import Figure

  number = len(names)
  side = min(max(3.0, 0.45 * number), 12.0)
  figure = Figure((side + 1.6, side + 0.8), layout="constrained")
  axis = figure.add_subplot()
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  # Blues are told apart without colours, too.
  picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
  size = 9 if number <= _MOST_WRITTEN else 5
  axis.set_xticks(range(number), names, rotation=90, fontsize=size, parse_math=False)
  axis.set_yticks(range(number), names, fontsize=size, parse_math=False)
  axis.set_xlabel("predicted class")
  axis.set_ylabel("true class")
  if number <= _MOST_WRITTEN:
    for i, j in np.argwhere(counts):
      color = "white" if shares[i, j] > 0.6 else "black"
      axis.text(j, i, counts[i, j], ha="center", va="center", color=color, fontsize=8)
  figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.8)
  return figure
