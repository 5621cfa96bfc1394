"""One class for an image: cross-entropy, and accuracy."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

from clu.metrics import Average
import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax.data import pipeline, preprocess
from insvp_jax.data.splits import Split
from insvp_jax.train import evaluate, losses
from insvp_jax.train.objectives.base import Batch, Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Classification(Objective):
  """Images with one label each.

  Attributes:
    num_classes: k.
    preset: how images become inputs.
    settings: the config's section `loss`.
    class_weights: float32 [k], by which the loss of an example of each class counts; of
      a mixed target their mean. None counts all alike.
  """

  METRIC: ClassVar[str] = "accuracy"
  TITLE: ClassVar[str] = "accuracy"
  ONE_FEATURE: ClassVar[bool] = True

  num_classes: int
  preset: preprocess.Preset
  settings: Mapping[str, Any]
  class_weights: np.ndarray | None = None

  @classmethod
  def create(
    cls,
    config: ConfigDict,
    num_classes: int,
    class_weights: np.ndarray | None = None,
  ) -> "Classification":
    preset = preprocess.get_preset(config.data.preset)
    return cls(num_classes, preset, config.loss.to_dict(), class_weights)

  def inputs(self, batch: Batch, key: Array) -> tuple[Array, Any, str | None]:
    settings = self.settings
    targets = losses.targets(
      batch["labels"], self.num_classes, settings["label_smoothing"]
    )
    # Features stand for images only where nothing is mixed (see features.py).
    if "features" in batch:
      return batch["features"], targets, "classify"
    images, targets = losses.mix(
      key,
      preprocess.normalise(self.preset, batch["images"]),
      targets,
      mixup_alpha=settings["mixup_alpha"],
      cutmix_alpha=settings["cutmix_alpha"],
      prob=settings["mix_prob"],
      switch_prob=settings["mix_switch_prob"],
    )
    return images, targets, None

  def loss(self, output: Any, targets: Any) -> Array:
    nats = losses.cross_entropy(output, targets)
    if self.class_weights is not None:
      nats = nats * (targets @ self.class_weights)
    return jnp.mean(nats)

  def accuracy(self, output: Any, batch: Batch) -> Array:
    correct = jnp.argmax(output, axis=-1) == batch["labels"]
    return jnp.mean(correct.astype(jnp.float32))

  def eval_inputs(self, images: Array, image_size: int) -> Array:
    return preprocess.eval_preprocess(self.preset, images, image_size)

  def outcome(self, output: Any, batch: Batch) -> dict[str, Average]:
    """Returns sums over unmasked examples.

    The sums and counts are those of "accuracy" and "loss" (float32, in nats), []; of
    "class_accuracy": the right ones and the number of each class's examples, int32 [k];
    of "class_prediction": the sum of the classes predicted for each class's examples,
    as indices, and how often each class is predicted, int32 [k]. Padding has mask 0 and
    adds nothing to any of them.
    """
    targets = losses.targets(batch["labels"], self.num_classes)
    is_real = batch["mask"] > 0
    predicted = jnp.argmax(output, axis=-1)
    is_correct = predicted == batch["labels"]
    nats = losses.cross_entropy(output, targets)
    # Rows of 0 and 1, whatever the smoothing is in training.
    counts = (targets * is_real[:, None]).astype(jnp.int32)
    guesses = losses.targets(predicted, self.num_classes) * is_real[:, None]
    return {
      "accuracy": Average.from_model_output(is_correct, mask=is_real),
      "loss": Average.from_model_output(nats, mask=is_real),
      "class_accuracy": Average(
        total=jnp.sum(counts * is_correct[:, None], axis=0),
        count=jnp.sum(counts, axis=0),
      ),
      "class_prediction": Average(
        total=jnp.sum(counts * predicted[:, None].astype(jnp.int32), axis=0),
        count=jnp.sum(guesses.astype(jnp.int32), axis=0),
      ),
    }

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
    return pipeline.train_batches(
      examples,
      batch_size=batch_size,
      seed=seed,
      preset=self.preset,
      image_size=image_size,
      start_step=start_step,
      sharding=sharding,
      balanced_classes=balanced_classes,
    )

  def eval_batches(
    self,
    split: Split,
    *,
    batch_size: int,
    image_size: int,
    sharding: jax.sharding.Sharding | None,
  ) -> Iterator[Batch]:
    del image_size
    return pipeline.eval_batches(split, batch_size=batch_size, sharding=sharding)

  def abstract_targets(self, batch_size: int, side: int) -> dict[str, Any]:
    del side
    return {"labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

  def evaluate(
    self, eval_step: Callable[[Batch], Any], batches: Iterable[Any]
  ) -> dict[str, Any]:
    """Returns accuracy, loss and what there is of each class; see `evaluate`."""
    return evaluate.evaluate(eval_step, batches)

  def scalars(self, found: Mapping[str, Any]) -> dict[str, float]:
    return {"accuracy": found["accuracy"], "loss": found["loss"]}

  def by_class(
    self,
    found: Mapping[str, Any],
    class_names: Sequence[str],
    train_count: Sequence[int],
    *,
    ordered: bool = False,
  ) -> dict[str, Any]:
    return evaluate.balanced(found, class_names, train_count, ordered=ordered)
