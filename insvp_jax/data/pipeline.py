"""Batches on the devices: a deterministic train stream and complete evaluation.

A training set in memory lives on the devices as uint8: each step only names a
position; shuffling, cropping and flipping happen there, so the host does nothing per
step. A streamed one is read, cropped and flipped by the host, a bounded way ahead.
Both give the same batches, and batch t depends only on the split, the seed and t.

Every process of a multi-host job hands to its devices only their rows, and of a
stream it reads only those.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np

from insvp_jax.data import preprocess, resident
from insvp_jax.data.arrays import ArraySplit
from insvp_jax.data.preprocess import Preset
from insvp_jax.data.resident import augment_key, epoch_order
from insvp_jax.data.splits import Split


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
  examples: Split | resident.Arrays,
  *,
  batch_size: int,
  seed: int,
  preset: Preset | None = None,
  image_size: int = 0,
  start_step: int = 0,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, Array]]:
  """Yields batches for ever; batch t depends only on the examples, `seed` and t.

  Each epoch visits the examples in a new order; what does not fill a last batch
  is left out of that epoch. Close the iterator to end a stream's threads.

  Args:
    examples: to train on: a split, or what of it is on the devices, images or features
      (see `resident.gather`).
    batch_size: b, over all devices and processes.
    seed: of the order, crops and flips.
    preset: how images are cropped and flipped; None leaves them as they are stored.
    image_size: side of the crops in pixels; read with a preset only.
    start_step: the first step to yield, to go on after an interruption.
    sharding: of the batch's leading axis; None for the default device.

  Returns:
    Iterator of {"images": uint8 [b, h, w, 3], "labels": int32 [b]}, or of "features"
    where the examples have these.

  Raises:
    ValueError: there are fewer than `batch_size` examples.
  """
  on_devices = isinstance(examples, Mapping)
  number = examples["labels"].shape[0] if on_devices else len(examples)
  # The checks run now, not at the first `next`.
  per_epoch = steps_per_epoch(number, batch_size)
  steps = _Steps(number, batch_size, per_epoch, seed, start_step)
  from_memory = on_devices or isinstance(examples, ArraySplit)
  batches = _resident if from_memory else _streamed
  return batches(examples, steps, preset, image_size, sharding)


class _Steps:
  """Which examples make up which batch."""

  def __init__(self, number, batch_size, per_epoch, seed, start):
    self.number, self.batch_size = number, batch_size
    self.per_epoch, self.seed, self.start = per_epoch, seed, start

  def orders(self, out_shardings=None) -> Iterator[tuple[int, Array]]:
    """Yields (step, order of its epoch) for ever."""
    # Static arguments, not closures: the next call finds the compiled program.
    permute = jax.jit(epoch_order, static_argnames="size", out_shardings=out_shardings)
    epoch, order, step = None, None, self.start
    while True:
      if epoch != step // self.per_epoch:
        epoch = step // self.per_epoch
        seed = np.uint32(self.seed % 2**32)
        order = permute(seed, np.uint32(epoch), size=self.number)
      yield step, order
      step += 1

  def key(self, step: int) -> Key[Array, ""]:
    return augment_key(self.seed, step)


def _resident(examples, steps: _Steps, preset, image_size, sharding):
  arrays = examples
  if isinstance(examples, ArraySplit):
    arrays = resident.put_split(examples, sharding)
  options = {
    "batch_size": steps.batch_size,
    "preset": preset,
    "image_size": image_size,
  }
  take = jax.jit(
    resident.gather, static_argnames=tuple(options), out_shardings=sharding
  )
  seed = np.uint32(steps.seed % 2**32)
  for step, order in steps.orders(resident.replicated(sharding)):
    yield take(arrays, order, seed, np.int32(step), **options)


def _streamed(split, steps: _Steps, preset, image_size, sharding):
  rows = _local_rows(sharding, steps.batch_size)
  augments = preset is not None and preset.augments
  whole = augments and preset.keeps_aspect
  taken: list[tuple[int, np.ndarray]] = []

  def requests():
    epoch, order = None, np.zeros(0, np.int64)
    for step, on_device in steps.orders():
      if epoch != step // steps.per_epoch:
        epoch, order = step // steps.per_epoch, jax.device_get(on_device)
      start = step % steps.per_epoch * steps.batch_size
      indices = order[start : start + steps.batch_size][rows]
      taken.append((step, indices))
      yield indices

  images = split.read(requests(), whole=whole)
  try:
    for pixels in images:
      step, indices = taken.pop(0)
      if augments:
        pixels = _cut(pixels, preset, steps.key(step), rows, steps, image_size)
      yield _place(
        {"images": np.asarray(pixels), "labels": split.labels[indices]},
        rows,
        steps.batch_size,
        sharding,
      )
  finally:
    images.close()


def _cut(pixels, preset, key, rows, steps: _Steps, image_size):
  """Returns this process's rows of a batch, cropped and flipped."""
  # Each row has its own random numbers, so the sides of other rows do not matter.
  sides = np.full((2, steps.batch_size), image_size, np.int32)
  sides[:, rows] = np.transpose([image.shape[:2] for image in pixels])
  draw = jax.jit(preprocess.draw_windows, static_argnums=(0, 4))
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    offsets, flips = jax.device_get(draw(preset, key, *sides, image_size))
  out = np.empty((len(rows), image_size, image_size, 3), np.uint8)
  for i, (row, image) in enumerate(zip(rows, pixels, strict=True)):
    out[i] = preprocess.cut_window(image, offsets[row], flips[row], image_size)
  return out


def eval_batches(
  split: Split,
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
  rows = _local_rows(sharding, batch_size)
  starts = range(0, len(split), batch_size)
  # In the last batch a process may have no real rows: nothing is read for it.
  indices = [start + rows[start + rows < len(split)] for start in starts]
  images = split.read(some for some in indices if len(some))
  try:
    for some in indices:
      pixels = np.asarray(next(images)) if len(some) else _nothing(split)
      batch = {
        "images": pixels,
        "labels": split.labels[some],
        "mask": np.ones(len(some), np.float32),
      }
      if missing := len(rows) - len(some):
        batch = {
          name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
          for name, array in batch.items()
        }
      yield _place(batch, rows, batch_size, sharding)
  finally:
    images.close()


def _nothing(split: Split) -> np.ndarray:
  return np.empty((0, split.stored_size, split.stored_size, 3), np.uint8)


def _local_rows(sharding, batch_size: int) -> np.ndarray:
  """Returns the rows of a batch that lie on this process's devices, ascending."""
  everything = np.arange(batch_size)
  if sharding is None:
    return everything
  parts = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([everything[index] for index in parts]))


def _place(
  batch: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, sharding: Any
) -> dict[str, Array]:
  """Returns global arrays of which this process knows `rows` alone."""
  if sharding is None:
    return {name: jnp.asarray(array) for name, array in batch.items()}
  # Where a global row stands among those of this process.
  local = np.zeros(batch_size, np.int64)
  local[rows] = np.arange(len(rows))

  def place(array: np.ndarray) -> Array:
    def part(index):
      return array[local[index[0]]]

    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(array) for name, array in batch.items()}
