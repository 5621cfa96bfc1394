"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array
import numpy as np

_AHEAD = 3


def evaluate(
  eval_step: Callable[[Mapping[str, Any], dict[str, Array]], dict[str, Array]],
  params: Mapping[str, Any],
  batches: Iterable[dict[str, Array]],
) -> dict[str, float | int]:
  """Returns accuracy and loss over all examples of `batches`.

  Args:
    eval_step: jitted; returns the sums of one padded batch.
    params: the full tree of parameters.
    batches: padded batches with a mask, from `pipeline.eval_batches`.

  Returns:
    accuracy in [0, 1], loss (mean, in nats), num_correct and num_examples.

  Raises:
    ValueError: there is no example to evaluate.
  """
  found = sums(eval_step, params, batches)
  correct, count = int(found["correct"]), int(found["count"])
  return {
    "accuracy": correct / count,
    "loss": float(found["loss"]) / count,
    "num_correct": correct,
    "num_examples": count,
  }


def sums(
  eval_step: Callable[[Any, dict[str, Array]], dict[str, Array]],
  params: Any,
  batches: Iterable[dict[str, Array]],
) -> dict[str, np.ndarray]:
  """Returns what `eval_step` counts, added up over all batches in double precision.

  Raises:
    ValueError: there is no example to evaluate.
  """
  found = []
  for batch in batches:
    found.append(eval_step(params, batch))
    # Batches that wait for the device hold their images: not too many at a time.
    jax.block_until_ready(found[-_AHEAD:][0])
  total = {
    name: np.asarray(sum(np.asarray(each[name], np.float64) for each in found))
    for name in ("correct", "count", "loss")
  }
  if not np.any(total["count"]):
    raise ValueError("evaluation found no example; the split is empty.")
  return total
