"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

from clu.metrics import Average
import jax
from jaxtyping import Array
import numpy as np

# Batches that wait for the device hold their images: not too many at a time.
_MAX_BATCHES_IN_FLIGHT = 3


def evaluate(
  eval_step: Callable[[dict[str, Array]], dict[str, Average]],
  batches: Iterable[dict[str, Array]],
) -> dict[str, Any]:
  """Returns accuracy and loss over all examples of `batches`.

  Args:
    eval_step: jitted; returns "accuracy" and "loss" of one padded batch: sums and
      counts, [] or, of m trials, [m].
    batches: padded batches with a mask, from `batches.eval_batches`.

  Returns:
    accuracy in [0, 1], loss (mean, in nats), num_correct and num_examples; of m trials
    the first three are arrays [m].

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
  }


def _plain(value: Any) -> Any:
  """Returns a Python number, or the array if there are several."""
  return value.item() if np.ndim(value) == 0 else value
