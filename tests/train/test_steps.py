"""What a step may change, and what it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.config import defaults
from insvp_jax.data.preprocess import PRESETS, normalise
from insvp_jax.models.classifier import create_model
from insvp_jax.train import losses, optim, steps
from insvp_jax.train import state as state_lib
from insvp_jax.train.objectives import Classification

TINY = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}
BATCH = 4


def setup(
  method="insvp", *, backbone="mu/4", image_size=16, tiny=TINY, **method_kwargs
):
  """Returns (model, mask, optimizer, train step) with real initial parameters."""
  class_weights = method_kwargs.pop("class_weights", None)
  model = create_model(
    backbone,
    method,
    num_classes=5,
    image_size=image_size,
    backbone_kwargs=tiny,
    method_kwargs=method_kwargs,
    head_init="torch",
  )
  config = defaults()
  x = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  schedule = optim.create_schedule(config.optim, total_steps=10, steps_per_epoch=5)
  optimizer = optim.create_optimizer(config.optim, shapes, mask)
  step = steps.create_train_step(
    model,
    optimizer,
    schedule,
    mask,
    objective=Classification(5, PRESETS["vtab"], config.loss.to_dict(), class_weights),
  )
  return model, mask, optimizer, step


@functools.cache
def compiled(method):
  """Returns (model, mask, optimizer, jitted train step) of a method as it comes."""
  model, mask, optimizer, step = setup(method)
  return model, mask, optimizer, jax.jit(step)


def batch_of(image_size=16):
  rng = np.random.default_rng(0)
  return {
    "images": rng.integers(0, 256, (BATCH, image_size, image_size, 3), np.uint8),
    "labels": np.arange(BATCH, dtype=np.int32) % 5,
  }


@functools.cache
def backbone_params():
  """Drawn once for all models: random numbers take longest to compile."""
  return state_lib.init_params(setup("linear")[0], seed=0)["backbone"]


def _state(params, optimizer):
  return state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    rng=jax.random.key(1),
    peak_lr=jnp.float32(1e-2),
  )


def state_of(model, optimizer):
  """Returns the state of a model on the tiny backbone."""
  params = state_lib.init_params(model, seed=0, weights=backbone_params())
  # In one program: each operation outside of one is compiled by itself.
  return jax.jit(functools.partial(_state, optimizer=optimizer))(params)


def state_shapes(model, optimizer):
  """Returns the state of any model without its values."""
  params = state_lib.param_shapes(model)
  return jax.eval_shape(functools.partial(_state, optimizer=optimizer), params)


# For every method, by SGD: test_every_method.py.
@pytest.mark.parametrize("method", ["insvp", "bias"])
def test_frozen_stays_bit_for_bit_and_trainable_moves_within_two_steps(method):
  model, mask, optimizer, step = compiled(method)
  state = state_of(model, optimizer)
  # The sign of a negative zero is the first thing that careless updates lose.
  state.params["backbone"]["pos_embedding"] *= -0.0
  before = jax.device_get(trees.flatten(state.params))
  for _ in range(2):
    state, metrics = step(state, batch_of())
  after = jax.device_get(trees.flatten(state.params))
  for name, trainable in trees.flatten(mask).items():
    # The softmax does not see a bias of the keys; only rounding ever moves it.
    if trainable and name.endswith("key/bias"):
      continue
    same = before[name].tobytes() == after[name].tobytes()
    assert same != trainable, f"{name}: trainable {trainable}, unchanged {same}"
  assert int(state.step) == 2
  assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0


def test_no_optimizer_state_for_frozen_leaves():
  model, mask, optimizer, _ = compiled("insvp")
  state = state_shapes(model, optimizer)
  trainable, _ = trees.split(state.params, mask)
  moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  counters = 4
  assert moments <= 2 * trees.count(trainable) + counters


def test_the_step_descends_its_own_loss():
  model, _, optimizer, step = compiled("insvp")
  state = state_of(model, optimizer)
  values = []
  for _ in range(8):
    state, metrics = step(state, batch_of())
    values.append(float(metrics["loss"]))
  assert values[-1] < 0.8 * values[0]


def test_the_gradient_is_that_of_the_mean_cross_entropy():
  """One SGD step of the compiled train step against autodiff written out here."""
  model, mask, optimizer, step = setup("vpt_deep", prompt_length=3, dropout=0.0)
  state = state_of(model, optimizer)
  _, metrics = jax.jit(step)(state, batch_of())
  data = batch_of()
  images = jnp.asarray(data["images"], jnp.float32) / 127.5 - 1

  def loss(params):
    logits = model.apply({"params": params}, images)
    targets = losses.targets(jnp.asarray(data["labels"]), 5)
    return jnp.mean(losses.cross_entropy(logits, targets))

  value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
  trainable, _ = trees.split(grads, mask)
  norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in trainable.values()))
  assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_class_weights_weigh_the_gradient_of_each_example():
  weights = losses.class_weights(np.array([1, 3, 0, 2, 2]))
  np.testing.assert_allclose(weights, [2, 2 / 3, 0, 1, 1], rtol=1e-6)
  model, _, optimizer, step = setup("linear", class_weights=weights)
  data = batch_of()
  state = state_of(model, optimizer)
  _, metrics = jax.jit(step)(state, data)

  @jax.jit
  def cross_entropy(params, images, labels):
    logits = model.apply({"params": params}, normalise(PRESETS["vtab"], images))
    return losses.cross_entropy(logits, losses.targets(labels, 5))

  nats = cross_entropy(state.params, data["images"], data["labels"])
  nats = np.asarray(nats) * weights[data["labels"]]
  assert float(metrics["loss"]) == pytest.approx(float(nats.mean()), rel=1e-5)


def test_eval_step_ignores_padding():
  model, _, optimizer, _ = compiled("insvp")
  state = state_of(model, optimizer)
  objective = Classification(5, PRESETS["vtab"], {})
  evaluate = jax.jit(steps.create_eval_step(model, objective=objective))
  data = {k: np.concatenate([v, v]) for k, v in batch_of().items()}
  mask = np.ones(2 * BATCH, np.float32)
  whole = evaluate(state.params, {**data, "mask": mask})
  half = evaluate(state.params, {**data, "mask": mask * (np.arange(8) < 4)})
  for name in ("accuracy", "loss"):
    assert (int(whole[name].count), int(half[name].count)) == (8, 4)
    assert float(whole[name].compute()) == pytest.approx(float(half[name].compute()))
  # Sums of each class, of which a confusion matrix has the same.
  images = normalise(PRESETS["vtab"], jnp.asarray(data["images"][:4]))
  guesses = np.argmax(jax.jit(model.apply)({"params": state.params}, images), axis=-1)
  sums = half["class_prediction"]
  np.testing.assert_array_equal(sums.count, np.bincount(guesses, minlength=5))
  by_label = np.zeros(5, int)
  np.add.at(by_label, data["labels"][:4], guesses)
  np.testing.assert_array_equal(sums.total, by_label)


def test_a_head_may_have_its_own_lr():
  params = {"head": {"bias": jnp.ones(2)}, "prompter": {"up": jnp.ones(3)}}
  mask = jax.tree.map(lambda _: True, params)
  config = defaults()
  config.optim.name, config.optim.momentum, config.optim.wd = "sgd", 0.0, 0.0
  optimizer = optim.create_optimizer(config.optim, params, mask)
  opt_state = optimizer.init(params)
  state = state_lib.TrainState(0, params, opt_state, None, jnp.float32(4.0))
  grads = jax.tree.map(jnp.ones_like, trees.flatten(params))
  for head_lr, expected in ((0.0, 4.0), (0.1, 0.1)):
    moved, _ = steps.update_params(
      optimizer, lambda step: 0.5, mask, state, grads, head_lr=head_lr
    )
    np.testing.assert_allclose(moved["prompter/up"], 1 - 0.5 * 4.0)
    np.testing.assert_allclose(moved["head/bias"], 1 - 0.5 * expected, rtol=1e-6)
