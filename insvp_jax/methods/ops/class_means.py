"""Means over the training images of each class."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def class_means(
  batches: Iterable[Mapping[str, Any]], rows_of: Callable[[Any], Any]
) -> dict[int, np.ndarray]:
  """Returns the mean of each class that has images, by label in ascending order.

  Args:
    batches: of "images", "labels" and "mask" (0 for padding).
    rows_of: images -> something of each, [b, ...].
  """
  sums: dict[int, np.ndarray] = {}
  counts: dict[int, int] = {}
  for batch in batches:
    # In float64, so that a mean does not depend on how images fall into batches.
    rows = np.asarray(rows_of(batch["images"])).astype(np.float64)
    labels, is_real = np.asarray(batch["labels"]), np.asarray(batch["mask"]) > 0
    for label in np.unique(labels[is_real]).tolist():
      chosen = rows[is_real & (labels == label)]
      sums[label] = sums.get(label, 0.0) + chosen.sum(axis=0)
      counts[label] = counts.get(label, 0) + len(chosen)
  return {label: sums[label] / counts[label] for label in sorted(sums)}
