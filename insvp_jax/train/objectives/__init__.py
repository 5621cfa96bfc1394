"""Kinds of tasks: one file each, found by name in `OBJECTIVES`."""

from insvp_jax.train.objectives.base import Objective
from insvp_jax.train.objectives.classification import Classification

__all__ = ["OBJECTIVES", "Classification", "Objective", "objective_of", "title_of"]

OBJECTIVES: dict[str, type[Objective]] = {
  "classification": Classification,
}
# {task: key of `OBJECTIVES`} of all tasks that are no classification.
_OF_TASK: dict[str, str] = {}


def objective_of(task: str) -> type[Objective]:
  """Returns the kind of a task, by its name."""
  return OBJECTIVES[_OF_TASK.get(task, "classification")]


def title_of(metric: str) -> str:
  """Returns how tables and messages call a metric, by its name in keys."""
  titles = {objective.METRIC: objective.TITLE for objective in OBJECTIVES.values()}
  return titles.get(metric, metric)
