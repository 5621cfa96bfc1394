"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clu.metrics import Average
import jax
from jaxtyping import Array, Float, Int
import numpy as np

# Batches that wait for the device hold their images: not too many at a time.
_MAX_BATCHES_IN_FLIGHT = 3
# The largest class of a split per one of the smallest, above which accuracy alone says
# little.
UNBALANCED = 1.5
# Classes with more training images have many, those with fewer have few: the rule of
# ImageNet-LT (Liu et al. 2019), "Large-scale long-tailed recognition in an open world".
_MANY, _FEW = 100, 20


def evaluate(
  eval_step: Callable[[dict[str, Array]], dict[str, Average]],
  batches: Iterable[dict[str, Array]],
) -> dict[str, Any]:
  """Returns accuracy and loss over all examples of `batches`.

  Args:
    eval_step: jitted; see `steps.create_eval_step`. What it returns is [] or [k] or,
      of m trials, [m] or [m, k].
    batches: padded batches with a mask, from `batches.eval_batches`.

  Returns:
    accuracy in [0, 1], loss (mean, in nats), num_correct and num_examples; of m trials
    the first three are arrays [m]. Also what `class_scores` returns, of m trials with a
    leading axis m but for class_count.

  Raises:
    ValueError: there is no example to evaluate.
  """
  sums: list[dict[str, Average]] = []
  for batch in batches:
    sums.append(eval_step(batch))
    jax.block_until_ready(sums[-_MAX_BATCHES_IN_FLIGHT:][0])
  if not sums:
    raise ValueError("evaluation found no example; the split is empty.")
  # Not by `Average.merge`, whose sums are float32: in double precision, on the host.
  total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *sums)
  if not np.all(total["loss"].count):
    raise ValueError("evaluation found no example; the split is empty.")
  return {
    "accuracy": _plain(total["accuracy"].compute()),
    "loss": _plain(total["loss"].compute()),
    "num_correct": _plain(total["accuracy"].total.astype(int)),
    # All trials see the same examples.
    "num_examples": int(np.max(total["accuracy"].count)),
    **_by_class(total),
  }


def _by_class(total: Mapping[str, Average]) -> dict[str, Any]:
  """Returns what `class_scores` does, of one model or of several trials."""
  of_label, of_prediction = total["class_accuracy"], total["class_prediction"]
  arrays = (
    of_label.total,
    of_label.count,
    of_prediction.count,
    of_prediction.total,
  )
  if np.ndim(of_label.count) == 1:
    return class_scores(*arrays)
  each = [class_scores(*rows) for rows in zip(*arrays, strict=True)]
  stacked = {name: np.stack([scores[name] for scores in each]) for name in each[0]}
  # All trials see the same examples.
  return {**stacked, "class_count": each[0]["class_count"]}


def class_scores(
  correct: Float[np.ndarray, " k"] | Int[np.ndarray, " k"],
  count: Float[np.ndarray, " k"] | Int[np.ndarray, " k"],
  predicted: Float[np.ndarray, " k"] | Int[np.ndarray, " k"],
  predicted_sum: Float[np.ndarray, " k"] | Int[np.ndarray, " k"],
) -> dict[str, Any]:
  """Returns what predictions are worth, class by class, from four sums of each class.

  Sums are all that batches and devices have to add up, where a confusion matrix of many
  classes would be large.

  Args:
    correct: its examples that are classified rightly.
    count: its examples.
    predicted: examples of any class that it is predicted for.
    predicted_sum: the sum of the indices of the classes predicted for its examples.

  Returns:
    class_accuracy (which is recall), class_precision and class_f1, float [k] in [0, 1],
    NaN for a class without examples; class_count, int [k]; and quadratic_kappa, which
    means something where the classes are grades: 1 less the mean squared distance of
    label and prediction per that of independent ones, NaN where that is 0.

  Source: precision, recall and F1 as in `sklearn.metrics`; Cohen 1968, "Weighted
    kappa".
  """
  is_there = count > 0
  recall, precision, f1 = (np.full(len(count), np.nan) for _ in range(3))
  np.divide(correct, count, out=recall, where=is_there)
  # A class that is never predicted has a precision of 0.
  np.divide(correct, np.maximum(predicted, 1), out=precision, where=is_there)
  np.divide(2 * correct, count + predicted, out=f1, where=is_there)
  grades, total = np.arange(len(count), dtype=np.float64), max(count.sum(), 1)
  squares = np.sum(grades**2 * (count + predicted))
  observed = squares - 2 * np.sum(grades * predicted_sum)
  expected = squares - 2 * np.sum(grades * count) * np.sum(grades * predicted) / total
  return {
    "class_accuracy": recall,
    "class_precision": precision,
    "class_f1": f1,
    "class_count": count.astype(int),
    "quadratic_kappa": float(1 - observed / expected) if expected > 0 else np.nan,
  }


def balanced(
  evaluated: Mapping[str, Any],
  class_names: Sequence[str],
  train_count: Sequence[int] | None = None,
  *,
  ordered: bool = False,
) -> dict[str, Any]:
  """Returns what accuracy alone would hide in a split of unequal classes.

  Args:
    evaluated: what `evaluate` returned for one model.
    class_names: one name per class.
    train_count: training images of each class; None where they are not known.
    ordered: whether the classes are grades, the next one the nearest.

  Returns:
    `balanced_accuracy` and `macro_f1`: means over classes, in [0, 1], of accuracy and
    of F1; `quadratic_kappa`: None unless ordered, or where it is not defined;
    `worst_class`: its name, accuracy and number of examples; `imbalance`: examples of
    the largest class per one of the smallest; `groups`: from `by_group`. Classes
    without examples are left out.
  """
  accuracy, count = evaluated["class_accuracy"], evaluated["class_count"]
  kappa = evaluated["quadratic_kappa"] if ordered else np.nan
  present = np.flatnonzero(count)
  worst = min(present, key=lambda i: (accuracy[i], -count[i]))
  return {
    "balanced_accuracy": float(np.mean(accuracy[present])),
    "macro_f1": float(np.mean(evaluated["class_f1"][present])),
    "quadratic_kappa": float(kappa) if np.isfinite(kappa) else None,
    "worst_class": {
      "name": class_names[worst],
      "accuracy": float(accuracy[worst]),
      "num_examples": int(count[worst]),
    },
    "imbalance": float(count.max() / count[present].min()),
    "groups": {} if train_count is None else by_group(evaluated, train_count),
  }


def by_group(
  evaluated: Mapping[str, Any], train_count: Sequence[int]
) -> dict[str, dict[str, Any]]:
  """Returns the accuracy of classes with many, medium and few training images.

  Many are more than 100, few are fewer than 20.

  Args:
    evaluated: what `evaluate` returned for one model.
    train_count: training images of each class.

  Returns:
    For "many", "medium" and "few", as far as there are such classes with examples:
    `accuracy`, the mean over them, in [0, 1], `num_classes` and `num_examples`. Nothing
    where all classes are of one group, or have about as many training images.
  """
  accuracy, count = evaluated["class_accuracy"], evaluated["class_count"]
  trained = np.asarray(train_count)
  if trained.max() <= UNBALANCED * trained.min():
    return {}
  is_many, is_few = trained > _MANY, trained < _FEW
  groups = {}
  for name, members in (
    ("many", is_many),
    ("medium", ~is_many & ~is_few),
    ("few", is_few),
  ):
    if (tested := members & (count > 0)).any():
      groups[name] = {
        "accuracy": float(np.mean(accuracy[tested])),
        "num_classes": int(tested.sum()),
        "num_examples": int(count[tested].sum()),
      }
  return groups if len(groups) > 1 else {}


def _plain(value: Any) -> Any:
  """Returns a Python number, or the array if there are several."""
  return value.item() if np.ndim(value) == 0 else value
