import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax.train import losses

SEEDS = st.integers(0, 2**31 - 1)
QUICK = settings(max_examples=25, deadline=None)
BOTH = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5, switch_prob=0.5)


@functools.cache
def jitted(**options):
  return jax.jit(functools.partial(losses.mix, **options))


# One program for each size.
cutmix_box = jax.jit(losses.cutmix_box, static_argnums=(1, 2))


@functools.cache
def batch(size=4, dtype=jnp.float32):
  images = np.random.default_rng(1).normal(size=(size, 12, 16, 3))
  return jax.device_put((images.astype(dtype), np.eye(size, dtype=np.float32)))


def test_targets_are_one_hot_without_smoothing():
  expected = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
  rows = losses.targets(jnp.array([2, 0]), 3)
  assert rows.dtype == jnp.float32
  np.testing.assert_array_equal(rows, expected)


def test_smoothed_targets_have_the_published_values():
  rows = losses.targets(jnp.array([1]), 4, 0.1)
  np.testing.assert_allclose(rows, [[0.025, 0.925, 0.025, 0.025]], rtol=1e-6)


@QUICK
@given(
  labels=st.lists(st.integers(0, 6), min_size=1, max_size=5),
  smoothing=st.floats(0.0, 0.95),
)
def test_targets_are_distributions(labels, smoothing):
  rows = np.asarray(losses.targets(jnp.array(labels), 7, smoothing))
  np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-5)
  assert rows.min() >= 0
  np.testing.assert_array_equal(rows.argmax(axis=1), labels)


def test_cross_entropy_equals_numpy():
  logits = np.array([[1.0, 2.0, -1.0], [80.0, 0.0, 0.0]])
  targets = np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
  shifted = logits - logits.max(axis=1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  actual = losses.cross_entropy(
    jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)
  )
  np.testing.assert_allclose(actual, -(targets * log_probs).sum(axis=1), rtol=1e-6)


def test_cross_entropy_of_equal_logits_is_log_k():
  targets = losses.targets(jnp.arange(5), 5, 0.1)
  actual = losses.cross_entropy(jnp.zeros((5, 5)), targets)
  np.testing.assert_allclose(actual, np.log(5), rtol=1e-6)


def test_cross_entropy_of_narrow_logits_is_computed_in_float32():
  logits = jnp.array([[10.0, 0.5, -3.0]], jnp.bfloat16)
  targets = losses.targets(jnp.array([0]), 3)
  loss = losses.cross_entropy(logits, targets)
  assert loss.dtype == jnp.float32
  wide = losses.cross_entropy(logits.astype(jnp.float32), targets)
  np.testing.assert_array_equal(loss, wide)
  assert float(loss[0]) > 0  # bfloat16 would round it away


@pytest.mark.parametrize(
  "options", [dict(mixup_alpha=0, cutmix_alpha=0), dict(BOTH, prob=0)]
)
def test_mix_that_is_off_touches_nothing(options):
  images, targets = batch()
  key = jax.random.key(0)
  mixed = losses.mix(key, images, targets, **options)
  assert mixed[0] is images and mixed[1] is targets
  jaxpr = jax.make_jaxpr(functools.partial(losses.mix, **options))(key, images, targets)
  assert not jaxpr.eqns


@QUICK
@given(seed=SEEDS, smoothing=st.sampled_from([0.0, 0.1]))
def test_mixed_targets_stay_distributions(seed, smoothing):
  images, targets = batch()
  targets = (1 - smoothing) * np.asarray(targets) + np.float32(smoothing / 4)
  _, mixed = jitted(**BOTH)(jax.random.key(seed), images, targets)
  mixed = np.asarray(mixed)
  np.testing.assert_allclose(np.sum(mixed, axis=1), 1.0, rtol=1e-5)
  assert np.min(mixed) >= 0


@QUICK
@given(seed=SEEDS, dtype=st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_mixed_images_are_between_image_and_partner(seed, dtype):
  images, targets = batch(dtype=dtype)
  mixed, _ = jitted(**BOTH)(jax.random.key(seed), images, targets)
  assert mixed.dtype == dtype and mixed.shape == images.shape
  one, mixed = (np.asarray(x, np.float32) for x in (images, mixed))
  other = one[::-1]
  assert np.all(mixed >= np.minimum(one, other) - 1e-5)
  assert np.all(mixed <= np.maximum(one, other) + 1e-5)


@QUICK
@given(seed=SEEDS, options=st.sampled_from([(0.2, 4), (2.0, 3)]))
def test_mixup_blends_images_and_targets_by_one_lambda(seed, options):
  alpha, size = options
  images, targets = batch(size)
  mix = jitted(mixup_alpha=alpha, cutmix_alpha=0.0, prob=1.0)
  mixed, mixed_targets = mix(jax.random.key(seed), images, targets)
  images, mixed_targets = np.asarray(images), np.asarray(mixed_targets)
  share = mixed_targets[0, 0]
  np.testing.assert_allclose(mixed_targets[0, -1], 1 - share, atol=1e-6)
  expected = share * images + (1 - share) * images[::-1]
  np.testing.assert_allclose(mixed, expected, atol=1e-5)


@QUICK
@given(seed=SEEDS, alpha=st.sampled_from([0.5, 3.0]))
def test_cutmix_pastes_a_box_and_lambda_is_its_true_area(seed, alpha):
  images, targets = batch()
  mix = jitted(mixup_alpha=0.0, cutmix_alpha=alpha, prob=1.0)
  mixed, mixed_targets = mix(jax.random.key(seed), images, targets)
  images, mixed, mixed_targets = map(np.asarray, (images, mixed, mixed_targets))
  own = np.all(mixed == images, axis=(0, 3))
  partner = np.all(mixed == images[::-1], axis=(0, 3))
  assert np.all(own ^ partner)
  rows, columns = partner.any(axis=1), partner.any(axis=0)
  np.testing.assert_array_equal(partner, rows[:, None] & columns[None, :])
  for side in (rows, columns):  # one run of pixels: a box
    assert np.count_nonzero(np.diff(side.astype(int))) <= 2
  np.testing.assert_allclose(mixed_targets[0, 0], own.mean(), atol=1e-6)


@QUICK
@given(seed=SEEDS, share=st.floats(0.0, 1.0))
def test_cutmix_box_is_never_larger_than_drawn(seed, share):
  box = cutmix_box(jax.random.key(seed), 12, 20, np.float32(share))
  height, width = 12 * np.sqrt(1 - share), 20 * np.sqrt(1 - share)
  inside = np.asarray(box) == 0
  assert inside.any(axis=1).sum() <= height + 1e-3
  assert inside.any(axis=0).sum() <= width + 1e-3


def test_cutmix_box_is_clipped_at_the_borders():
  # A box as large as the image reaches over the border wherever its centre is,
  # except at the exact middle.
  areas = []
  for seed in range(20):
    box = cutmix_box(jax.random.key(seed), 8, 8, np.float32(0.0))
    areas.append(float(1 - np.mean(box)))
  assert min(areas) >= 0.25  # a centre in the corner leaves a quarter
  assert min(areas) < 1
  assert len(set(areas)) > 3


def test_the_kinds_occur_as_often_as_asked():
  # prob 0.5, switch 0.5: half plain, a quarter each of mixup and cutmix.
  images, targets = jax.device_get(batch())
  count = dict(plain=0, mixup=0, cutmix=0)
  for seed in range(400):
    mixed = np.asarray(jitted(**BOTH)(jax.random.key(seed), images, targets)[0])
    if np.array_equal(mixed, images):
      count["plain"] += 1
    elif np.any(mixed == images) and np.any(mixed == images[::-1]):
      count["cutmix"] += 1
    else:
      count["mixup"] += 1
  # A cutmix box may come out empty, which looks plain.
  assert 170 <= count["plain"] <= 240
  assert 70 <= count["mixup"] <= 130
  assert 70 <= count["cutmix"] <= 130


def test_same_key_same_mix_and_other_key_other_mix():
  images, targets = batch(size=3)
  mix = jitted(mixup_alpha=2.0, cutmix_alpha=0.0, prob=1.0)
  first, again = (mix(jax.random.key(3), images, targets)[0] for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, mix(jax.random.key(4), images, targets)[0])


def test_middle_of_an_odd_batch_is_its_own_partner():
  images, targets = batch(size=3)
  mix = jitted(mixup_alpha=2.0, cutmix_alpha=0.0, prob=1.0)
  mixed, mixed_targets = mix(jax.random.key(3), images, targets)
  for found, before in ((mixed, images), (mixed_targets, targets)):
    np.testing.assert_allclose(np.asarray(found)[1], np.asarray(before)[1], atol=1e-6)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(mixup_alpha=-0.1), "mixup_alpha is -0.1"),
    (dict(cutmix_alpha=float("nan")), "cutmix_alpha is nan"),
    (dict(prob=1.1), "mix_prob is 1.1"),
    (dict(switch_prob=-1.0), "mix_switch_prob is -1.0"),
  ],
)
def test_wrong_mix_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    losses.mix(jax.random.key(0), *batch(), **{**BOTH, **changes})


def test_wrong_target_settings_are_named():
  with pytest.raises(ValueError, match="label_smoothing is 1.0"):
    losses.targets(jnp.array([0]), 3, 1.0)
  with pytest.raises(ValueError, match="num_classes is 0"):
    losses.targets(jnp.array([0]), 0)
