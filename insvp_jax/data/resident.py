"""Training examples that live on the devices, and the batch of a step.

Stored are images, as uint8, or their features; the host only names a step.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np

from insvp_jax.data import preprocess

Arrays = Mapping[str, Any]


def augment_key(seed: Any, step: Any) -> Key[Array, ""]:
  """Returns the key of a step's crops and flips: the first of the step's three.

  The arguments are whole numbers, traced ones too.

  Args:
    seed: the run's.
    step: number of batches before this one.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.split(key, 3)[0]


def epoch_order(seed, epoch, size: int):
  """Returns the order of an epoch's examples; pure and jit-able."""
  key = jax.random.fold_in(jax.random.key(seed), epoch)
  return jax.random.permutation(key, size)


def gather(arrays: Arrays, order, seed, step, *, batch_size, preset, image_size):
  """Returns the batch of a step; pure and jit-able.

  Args:
    arrays: of all examples: "labels" [n] and either "images" [n, h, w, 3] or
      "features" [n or more, d].
    order: of the step's epoch, from `epoch_order`.
    seed: of crops and flips, as is `step`.
    step: number of batches of the run before this one.
    batch_size: b; static, as are the rest.
    preset: says how images are cropped and flipped, if at all; None leaves them.
    image_size: side of the crops in pixels.

  Returns:
    The arrays' rows [b, ...] by the same names.
  """
  start = step % (arrays["labels"].shape[0] // batch_size) * batch_size
  indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
  batch = {n: jnp.take(a, indices, 0, mode="clip") for n, a in arrays.items()}
  if preset is not None and preset.augments and "images" in batch:
    key = augment_key(seed, step)
    batch["images"] = preprocess.augment(preset, batch["images"], key, image_size)
  return batch


def replicated(
  sharding: jax.sharding.Sharding | None,
) -> jax.sharding.Sharding | None:
  """Returns the sharding that keeps whole arrays on all the same devices."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


def put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> Array:
  """Returns the array on the devices; every process has all of it."""
  if sharding is None:
    return jnp.asarray(array)
  # Unlike device_put, this also serves devices of which this process owns a part.
  return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def put_split(split: Any, sharding: jax.sharding.Sharding | None) -> dict[str, Array]:
  """Returns the images and labels of an `ArraySplit` on the devices of a batch.

  One copy per device: a gather then needs no communication.

  Args:
    split: the examples, in memory.
    sharding: of a batch.
  """
  everywhere = replicated(sharding)
  return {
    "images": put(split.images, everywhere),
    "labels": put(split.labels, everywhere),
  }
