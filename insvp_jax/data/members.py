"""Batches of several runs at once, each with its own order, crops and flips."""

from collections.abc import Iterator, Sequence
import functools

import jax
from jaxtyping import Array
import numpy as np

from insvp_jax.data import pipeline, resident
from insvp_jax.data.preprocess import Preset


def member_batches(
  arrays: resident.Examples,
  *,
  seeds: Sequence[int],
  batch_size: int,
  preset: Preset | None = None,
  image_size: int = 0,
  start_step: int = 0,
  sharding: jax.sharding.NamedSharding,
) -> Iterator[dict[str, Array]]:
  """Yields the batches of several runs at once, put together on the devices.

  Args:
    arrays: of the training examples, on the devices, as for `resident.take_batch`.
    seeds: of each run; its part is what `train_batches` yields for its seed.
    batch_size: b, of each run, over all devices and processes.
    preset: as for `train_batches`.
    image_size: as for `train_batches`.
    start_step: the first step to yield.
    sharding: of {leading axis m, then b}.

  Returns:
    Iterator of {"images": uint8 [m, b, h, w, 3], "labels": int32 [m, b]}, or of
    "features" where the arrays have these.

  Raises:
    ValueError: the split has fewer than `batch_size` examples.
  """
  number = arrays["labels"].shape[0]
  per_epoch = pipeline.steps_per_epoch(number, batch_size)
  seeds = np.array([seed % 2**32 for seed in seeds], np.uint32)
  permute = jax.jit(
    jax.vmap(functools.partial(resident.epoch_order, size=number), (0, None)),
    out_shardings=resident.replicated(sharding),
  )
  one = functools.partial(
    resident.take_batch, batch_size=batch_size, preset=preset, image_size=image_size
  )
  gather = jax.jit(jax.vmap(one, (None, 0, 0, None)), out_shardings=sharding)

  def batches():
    epoch, orders, step = None, None, start_step
    while True:
      if epoch != step // per_epoch:
        epoch = step // per_epoch
        orders = permute(seeds, np.uint32(epoch))
      yield gather(arrays, orders, seeds, np.int32(step))
      step += 1

  return batches()
