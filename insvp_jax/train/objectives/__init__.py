"""Kinds of tasks: one file each, found by name in `OBJECTIVES`."""

from collections.abc import Mapping
from typing import Any

from insvp_jax.train.objectives.base import Objective
from insvp_jax.train.objectives.classification import Classification
from insvp_jax.train.objectives.segmentation import Segmentation

__all__ = [
  "OBJECTIVES",
  "Classification",
  "Objective",
  "Segmentation",
  "metric_of",
  "objective_of",
  "title_of",
]

OBJECTIVES: dict[str, type[Objective]] = {
  "classification": Classification,
  "segmentation": Segmentation,
}
# {task: key of `OBJECTIVES`} of all tasks that are no classification.
_OF_TASK = {"segment_folder": "segmentation"}


def objective_of(task: str) -> type[Objective]:
  """Returns the kind of a task, by its name."""
  return OBJECTIVES[_OF_TASK.get(task, "classification")]


def metric_of(result: Mapping[str, Any]) -> str:
  """Returns what a result, a trial or a row of a search was judged by.

  Those of before there were several kinds of tasks name none: it was accuracy.
  """
  return result.get("metric", Classification.METRIC)


def title_of(metric: str) -> str:
  """Returns how tables and messages call a metric, by its name in keys."""
  titles = {objective.METRIC: objective.TITLE for objective in OBJECTIVES.values()}
  return titles.get(metric, metric)
