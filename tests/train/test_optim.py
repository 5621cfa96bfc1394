import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

from insvp_jax import trees
from insvp_jax.train import optim

BASE = dict(
  name="adamw",
  lr=0.1,
  wd=0.01,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  head_lr=0.0,
  momentum=0.9,
  nesterov=False,
  schedule="constant",
  warmup_epochs=0.0,
  warmup_steps=0,
  end_lr_factor=0.0,
  power=0.9,
  grad_clip_norm=0.0,
  accumulate_steps=1,
  no_decay=(),
  lr_scale_by_batch=0,
)
RUN = dict(total_steps=100, steps_per_epoch=10)


def config(**changes):
  return ConfigDict({**BASE, **changes})


def schedule(run=RUN, batch_size=64, **changes):
  """Returns the lr as a function of the train step."""
  conf = config(**changes)
  factor = optim.create_schedule(conf, **run)
  return lambda step: factor(step) * optim.peak_lr(conf, batch_size)


def tree(seed):
  rng = np.random.default_rng(seed)

  def leaf(*shape):
    return jax.device_put(rng.normal(size=shape).astype(np.float32))

  return {
    "backbone": {"kernel": leaf(20, 30), "bias": leaf(30)},
    "prompter": {"prompt": leaf(2, 3)},
    "head": {"kernel": leaf(3, 4), "bias": leaf(4)},
  }


MASK = trees.mask(tree(0), ("prompter/.*", "head/.*"))


def create(lr_by_update=None, **changes):
  """Returns the optimizer with its updates times the lr, as a train step has them."""
  conf = config(**changes)
  lr = lr_by_update or optax.constant_schedule(conf.lr)
  return optax.chain(
    optim.create_optimizer(conf, tree(0), MASK),
    optax.scale_by_schedule(lambda step: lr(step // conf.accumulate_steps)),
  )


def train(tx, gradients):
  """Returns the flat parameters after one step per tree of gradients."""
  params = tree(0)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return trees.flatten(params)


def assert_trees_close(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


# Schedules


def test_constant_is_lr_throughout():
  lr = schedule()
  assert [float(lr(step)) for step in (0, 50, 100)] == pytest.approx([0.1] * 3)


def test_warmup_starts_at_lr_over_w_and_ends_at_lr():
  # InsVP's: lr / W at step 0, lr at W, and no step is lost to lr 0.
  lr = schedule(schedule="cosine", warmup_steps=20)
  assert float(lr(0)) == pytest.approx(0.1 / 20)
  assert float(lr(9)) == pytest.approx(0.1 * 10 / 20)
  assert float(lr(20)) == pytest.approx(0.1)
  assert float(lr(60)) == pytest.approx(0.1 * 0.5)
  assert float(lr(100)) == pytest.approx(0.0, abs=1e-8)


def test_warmup_of_one_step_is_lr_at_once():
  assert float(schedule(warmup_steps=1)(0)) == pytest.approx(0.1)


def test_warmup_epochs_equal_their_steps():
  by_epochs = schedule(schedule="cosine", warmup_epochs=1.5)
  by_steps = schedule(schedule="cosine", warmup_steps=15)
  for step in range(0, 101, 5):
    assert float(by_epochs(step)) == float(by_steps(step))


def test_cosine_ends_at_the_end_factor():
  lr = schedule(schedule="cosine", end_lr_factor=0.1)
  assert float(lr(0)) == pytest.approx(0.1)
  assert float(lr(100)) == pytest.approx(0.01)


def test_polynomial_is_that_of_a_power_and_ends_at_the_end_factor():
  lr = schedule(schedule="polynomial", lr=1.0, end_lr_factor=0.01, warmup_steps=20)
  assert float(lr(9)) == pytest.approx(0.5)
  for step in (20, 40, 90, 100):
    left = 1 - (step - 20) / 80
    assert float(lr(step)) == pytest.approx(0.99 * left**0.9 + 0.01)
  lr = schedule(schedule="polynomial", lr=1.0, power=2)
  assert float(lr(50)) == pytest.approx(0.25)


def test_epochwise_has_the_factors_of_vpt():
  run = dict(total_steps=300, steps_per_epoch=3)
  lr = schedule(run, schedule="cosine_epochwise", lr=1.0, warmup_epochs=10)
  factors = {0: 0.0, 1: 0.1, 9: 0.9, 10: 1.0, 55: 0.5, 99: 0.0003}
  for epoch, factor in factors.items():
    for step in (3 * epoch, 3 * epoch + 2):
      assert float(lr(step)) == pytest.approx(factor, abs=5e-5)


def test_multistep_divides_the_lr_between_epochs():
  run = {"total_steps": 200 * 7, "steps_per_epoch": 7}
  lr = schedule(run, schedule="multistep", lr=1.0)
  epochs = [float(lr(7 * epoch + step)) for epoch in range(200) for step in (0, 6)]
  expected = [1.0] * 200 + [0.1] * 88 + [0.01] * 112
  np.testing.assert_allclose(epochs, expected, rtol=1e-6)


def test_lr_scales_with_the_images_of_an_update():
  assert float(schedule(lr_scale_by_batch=256)(0)) == pytest.approx(0.1 * 64 / 256)
  lr = schedule(lr_scale_by_batch=256, accumulate_steps=4)
  assert float(lr(0)) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["cosine", "cosine_epochwise"])
def test_accumulation_counts_updates(name):
  # 100 small batches, 5 to an update, are 20 updates: the same run in large batches.
  small = schedule(schedule=name, warmup_epochs=2, accumulate_steps=5)
  run = dict(total_steps=20, steps_per_epoch=2)
  large = schedule(run, schedule=name, warmup_epochs=2)
  traced = jax.jit(small)
  for step in range(101):
    expected = pytest.approx(float(large(step // 5)), abs=1e-8)
    assert float(small(step)) == float(traced(jnp.int32(step))) == expected


# Optimizers


@pytest.mark.parametrize("no_decay", [(), (".*/bias", "prompter/.*")])
def test_adamw_equals_numpy(no_decay):
  gradients = [tree(seed) for seed in (1, 2, 3)]
  lrs = [0.1, 0.05, 0.02]
  steps = optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.4})
  actual = train(create(steps, no_decay=no_decay), gradients)
  expected = trees.flatten(tree(0))
  for name in trees.split(expected, trees.flatten(MASK))[0]:
    value = np.asarray(expected[name], np.float64)
    mean = square = np.zeros_like(value)
    excluded = no_decay and (name.endswith("bias") or name.startswith("prompter"))
    for i, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
      g = np.asarray(trees.flatten(gradient)[name], np.float64)
      mean = 0.9 * mean + 0.1 * g
      square = 0.999 * square + 0.001 * g**2
      step = mean / (1 - 0.9**i) / (np.sqrt(square / (1 - 0.999**i)) + 1e-8)
      value = value - lr * (step + (0.0 if excluded else 0.01) * value)
    expected[name] = value
  assert_trees_close(actual, expected)


@pytest.mark.parametrize("momentum,nesterov", [(0.9, False), (0.9, True), (0.0, False)])
def test_sgd_equals_numpy(momentum, nesterov):
  gradients = [tree(seed) for seed in (1, 2, 3)]
  tx = create(name="sgd", momentum=momentum, nesterov=nesterov, no_decay=("head/bias",))
  actual = train(tx, gradients)
  expected = trees.flatten(tree(0))
  for name in trees.split(expected, trees.flatten(MASK))[0]:
    value = np.asarray(expected[name], np.float64)
    velocity = np.zeros_like(value)
    for gradient in gradients:
      # Coupled: the decay is part of the gradient, and so of the momentum.
      g = np.asarray(trees.flatten(gradient)[name], np.float64)
      g = g + (0.0 if name == "head/bias" else 0.01) * value
      velocity = momentum * velocity + g
      value = value - 0.1 * (g + momentum * velocity if nesterov else velocity)
    expected[name] = value
  assert_trees_close(actual, expected)


def test_no_decay_changes_only_its_parameters():
  gradients = [tree(1)]
  decayed = train(create(wd=0.5), gradients)
  partly = train(create(wd=0.5, no_decay=("head/bias",)), gradients)
  different = {n for n in decayed if not np.array_equal(decayed[n], partly[n])}
  assert different == {"head/bias"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_decay_that_comes_as_data_replaces_the_constant(name, accumulate):
  options = dict(name=name, accumulate_steps=accumulate, no_decay=("head/bias",))
  gradients = [tree(seed) for seed in (1, 2, 3, 4)]
  expected = train(create(wd=0.5, **options), gradients)
  tx, params = create(wd=0.0, **options), tree(0)
  state, update = tx.init(params), jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params, wd=jnp.float32(0.5))
    params = optax.apply_updates(params, updates)
  assert_trees_close(trees.flatten(params), expected)
  assert jax.tree.structure(state) == jax.tree.structure(
    create(wd=0.5, **options).init(params)
  )


def test_clip_sees_trainable_gradients_only():
  gradient = tree(1)
  gradient["backbone"] = jax.tree.map(
    lambda g: np.float32(1e6) * np.asarray(g), gradient["backbone"]
  )
  actual = train(
    create(name="sgd", momentum=0.0, wd=0.0, grad_clip_norm=0.5), [gradient]
  )
  trainable, _ = trees.split(jax.device_get(gradient), MASK)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in trainable.values()))
  assert norm > 0.5
  expected = jax.device_get(trees.flatten(tree(0)))
  for name, g in trainable.items():
    expected[name] = expected[name] - 0.1 * g * 0.5 / norm
  assert_trees_close(actual, expected)


def test_a_small_gradient_is_not_clipped():
  plain = train(create(name="sgd"), [tree(1)])
  clipped = train(create(name="sgd", grad_clip_norm=1e6), [tree(1)])
  assert_trees_close(clipped, plain)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_accumulation_equals_one_large_batch(name):
  options = dict(name=name, grad_clip_norm=0.5)
  micro = jax.device_get([tree(seed) for seed in range(1, 7)])
  large = [
    jax.tree.map(lambda *g: sum(g) / 3, *micro[:3]),
    jax.tree.map(lambda *g: sum(g) / 3, *micro[3:]),
  ]
  steps = optax.piecewise_constant_schedule(0.1, {1: 0.1})
  expected = train(create(steps, **options), large)
  actual = train(create(steps, accumulate_steps=3, **options), micro)
  assert_trees_close(actual, expected)
  # Nothing moves before the third micro-batch.
  early = train(create(steps, accumulate_steps=3, **options), micro[:2])
  for name, start in trees.flatten(tree(0)).items():
    np.testing.assert_array_equal(early[name], start)


@pytest.mark.parametrize("name,copies", [("adamw", 2), ("sgd", 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_leaves_have_no_state(name, copies, accumulate):
  tx = create(name=name, accumulate_steps=accumulate, grad_clip_norm=1.0)
  leaves = [x for x in jax.tree.leaves(tx.init(tree(0))) if x.ndim]
  trainable, _ = trees.split(tree(0), MASK)
  per_copy = sum(leaf.size for leaf in trainable.values())
  assert sum(x.size for x in leaves) == per_copy * (copies + (accumulate > 1))
  assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


def test_frozen_updates_are_zero_and_keep_their_dtype():
  params, gradient = tree(0), tree(1)
  for each in (params, gradient):
    each["backbone"] = jax.tree.map(
      lambda x: np.asarray(x, jnp.bfloat16), each["backbone"]
    )
  tx = optim.create_optimizer(config(), params, MASK)

  @jax.jit
  def update(gradient, params):
    return tx.update(gradient, tx.init(params), params)[0]

  updates = jax.device_get(update(gradient, params))
  for update in jax.tree.leaves(updates["backbone"]):
    assert update.dtype == jnp.bfloat16
    assert not np.any(update)
  assert all(np.any(update) for update in jax.tree.leaves(updates["head"]))


def test_optimizer_is_made_from_shapes_alone():
  shapes = jax.eval_shape(lambda: tree(0))
  made = optim.create_optimizer(config(), shapes, MASK)
  expected = optim.create_optimizer(config(), tree(0), MASK)
  assert_trees_close(train(made, [tree(1)]), train(expected, [tree(1)]))


# Errors


@pytest.mark.parametrize(
  "field,value",
  [
    ("lr", -0.1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("wd", -1e-4),
    ("b1", 1.0),
    ("b2", -0.1),
    ("eps", 0.0),
    ("head_lr", -1.0),
    ("momentum", 1.0),
    ("warmup_epochs", -1.0),
    ("warmup_steps", -1),
    ("end_lr_factor", 1.5),
    ("grad_clip_norm", -1.0),
    ("accumulate_steps", 0),
    ("lr_scale_by_batch", -256),
  ],
)
def test_wrong_ranges_are_named(field, value):
  with pytest.raises(ValueError, match=rf"optim\.{field} is {value!r}"):
    optim.check_optim(config(**{field: value}))
  with pytest.raises(ValueError, match=rf"optim\.{field}"):
    schedule(**{field: value})
  with pytest.raises(ValueError, match=rf"optim\.{field}"):
    create(optax.constant_schedule(0.1), **{field: value})


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(name="adanw"), "unknown optimizer 'adanw'.*Did you mean 'adamw'"),
    (dict(schedule="cosin"), "unknown schedule 'cosin'.*Did you mean 'cosine'"),
    (dict(warmup_steps=100), "100 of the run's 100 updates.*must end before"),
    (dict(warmup_epochs=12.0), "120 of the run's 100 updates"),
    (
      dict(warmup_epochs=10, schedule="cosine_epochwise"),
      "10 of the run's 10 epochs",
    ),
    (dict(warmup_epochs=1.5, schedule="cosine_epochwise"), "whole epochs"),
    (dict(warmup_steps=5, schedule="cosine_epochwise"), "whole epochs"),
    (dict(warmup_steps=5, warmup_epochs=1.0), "set one of them to 0"),
    (dict(accumulate_steps=101), "no update would happen"),
    (dict(name="sgd", nesterov=True, momentum=0.0), "nesterov needs"),
  ],
)
def test_wrong_schedules_say_what_is_wrong(changes, message):
  with pytest.raises(ValueError, match=message):
    schedule(**changes)


@pytest.mark.parametrize("name", list(RUN))
def test_wrong_run_lengths_are_named(name):
  with pytest.raises(ValueError, match=f"{name} is 0"):
    schedule({**RUN, name: 0})


def test_no_decay_that_matches_nothing_is_an_error():
  with pytest.raises(ValueError, match="'heads/bias' matches no parameter"):
    create(no_decay=("heads/bias",))
  create(no_decay=("backbone/bias",))  # frozen here, yet a parameter


def test_wrong_masks_are_errors():
  nothing = jax.tree.map(lambda _: False, MASK)
  with pytest.raises(ValueError, match="nothing to train"):
    optim.create_optimizer(config(), tree(0), nothing)
  partial = {"head": MASK["head"], "prompter": MASK["prompter"]}
  with pytest.raises(ValueError, match="backbone/bias"):
    optim.create_optimizer(config(), tree(0), partial)


def test_narrow_trainable_parameters_are_an_error():
  params = tree(0)
  params["head"]["bias"] = params["head"]["bias"].astype(jnp.bfloat16)
  with pytest.raises(ValueError, match="'head/bias' is bfloat16"):
    optim.create_optimizer(config(), params, MASK)
