"""The train and the eval step: pure functions of state and batch."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array
import optax

from insvp_jax import trees
from insvp_jax.data import preprocess
from insvp_jax.models.classifier import PromptedClassifier
from insvp_jax.train import losses

Batch = dict[str, Array]
Metrics = dict[str, Array]
METRICS = ("loss", "accuracy", "grad_norm", "param_norm")  # of a train step


@flax.struct.dataclass
class TrainState:
  """All that changes while training.

  The annotations are wide because JAX's transformations put shapes, shardings and
  masks where the arrays are.

  Attributes:
    step: number of batches seen, int32 [].
    params: {"backbone", "prompter", "head"}, trainable and frozen together.
    opt_state: of the trainable leaves only.
    rng: the run's typed key; step s draws from fold_in(rng, s).
    peak_lr: float32 []; multiplies the schedule, which is normalised to a peak of 1.
      As data rather than a constant it lets one compiled step serve a whole search.
    wd: float32 []; the weight decay. None leaves it the optimizer's own constant.
    numbers: {name: float32 [] or [2]} of the method's fields that are data (see
      `Method.hparam`), and `num_classes`, int32 [], of a head that may be wider (see
      `Head`). None or {} for none.
  """

  step: Any
  params: Any
  opt_state: Any
  rng: Any
  peak_lr: Any
  wd: Any = None
  numbers: Any = None


def create_train_step(
  model: PromptedClassifier,
  optimizer: optax.GradientTransformation,
  mask: Mapping[str, Any],
  *,
  preset: preprocess.Preset,
  loss: Mapping[str, Any],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `train_step(state, batch) -> (state, metrics)`, to be jitted.

  The gradient is taken with respect to the trainable sub-tree alone, so that no
  frozen weight's gradient is ever computed, whatever is logged.

  Args:
    model: the classifier.
    optimizer: over the full tree, from `optim.create_optimizer` with a peak lr of 1.
    mask: bool tree, True where trainable.
    preset: how uint8 images become the backbone's input.
    loss: the config's `loss` section.

  Returns:
    A pure function of batches {"images" or "features", "labels"}; metrics are float32
    scalars: loss (mean, in nats), accuracy (against the unmixed labels, in [0, 1]),
    grad_norm (of the trainable leaves) and param_norm (of the same leaves after the
    update).
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.rng, state.step)
    # The first one is the pipeline's, for crops and flips.
    _, mix_key, dropout_key = jax.random.split(key, 3)
    targets = losses.targets(
      batch["labels"],
      model.head.num_classes,
      loss["label_smoothing"],
      (state.numbers or {}).get("num_classes"),
    )
    # Features stand for images only where nothing is mixed.
    if "features" not in batch:
      images, targets = losses.mix(
        mix_key,
        preprocess.normalise(preset, batch["images"]),
        targets,
        mixup_alpha=loss["mixup_alpha"],
        cutmix_alpha=loss["cutmix_alpha"],
        prob=loss["mix_prob"],
        switch_prob=loss["mix_switch_prob"],
      )
    trainable, frozen = trees.split(state.params, mask)

    def loss_fn(trainable):
      params = trees.merge(trainable, frozen)
      variables = _variables(params, state.numbers)
      if "features" in batch:
        logits = model.apply(variables, batch["features"], method="classify")
      else:
        rngs = {"dropout": dropout_key}
        logits = model.apply(variables, images, train=True, rngs=rngs)
      return jnp.mean(losses.cross_entropy(logits, targets)), logits

    (value, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    trainable, opt_state = update(optimizer, mask, state, grads)
    correct = jnp.argmax(logits, axis=-1) == batch["labels"]
    metrics = {
      "loss": value,
      "accuracy": jnp.mean(correct.astype(jnp.float32)),
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(trainable),
    }
    state = state.replace(
      step=state.step + 1, params=trees.merge(trainable, frozen), opt_state=opt_state
    )
    return state, metrics

  return train_step


def update(
  optimizer: optax.GradientTransformation,
  mask: Mapping[str, Any],
  state: TrainState,
  grads: Mapping[str, Any],
) -> tuple[dict[str, Any], Any]:
  """Returns the trainable leaves by name, and the optimizer's state, after an update.

  Args:
    optimizer: as for `create_train_step`, as is `mask`.
    mask: bool tree, True where trainable.
    state: before the update.
    grads: of the trainable leaves, by name.
  """
  trainable, frozen = trees.split(state.params, mask)
  # optax sees the whole tree; the zeros stand for gradients nobody computes.
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  decay = {} if state.wd is None else {"wd": state.wd}
  updates, opt_state = optimizer.update(
    trees.merge(grads, zeros), state.opt_state, state.params, **decay
  )
  updates, _ = trees.split(updates, mask)
  updates = jax.tree.map(lambda change: change * state.peak_lr, updates)
  return optax.apply_updates(trainable, updates), opt_state


def create_eval_step(
  model: PromptedClassifier, *, preset: preprocess.Preset
) -> Callable[..., Metrics]:
  """Returns `eval_step(params, batch, numbers=None) -> sums over unmasked examples`.

  The sums are `correct` and `count` (int32) and `loss` (float32, in nats); padding
  has mask 0 and adds nothing to any of them.
  """

  def eval_step(
    params: Mapping[str, Any], batch: Batch, numbers: Mapping[str, Any] | None = None
  ) -> Metrics:
    variables = _variables(params, numbers)
    if "features" in batch:
      logits = model.apply(variables, batch["features"], method="classify")
    else:
      logits = model.apply(variables, _eval_images(model, preset, batch))
    targets = losses.targets(batch["labels"], model.head.num_classes)
    real = batch["mask"] > 0
    correct = (jnp.argmax(logits, axis=-1) == batch["labels"]) & real
    nats = jnp.where(real, losses.cross_entropy(logits, targets), 0.0)
    return {
      "correct": jnp.sum(correct.astype(jnp.int32)),
      "count": jnp.sum(real.astype(jnp.int32)),
      "loss": jnp.sum(nats),
    }

  return eval_step


def create_feature_step(
  model: PromptedClassifier, *, preset: preprocess.Preset
) -> Callable[..., Array]:
  """Returns `feature_step(params, batch) -> features`, float32 [b, d]."""

  def feature_step(params: Mapping[str, Any], batch: Batch) -> Array:
    images = _eval_images(model, preset, batch)
    features = model.apply({"params": params}, images, method="features")
    return features.astype(jnp.float32)

  return feature_step


def _eval_images(model, preset, batch: Batch) -> Array:
  """Returns the backbone's input where nothing is drawn at random."""
  size = model.backbone.image_size
  return preprocess.eval_preprocess(preset, batch["images"], size)


def _variables(
  params: Mapping[str, Any], numbers: Mapping[str, Any] | None
) -> dict[str, Any]:
  """Returns what the model is applied to."""
  groups: dict[str, Any] = {}
  for name, value in (numbers or {}).items():
    group = "head" if name == "num_classes" else "prompter"
    groups.setdefault(group, {})[name] = value
  return {"params": params, "hparams": groups} if groups else {"params": params}
