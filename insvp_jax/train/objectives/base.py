"""What differs between kinds of tasks: target, loss, metric, augmentation, head.

The trainer, its steps, evaluation, reports, searches and tools speak to an `Objective`
alone. Whoever adds a kind of task writes one of them, and names it in
`objectives.OBJECTIVES`.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax.data.splits import Split

Batch = dict[str, Array]


class Objective(abc.ABC):
  """A kind of task, for one number of classes and one config.

  Attributes:
    METRIC: what a model is judged by, and a search selects by: a number in [0, 1], more
      is better. It names keys: `val_<METRIC>`, `test_<METRIC>`.
    TITLE: how tables and messages call the metric.
    ONE_FEATURE: whether a head sees one feature of an image, so that the features of
      images that stay the same may be computed once, and trials be stacked.
    num_classes: k.
  """

  METRIC: ClassVar[str]
  TITLE: ClassVar[str]
  ONE_FEATURE: ClassVar[bool]
  num_classes: int

  @classmethod
  @abc.abstractmethod
  def create(
    cls,
    config: ConfigDict,
    num_classes: int,
    class_weights: np.ndarray | None = None,
  ) -> "Objective":
    """Returns the objective of a run.

    Args:
      config: the whole configuration.
      num_classes: k.
      class_weights: float32 [k], by which the loss of each class counts; None counts
        all alike.
    """

  @classmethod
  def model_kwargs(cls, config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `create_model` that say which head there is."""
    del config
    return {}

  # --- What a step computes: pure and jit-able.

  @abc.abstractmethod
  def inputs(self, batch: Batch, key: Array) -> tuple[Array, Any, str | None]:
    """Returns what a train step applies the model to, and what it shall learn.

    Args:
      batch: from `train_batches`.
      key: of this step, for what mixes images.

    Returns:
      (inputs, targets, the model's method that takes them; None is `__call__`).
    """

  @abc.abstractmethod
  def loss(self, output: Any, targets: Any) -> Array:
    """Returns the mean loss of a batch, in nats, float32 [].

    Args:
      output: of the model in training.
      targets: from `inputs`.
    """

  @abc.abstractmethod
  def accuracy(self, output: Any, batch: Batch) -> Array:
    """Returns the share of a train batch's targets that are met, float32 []."""

  @abc.abstractmethod
  def eval_inputs(self, images: Array, image_size: int) -> Array:
    """Returns what evaluation applies the model to: [b, h, w, 3], normalised.

    Args:
      images: of a batch, uint8.
      image_size: side of the model's input in pixels.
    """

  @abc.abstractmethod
  def outcome(self, output: Any, batch: Batch) -> Any:
    """Returns what `evaluate` takes of a batch of evaluation.

    Args:
      output: of the model in evaluation.
      batch: that it was applied to, with a "mask".
    """

  # --- What steps are fed.

  @abc.abstractmethod
  def train_batches(
    self,
    examples: Any,
    *,
    batch_size: int,
    seed: int,
    image_size: int,
    start_step: int,
    sharding: jax.sharding.Sharding | None,
    balanced_classes: int = 0,
  ) -> Iterator[Batch]:
    """Yields batches for ever; batch t depends on the examples, the seed and t alone.

    Args:
      examples: a split, or its images or features on the devices.
      batch_size: number of examples in a batch, b, over all devices and processes.
      seed: of the order and of all that is drawn.
      image_size: side of the model's input in pixels.
      start_step: the first step to yield.
      sharding: of a batch, by its leading axis.
      balanced_classes: number of classes that are shown alike; 0 with uniform sampling.
    """

  @abc.abstractmethod
  def eval_batches(
    self,
    split: Split,
    *,
    batch_size: int,
    image_size: int,
    sharding: jax.sharding.Sharding | None,
  ) -> Any:
    """Returns all examples of a split once, in the form that `evaluate` takes.

    Args:
      split: the examples.
      batch_size: of what the model is applied to, over all devices and processes.
      image_size: side of the model's input in pixels.
      sharding: of a batch, by its leading axis.
    """

  @abc.abstractmethod
  def abstract_targets(self, batch_size: int, side: int) -> dict[str, Any]:
    """Returns shapes and types of a batch's targets, by their names in it.

    Args:
      batch_size: number of images.
      side: of each in pixels.
    """

  # --- What a model is worth.

  @abc.abstractmethod
  def evaluate(self, eval_step: Callable[[Batch], Any], batches: Any) -> dict[str, Any]:
    """Returns what a model is worth on a split: METRIC, "num_examples" and more.

    Args:
      eval_step: jitted; maps a batch with a "mask" to its `outcome`.
      batches: from `eval_batches`.

    Raises:
      ValueError: there is nothing to evaluate.
    """

  @abc.abstractmethod
  def scalars(self, found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of what `evaluate` found that are logged while training."""

  @abc.abstractmethod
  def by_class(
    self,
    found: Mapping[str, Any],
    class_names: Sequence[str],
    train_count: Sequence[int],
    *,
    ordered: bool = False,
  ) -> dict[str, Any]:
    """Returns what `evaluate` found of the classes, as result.json keeps it.

    Args:
      found: what `evaluate` returned.
      class_names: one name per class.
      train_count: how much there was of each class to train on.
      ordered: whether the classes are grades.
    """
