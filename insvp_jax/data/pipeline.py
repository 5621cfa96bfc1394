"""Batches on the devices: a deterministic train stream and complete evaluation.

The training images live on the devices as uint8. Each step only names a position;
shuffling and gathering happen on the device, so the host does nothing per step.
Evaluation reads from the host's memory, because test sets may be large.

Every process of a multi-host job holds the same split and hands to its devices
only their rows.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from insvp_jax.data.arrays import ArraySplit


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Returns the number of full batches in one epoch.

  Raises:
    ValueError: not even one batch can be filled.
  """
  if not 1 <= batch_size <= num_examples:
    raise ValueError(
      f"batch_size={batch_size} does not fit a training split of {num_examples} "
      f"images. Set config.batch_size to at most {num_examples} (and at least 1), "
      f"or give more images."
    )
  return num_examples // batch_size


def train_batches(
  split: ArraySplit,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, Array]]:
  """Yields batches for ever; batch t depends only on the split, `seed` and t.

  Each epoch visits the examples in a new order; what does not fill a last batch
  is left out of that epoch.

  Args:
    split: the training examples.
    batch_size: b, over all devices and processes.
    seed: of the order.
    start_step: the first step to yield, to go on after an interruption.
    sharding: of the batch's leading axis; None for the default device.

  Returns:
    Iterator of {"images": uint8 [b, h, w, 3], "labels": int32 [b]}.

  Raises:
    ValueError: the split has fewer than `batch_size` examples.
  """
  # The checks run now, not at the first `next`.
  per_epoch = steps_per_epoch(len(split), batch_size)
  return _train_batches(split, batch_size, per_epoch, seed, start_step, sharding)


def _train_batches(split, batch_size, per_epoch, seed, start_step, sharding):
  everywhere = _replicated(sharding)
  # One copy per device: a gather then needs no communication.
  images, labels = _put(split.images, everywhere), _put(split.labels, everywhere)
  # Static arguments, not closures: the next call finds the compiled programs.
  permute = jax.jit(_permutation, static_argnames="size", out_shardings=everywhere)
  gather = jax.jit(_gather, static_argnames="batch_size", out_shardings=sharding)
  epoch, order = None, None
  step = start_step
  while True:
    if epoch != step // per_epoch:
      epoch = step // per_epoch
      order = permute(np.uint32(seed % 2**32), np.uint32(epoch), size=len(split))
    position = np.int32(step % per_epoch)
    yield gather(images, labels, order, position, batch_size=batch_size)
    step += 1


def _permutation(seed, epoch, size: int):
  key = jax.random.fold_in(jax.random.key(seed), epoch)
  return jax.random.permutation(key, size)


def _gather(images, labels, order, position, batch_size: int):
  start = position * batch_size
  indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
  return {
    "images": jnp.take(images, indices, 0, mode="clip"),
    "labels": jnp.take(labels, indices, 0, mode="clip"),
  }


def eval_batches(
  split: ArraySplit,
  *,
  batch_size: int,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, Array]]:
  """Yields every example exactly once, in order, in batches of one shape.

  The last batch is filled up with black images of class 0 whose mask is 0.

  Args:
    split: the examples.
    batch_size: b, over all devices and processes.
    sharding: of the batch's leading axis; None for the default device.

  Returns:
    Iterator of {"images": uint8 [b, h, w, 3], "labels": int32 [b],
    "mask": float32 [b]}; the masks sum to the number of examples.

  Raises:
    ValueError: the batch size is not positive.
  """
  if batch_size < 1:
    raise ValueError(f"eval_batch_size has to be at least 1, got {batch_size}.")
  return _eval_batches(split, batch_size, sharding)


def _eval_batches(split, batch_size, sharding):
  for start in range(0, len(split), batch_size):
    stop = min(start + batch_size, len(split))
    batch = {
      "images": split.images[start:stop],
      "labels": split.labels[start:stop],
      "mask": np.ones(stop - start, np.float32),
    }
    if missing := batch_size - (stop - start):
      batch = {
        name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
      }
    yield {name: _put(array, sharding) for name, array in batch.items()}


def _replicated(sharding):
  """Returns the sharding that keeps whole arrays on all the same devices."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


def _put(array: np.ndarray, sharding) -> Array:
  if sharding is None:
    return jnp.asarray(array)
  # Unlike device_put, this also serves devices of which this process owns a part.
  return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
