"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array
import numpy as np

# Batches that wait for the device hold their images: not too many at a time.
_MAX_BATCHES_IN_FLIGHT = 3


def evaluate(
  eval_step: Callable[[dict[str, Array]], dict[str, Array]],
  batches: Iterable[dict[str, Array]],
) -> dict[str, Any]:
  """Returns accuracy and loss over all examples of `batches`.

  Args:
    eval_step: jitted; returns the sums of one padded batch, [] or, of m trials, [m].
    batches: padded batches with a mask, from `batches.eval_batches`.

  Returns:
    accuracy in [0, 1], loss (mean, in nats), num_correct and num_examples; of m trials
    the first three are arrays [m].

  Raises:
    ValueError: there is no example to evaluate.
  """
  sums: list[dict[str, Array]] = []
  for batch in batches:
    sums.append(eval_step(batch))
    jax.block_until_ready(sums[-_MAX_BATCHES_IN_FLIGHT:][0])
  # Added up in double precision, on the host.
  total = {
    name: sum(np.asarray(each[name], np.float64) for each in sums)
    for name in ("correct", "count", "loss")
  }
  if not np.any(total["count"]):
    raise ValueError("evaluation found no example; the split is empty.")
  # All trials see the same examples.
  count = float(np.max(total["count"]))
  return {
    "accuracy": _plain(total["correct"] / count),
    "loss": _plain(total["loss"] / count),
    "num_correct": _plain(np.asarray(total["correct"]).astype(int)),
    "num_examples": int(count),
  }


def _plain(value: Any) -> Any:
  """Returns a Python number, or the array if there are several."""
  return value.item() if np.ndim(value) == 0 else value
