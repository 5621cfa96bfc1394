"""Targets, cross-entropy, and mixup / cutmix on the device.

Targets are rows of probabilities, so that smoothed and mixed labels need no second
kind of loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray
import numpy as np
import optax


def targets(
  labels: Int[Array, " b"],
  num_classes: int,
  smoothing: float | int = 0.0,
) -> Float32[Array, "b k"]:
  """Returns one row of target probabilities per label.

  The label's class gets 1 - smoothing + smoothing / k, every other smoothing / k.
  A label outside [0, num_classes) gives a row without its class; data is checked
  where it is read, since values cannot be checked under `jit`.

  Args:
    labels: below the number of classes.
    num_classes: k.
    smoothing: in [0, 1).

  Raises:
    ValueError: `smoothing` is not in [0, 1) or `num_classes` is below 1.

  Source: Szegedy et al., Rethinking the Inception Architecture, section 7.
  """
  if num_classes < 1:
    raise ValueError(f"num_classes is {num_classes}; it must be at least 1.")
  if not 0 <= smoothing < 1:
    raise ValueError(f"label_smoothing is {smoothing!r}; it must be in [0, 1).")
  one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  if not smoothing:
    return one_hot
  return optax.smooth_labels(one_hot, smoothing)


def cross_entropy(
  logits: Float[Array, "b k"], targets: Float[Array, "b k"]
) -> Float32[Array, " b"]:
  """Returns the cross-entropy of each example, in nats, computed in float32."""
  return optax.losses.softmax_cross_entropy(
    logits.astype(jnp.float32), targets.astype(jnp.float32)
  )


def class_weights(counts: Int[np.ndarray, " k"]) -> Float32[np.ndarray, " k"]:
  """Returns by how much examples of each class count so that classes count alike.

  n / (k * count): 1 where all classes are of one size. A class without examples gets 0.

  Args:
    counts: examples of each class.

  Source: King and Zeng, Logistic Regression in Rare Events Data, section 4; the
    "balanced" weights of scikit-learn.
  """
  present = np.maximum(counts, 1) * np.count_nonzero(counts)
  return np.where(counts > 0, counts.sum() / present, 0).astype(np.float32)


def mix(
  key: PRNGKeyArray,
  images: Float[Array, "b h w 3"],
  targets: Float[Array, "b k"],
  *,
  mixup_alpha: float | int,
  cutmix_alpha: float | int,
  prob: float | int = 1.0,
  switch_prob: float | int = 0.5,
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b k"]]:
  """Mixes each image and its target with those of a partner, by mixup or cutmix.

  One draw for the whole batch, as timm's "batch" mode does: with probability `prob`
  the batch is mixed, by cutmix with probability `switch_prob` (else by mixup) when
  both are on. Image i's partner is image b - 1 - i of the global batch, so the
  outcome does not depend on the number of devices; the middle image of an odd batch
  is its own partner. Mixing is linear, so smoothed targets may go in.

  Args:
    key: of this step; the draw is a function of it alone.
    images: in any value range, after normalisation.
    targets: rows of probabilities, from `targets`.
    mixup_alpha: lambda ~ Beta(alpha, alpha) for mixup; 0 turns mixup off.
    cutmix_alpha: the same for cutmix, where 1 - lambda is the area of the box
      before it is clipped at the image's borders.
    prob: probability to mix a batch at all, in [0, 1].
    switch_prob: probability of cutmix when both are on, in [0, 1].

  Returns:
    Images and targets of the same shapes and dtypes; the arguments themselves, with
    no random operation, when both alphas or `prob` are 0.

  Raises:
    ValueError: a negative alpha, or a probability outside [0, 1].

  Source: Zhang et al., mixup, equation 1; Yun et al., CutMix, equations 1 and 2;
    the combination: timm's `Mixup`, which InsVP's code trains with.
  """
  _check_mix(mixup_alpha, cutmix_alpha, prob, switch_prob)
  if prob == 0 or (mixup_alpha == 0 and cutmix_alpha == 0):
    return images, targets
  height, width = images.shape[1:3]
  weights, share = _mix_weights(
    key, height, width, mixup_alpha, cutmix_alpha, prob, switch_prob
  )
  weights = weights[None, :, :, None]
  return _blend(images, weights), _blend(targets, share)


def cutmix_box(
  key: PRNGKeyArray, height: int, width: int, share: Float32[Array, ""]
) -> Float32[Array, "h w"]:
  """Returns 0 inside a random box, which the partner fills, and 1 outside it.

  The box has sides of sqrt(1 - share) of the image's, rounded down to even numbers
  of pixels, around a uniform centre pixel; what lies outside the image is cut off.

  Source: CutMix, equation 2, with timm's rounding.
  """
  inside = []
  for axis_key, size in zip(jax.random.split(key), (height, width), strict=True):
    half = jnp.floor(size * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
    centre = jax.random.randint(axis_key, (), 0, size)
    pixels = jnp.arange(size)
    inside.append((pixels >= centre - half) & (pixels < centre + half))
  box = inside[0][:, None] & inside[1][None, :]
  return 1.0 - box.astype(jnp.float32)


def _mix_weights(
  key: PRNGKeyArray,
  height: int,
  width: int,
  mixup_alpha: float | int,
  cutmix_alpha: float | int,
  prob: float | int,
  switch_prob: float | int,
) -> tuple[Float32[Array, "h w"], Float32[Array, ""]]:
  """Returns each pixel's own share (the partner has the rest) and their mean."""
  keys = jax.random.split(key, 5)
  branches = []
  if mixup_alpha > 0:
    share = jax.random.beta(keys[0], mixup_alpha, mixup_alpha, dtype=jnp.float32)
    branches.append((jnp.full((height, width), share), share))
  if cutmix_alpha > 0:
    share = jax.random.beta(keys[1], cutmix_alpha, cutmix_alpha, dtype=jnp.float32)
    weights = cutmix_box(keys[2], height, width, share)
    # The clipped, rounded box is smaller than drawn: targets follow its true area.
    branches.append((weights, jnp.mean(weights)))
  weights, share = branches[0]
  if len(branches) == 2:
    is_cutmix = jax.random.bernoulli(keys[3], switch_prob)
    weights = jnp.where(is_cutmix, branches[1][0], weights)
    share = jnp.where(is_cutmix, branches[1][1], share)
  is_mixed = jax.random.bernoulli(keys[4], prob)
  return jnp.where(is_mixed, weights, 1.0), jnp.where(is_mixed, share, 1.0)


def _blend(values: Float[Array, "..."], own: Float32[Array, "..."]):
  """Returns own * values + (1 - own) * partners, rounded to the values' dtype."""
  wide = values.astype(jnp.float32)
  return (own * wide + (1.0 - own) * jnp.flip(wide, axis=0)).astype(values.dtype)


def _check_mix(
  mixup_alpha: float | int,
  cutmix_alpha: float | int,
  prob: float | int,
  switch_prob: float | int,
) -> None:
  for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
    if not 0 <= value < float("inf"):
      raise ValueError(f"{name} is {value!r}; it must be a number >= 0 (0 is off).")
  for name, value in (("mix_prob", prob), ("mix_switch_prob", switch_prob)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name} is {value!r}; it must be in [0, 1].")
