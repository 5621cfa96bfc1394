"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clu.metrics import Average
import jax
from jaxtyping import Array
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
    eval_step: jitted; returns "accuracy" and "loss" of one padded batch, sums and
      counts, [] or, of m trials, [m]; and "class_accuracy", [k] or [m, k].
    batches: padded batches with a mask, from `batches.eval_batches`.

  Returns:
    accuracy in [0, 1], loss (mean, in nats), num_correct and num_examples; of m trials
    the first three are arrays [m]. Also class_accuracy, [k] or [m, k], NaN for a class
    without examples, and class_count [k].

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
    **_by_class(total["class_accuracy"]),
  }


def _by_class(total: Average) -> dict[str, Any]:
  """Returns accuracy and number of examples of each class."""
  count = total.count if np.ndim(total.count) == 1 else total.count[0]
  return {
    "class_accuracy": class_accuracy(total.total, total.count),
    "class_count": count.astype(int),
  }


def class_accuracy(correct: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Returns the accuracy in [0, 1] of each class; NaN for one without examples."""
  accuracy = np.full(np.shape(correct), np.nan)
  np.divide(correct, count, out=accuracy, where=np.asarray(count) > 0)
  return accuracy


def balanced(
  evaluated: Mapping[str, Any],
  class_names: Sequence[str],
  train_count: Sequence[int] | None = None,
) -> dict[str, Any]:
  """Returns what accuracy alone would hide in a split of unequal classes.

  Args:
    evaluated: what `evaluate` returned for one model.
    class_names: one name per class.
    train_count: training images of each class; None where they are not known.

  Returns:
    `balanced_accuracy`: the mean over classes, in [0, 1]; `worst_class`: its name,
    accuracy and number of examples; `imbalance`: examples of the largest class per one
    of the smallest; `groups`: from `by_group`. Classes without examples are left out.
  """
  accuracy, count = evaluated["class_accuracy"], evaluated["class_count"]
  present = np.flatnonzero(count)
  worst = min(present, key=lambda i: (accuracy[i], -count[i]))
  return {
    "balanced_accuracy": float(np.mean(accuracy[present])),
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
