"""What is computed in a step: pure functions of state and batch.

`create_step_functions` makes them for a model. They are jitted by `program.Program`; a
search maps them over several trials first (`search.population`).
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict
import optax

from insvp_jax import trees
from insvp_jax.data import preprocess, resident
from insvp_jax.models import quantized
from insvp_jax.models.classifier import PromptedClassifier, block_reads
from insvp_jax.train import microbatch
from insvp_jax.train.objectives import Objective
from insvp_jax.train.optim import Schedule
from insvp_jax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]
# Metrics of a train step that have to be finite; "step" says which step they are of.
METRICS = ("loss", "accuracy", "grad_norm", "param_norm")


@dataclasses.dataclass(frozen=True)
class StepFunctions:
  """The pure functions of one model, to be compiled as parts of programs.

  Attributes:
    train: `(state, batch) -> (state, metrics)`; see `create_train_step`.
    evaluate: `(params, batch, hparams) -> outcome`; see `create_eval_step`.
    features: `(params, batch) -> features`; see `create_feature_step`.
    route: `(params, batch) -> route`, int32 [b]; see `PromptedClassifier.route`.
    make_batch: `(arrays, order, seed, step) -> batch` of examples that live on the
      devices; see `resident.take_batch`.
    measures: names of the metrics that the method adds; see `Method.measures`.
  """

  train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  evaluate: Callable[..., Any]
  features: Callable[[Mapping[str, Any], Batch], Array]
  route: Callable[[Mapping[str, Any], Batch], Array]
  make_batch: Callable[..., Batch]
  measures: tuple[str, ...] = ()


def create_step_functions(
  model: PromptedClassifier,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  mask: Mapping[str, Any],
  config: ConfigDict,
  objective: Objective,
  num_parts: int = 1,
) -> StepFunctions:
  """Returns the functions that train and evaluate a model.

  Args:
    model: the classifier.
    optimizer: from `optim.create_optimizer`.
    schedule: from `optim.create_schedule`.
    mask: bool tree, True where trainable.
    config: the whole configuration.
    objective: of the task.
    num_parts: as for `create_train_step`.
  """
  preset = preprocess.get_preset(config.data.preset)
  train_step = create_train_step(
    model,
    optimizer,
    schedule,
    mask,
    objective=objective,
    head_lr=config.optim.head_lr,
    num_parts=num_parts,
  )
  return StepFunctions(
    # Traced once for all programs that it is part of.
    train=jax.jit(train_step, inline=True),
    evaluate=create_eval_step(model, objective=objective),
    features=create_feature_step(model, preset=preset),
    route=create_route_step(model, preset=preset),
    make_batch=functools.partial(
      resident.take_batch,
      batch_size=config.batch_size,
      preset=preset,
      image_size=model.input_size,
    ),
    measures=model.prompter.measures(),
  )


def create_train_step(
  model: PromptedClassifier,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  mask: Mapping[str, Any],
  *,
  objective: Objective,
  head_lr: float = 0.0,
  num_parts: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `train_step(state, batch) -> (state, metrics)`, to be jitted.

  The gradient is taken with respect to the trainable sub-tree alone, so that no
  frozen weight's gradient is ever computed, whatever is logged.

  Args:
    model: the classifier.
    optimizer: over the full tree of parameters, from `optim.create_optimizer`.
    schedule: from `optim.create_schedule`.
    mask: bool tree, True where trainable.
    objective: of the task: inputs, targets and loss.
    head_lr: as for `update_params`.
    num_parts: in which a batch of images is computed, one after the other; see
      `microbatch`. The metrics are means over all of them, of `measures` the largest.

  Returns:
    A pure function of batches from `Objective.train_batches`, with a "route" where that
    is known (see `PromptedClassifier.route`). Its metrics are scalars: loss (mean, in
    nats), accuracy (against targets that are not mixed, in [0, 1]), grad_norm (of the
    trainable leaves), param_norm (of the same leaves after the update), all float32,
    and step (int32, counted from 1); and the method's `measures`,
    the largest entry of each.
  """
  measures = model.prompter.measures()
  sown_collections = ["reads", "updated", *["measures"] * bool(measures)]

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.rng, state.step)
    # The first of the three keys belongs to the input pipeline, for crops and flips.
    _, mix_key, dropout_key = jax.random.split(key, 3)
    inputs, targets, method = objective.inputs(batch, mix_key)
    trainable, frozen = trees.split(state.params, mask)
    # What else is known of each image: labels or masks; the route, which too stands for
    # images only where nothing is mixed (see features.py).
    known = {k: v for k, v in batch.items() if k not in ("images", "features")}

    def loss_fn(trainable, frozen, part, key):
      inputs, targets, known = part
      params = trees.merge(trainable, frozen)
      output, sown = model.apply(
        _variables(model, params, state.hparams),
        inputs,
        train=True,
        rngs={"dropout": key},
        mutable=sown_collections,
        method=method,
        **({"route": known["route"]} if "route" in known else {}),
      )
      value = objective.loss(output, targets)
      # Of a method's own loss only where a target is that of an image.
      if "reads" in sown and objective.ONE_FEATURE:
        reads = block_reads(sown["reads"])
        prompter = params.get("prompter", {})
        value += model.prompter.extra_loss(prompter, reads, targets)
      updated = trees.flatten(sown.get("updated", {}))
      found = trees.flatten(sown.get("measures", {}))
      measured = {name: jnp.max(found[name]) for name in measures}
      return value, (objective.accuracy(output, known), measured, updated)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if num_parts > 1 and "features" not in batch:
      gradient = microbatch.mean_gradient(gradient, num_parts)
    (value, (accuracy, measured, updated)), grads = gradient(
      trainable, frozen, (inputs, targets, known), dropout_key
    )
    trainable, opt_state = update_params(
      optimizer, schedule, mask, state, grads, model.prompter.adjust_updates, head_lr
    )
    frozen = {**frozen, **updated}
    state = state.replace(
      step=state.step + 1, params=trees.merge(trainable, frozen), opt_state=opt_state
    )
    metrics = {
      "loss": value,
      "accuracy": accuracy,
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(trainable),
      "step": state.step,
      **measured,
    }
    return state, metrics

  return train_step


def update_params(
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  mask: Mapping[str, Any],
  state: TrainState,
  grads: Mapping[str, Any],
  adjust_updates: Callable[..., Mapping[str, Any]] | None = None,
  head_lr: float = 0.0,
) -> tuple[dict[str, Any], Any]:
  """Returns the trainable leaves, by name, and the optimizer's state after an update.

  Args:
    optimizer: as for `create_train_step`, as are `schedule` and `mask`.
    schedule: the factor of the peak lr, by train step.
    mask: bool tree, True where trainable.
    state: before the update.
    grads: gradients of the trainable leaves, by name.
    adjust_updates: the method's; see `Method.adjust_updates`.
    head_lr: the head's peak lr; 0 is that of the state.
  """
  trainable, frozen = trees.split(state.params, mask)
  # optax sees the whole tree; the zeros stand for gradients that nobody computes.
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  weight_decay = {} if state.wd is None else {"wd": state.wd}
  updates, opt_state = optimizer.update(
    trees.merge(grads, zeros), state.opt_state, state.params, **weight_decay
  )
  updates, _ = trees.split(updates, mask)
  factor = schedule(state.step)
  # Two products: the peak lr differs from trial to trial, the factor does not.
  heads = {name for name in updates if name.startswith("head/")}
  updates = {
    name: u * factor * (head_lr if head_lr and name in heads else state.peak_lr)
    for name, u in updates.items()
  }
  if adjust_updates is not None:
    lr = factor * state.peak_lr
    updates = adjust_updates(updates, params=trainable, grads=grads, lr=lr)
  return optax.apply_updates(trainable, updates), opt_state


def create_eval_step(
  model: PromptedClassifier, *, objective: Objective
) -> Callable[..., Any]:
  """Returns `eval_step(params, batch, hparams=None) -> outcome`.

  Args:
    model: the classifier.
    objective: of the task, whose `outcome` it is.
  """

  def eval_step(
    params: Mapping[str, Any], batch: Batch, hparams: Mapping[str, Any] | None = None
  ) -> Any:
    variables = _variables(model, params, hparams)
    if "features" in batch:
      output = model.apply(variables, batch["features"], method="classify")
    else:
      known = {"route": batch["route"]} if "route" in batch else {}
      images = objective.eval_inputs(batch["images"], model.input_size)
      output = model.apply(variables, images, **known)
    return objective.outcome(output, batch)

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


def create_route_step(
  model: PromptedClassifier, *, preset: preprocess.Preset
) -> Callable[..., Array]:
  """Returns `route_step(params, batch) -> route`, int32 [b]."""

  def route_step(params: Mapping[str, Any], batch: Batch) -> Array:
    images = _eval_images(model, preset, batch)
    return model.apply({"params": params}, images, method="route")

  return route_step


def create_multi_step(
  functions: StepFunctions,
  carried: Mapping[str, Any],
  *,
  batch_size: int,
  sharding: jax.sharding.Sharding,
  balanced_classes: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns `multi_step(state, arrays, seed, count) -> (state, metrics)`.

  It takes `count` steps (int32 [], at least 1) on examples that live on the devices:
  `arrays` holds all of them (see `resident.take_batch`) and `seed` (uint32 []) decides
  their order. One compiled program serves any count, which is data, so how a run is
  divided into calls changes no bit of its result.

  Args:
    functions: of the model.
    carried: bool tree, True for the parameters that a step changes.
    batch_size: b.
    sharding: of a batch.
    balanced_classes: as for `resident.epoch_order`.

  Returns:
    A pure function. Its metrics are those of the first step whose metrics are not all
    finite, or else of the last step; "step" in them says which. Where the state is that
    of m trials, each metric is [m].
  """

  def multi_step(state: TrainState, arrays: Mapping, seed: Any, count: Any):
    num_examples = arrays["labels"].shape[0]
    steps_per_epoch = num_examples // batch_size
    # Frozen leaves stay out of the loop's carry, so that XLA need not find out that
    # they never change.
    changing, frozen = trees.split(state.params, carried)

    def order_at(step):
      return resident.epoch_order(
        seed,
        step // steps_per_epoch,
        num_examples,
        labels=arrays["labels"],
        balanced_classes=balanced_classes,
      )

    def body(_, carry):
      state, order, metrics = carry
      # A new epoch has a new order; within an epoch it is carried along.
      order = jax.lax.cond(
        state.step % steps_per_epoch == 0,
        lambda: order_at(state.step),
        lambda: order,
      )
      batch = functions.make_batch(arrays, order, seed, state.step)
      batch = jax.lax.with_sharding_constraint(batch, sharding)
      weights, step = quantized.hold(frozen, state.step)
      full_state = state.replace(params=trees.merge(state.params, weights), step=step)
      full_state, new_metrics = functions.train(full_state, batch)
      state = full_state.replace(params=trees.split(full_state.params, carried)[0])
      # Once metrics are not finite they stay: [] or, of m trials, [m].
      is_finite = jnp.all(
        jnp.stack([jnp.isfinite(metrics[n]) for n in METRICS]), axis=0
      )
      metrics = {
        name: jnp.where(is_finite, new_metrics[name], value)
        for name, value in metrics.items()
      }
      return state, order, metrics

    zeros = jnp.zeros(jnp.shape(state.peak_lr), jnp.float32)
    names = (*METRICS, *functions.measures)
    metrics = {**dict.fromkeys(names, zeros), "step": zeros.astype(jnp.int32)}
    carry = (state.replace(params=changing), order_at(state.step), metrics)
    state, _, metrics = jax.lax.fori_loop(0, count, body, carry)
    return state.replace(params=trees.merge(state.params, frozen)), metrics

  return multi_step


def _eval_images(model: PromptedClassifier, preset, batch: Batch) -> Array:
  """Returns the backbone's input [b, h, w, 3] where nothing is drawn at random."""
  size = model.input_size
  return preprocess.eval_preprocess(preset, batch["images"], size)


def _variables(
  model: PromptedClassifier,
  params: Mapping[str, Any],
  hparams: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Returns the Flax variables that the model is applied to."""
  if not hparams:
    return {"params": params}
  placed = model.prompter.place_hparams(hparams)
  return {"params": params, "hparams": {"prompter": placed}}
