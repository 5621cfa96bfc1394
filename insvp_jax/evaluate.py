"""Evaluation that counts every example exactly once, on any number of devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array

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
  sums = []
  for batch in batches:
    sums.append(eval_step(params, batch))
    # Batches that wait for the device hold their images: not too many at a time.
    jax.block_until_ready(sums[-_AHEAD:][0])
  count = sum(int(s["count"]) for s in sums)
  if count == 0:
    raise ValueError("evaluation found no example; the split is empty.")
  correct = sum(int(s["correct"]) for s in sums)
  return {
    "accuracy": correct / count,
    "loss": sum(float(s["loss"]) for s in sums) / count,
    "num_correct": correct,
    "num_examples": count,
  }
