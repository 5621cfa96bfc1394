"""Training examples that live on the devices, and the batch of a step made of them.

The devices hold all images as uint8, or all features. The host names a step; order,
crops and flips follow from the run's seed and that step, in pure functions that are
compiled into the training program (`train.steps`) or on their own (`pipeline`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np

from insvp_jax.data import preprocess
from insvp_jax.data.splits import ArraySplit

# All examples of a split: "labels" int32 [n] and either "images" uint8 [n, h, w, 3] or
# "features" float [n or more, d].
Examples = Mapping[str, Any]


def augment_key(seed: Any, step: Any) -> Key[Array, ""]:
  """Returns the key of a step's crops and flips, the first of the step's three keys.

  Args:
    seed: the run's seed; a whole number, which may be traced.
    step: number of batches before this one; a whole number, which may be traced.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.split(key, 3)[0]


def epoch_order(seed, epoch, size: int, *, labels=None, balanced_classes: int = 0):
  """Returns the order of an epoch's examples; pure and jit-able.

  Args:
    seed: the run's seed, uint32 [].
    epoch: number of epochs before this one, uint32 [].
    size: number of examples, n; static.
    labels: class of each example, int32 [n]; needed with `balanced_classes` only.
    balanced_classes: number of classes that are to be shown alike; static. 0 shows each
      example once.

  Returns:
    A permutation of the positions 0 to n - 1, int32 [n], or the `balanced_order`.
  """
  if balanced_classes:
    return balanced_order(seed, epoch, labels, balanced_classes)
  key = jax.random.fold_in(jax.random.key(seed), epoch)
  return jax.random.permutation(key, size)


def balanced_order(seed, epoch, labels, num_classes: int):
  """Returns the order of an epoch that shows all classes alike; pure and jit-able.

  An epoch has as many places as there are examples, n. Each of the k classes that have
  examples gets n / k of them, rounded up for as many classes, drawn anew in each epoch,
  as it takes. In the places of a class its examples take turns, in an order of their
  own in each epoch: none is there twice more often than another. Examples of large
  classes are left out of an epoch, others of small ones are repeated.

  Args:
    seed: the run's seed, uint32 [].
    epoch: number of epochs before this one, uint32 [].
    labels: class of each example, int32 [n].
    num_classes: number of classes, k or more; static.

  Returns:
    Positions of examples, int32 [n].

  Source: "class-aware sampling", Shen et al. 2016, "Relay Backpropagation for Effective
    Learning of Deep Convolutional Neural Networks"; here the places of the classes are
    shuffled over the epoch.
  """
  size = labels.shape[0]
  key = jax.random.fold_in(jax.random.key(seed), epoch)
  members_key, classes_key, places_key = jax.random.split(key, 3)
  # The examples class by class, shuffled within each.
  shuffled = jax.random.permutation(members_key, size)
  by_class = shuffled[jnp.argsort(labels[shuffled], stable=True)]
  counts = jnp.bincount(labels, length=num_classes)
  starts = jnp.cumsum(counts) - counts
  # The classes that have examples, in a random order; the others behind them.
  ranks = jax.random.permutation(classes_key, num_classes)
  classes = jnp.argsort(jnp.where(counts > 0, ranks, num_classes))
  places = jnp.arange(size)
  num_present = jnp.sum(counts > 0)
  label, turn = classes[places % num_present], places // num_present
  order = by_class[starts[label] + turn % counts[label]]
  return order[jax.random.permutation(places_key, size)]


def batch_start(step, num_examples: int, batch_size: int):
  """Returns where in its epoch's order the batch of a step begins.

  This and the epoch, `step // (num_examples // batch_size)`, are the position in the
  data. It is a function of the step, so nothing else is stored to resume a run. The
  examples that fill no last batch are left out of the epoch.

  Args:
    step: number of batches before this one; may be traced.
    num_examples: number of examples, n.
    batch_size: number of examples in a batch, b.
  """
  return step % (num_examples // batch_size) * batch_size


def take_batch(
  examples: Examples, order, seed, step, *, batch_size, preset, image_size
):
  """Returns the batch of a step; pure and jit-able.

  Args:
    examples: all examples of the split.
    order: the order of the step's epoch, from `epoch_order`.
    seed: the run's seed, uint32 []; crops and flips are drawn from it and `step`.
    step: number of batches of the run before this one, int32 [].
    batch_size: number of examples in a batch, b; static, as are the rest.
    preset: the `preprocess.Preset` that says how images are cropped and flipped; None
      leaves them as they are stored.
    image_size: side of the crops in pixels.

  Returns:
    The batch's rows [b, ...] of each array of `examples`, by the same names.
  """
  start = batch_start(step, examples["labels"].shape[0], batch_size)
  indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
  # All indices are in range; "clip" spares the mask that the default mode computes.
  batch = {n: jnp.take(a, indices, 0, mode="clip") for n, a in examples.items()}
  # Features are of images that were not augmented.
  if preset is not None and preset.augments and "images" in batch:
    key = augment_key(seed, step)
    batch["images"] = preprocess.augment(preset, batch["images"], key, image_size)
  return batch


def replicated(
  sharding: jax.sharding.Sharding | None,
) -> jax.sharding.Sharding | None:
  """Returns the sharding that keeps whole arrays on each device of another sharding."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


def put_array(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> Array:
  """Puts an array on the devices.

  Args:
    array: the whole array, which every process has.
    sharding: how it lies on the devices; None for the default device.
  """
  if sharding is None:
    return jnp.asarray(array)
  # Unlike device_put, this also serves meshes of which this process owns a part.
  return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def put_split(
  split: ArraySplit, sharding: jax.sharding.Sharding | None
) -> dict[str, Array]:
  """Puts the images and labels of a split on the devices, a copy on each.

  With a copy on each device no batch needs communication.

  Args:
    split: the examples, in memory.
    sharding: the sharding of a batch; None for the default device.

  Returns:
    {"images": uint8 [n, h, w, 3], "labels": int32 [n]}.
  """
  everywhere = replicated(sharding)
  return {
    "images": put_array(split.images, everywhere),
    "labels": put_array(split.labels, everywhere),
  }
