"""Batches on the devices: a deterministic train stream and complete evaluation.

A training split in memory lives on the devices as uint8 (`resident`): each step only
names its number, and order, crops and flips are computed there, so the host does
nothing per step. A streamed split is read, cropped and flipped by the host, a bounded
way ahead. Both give the same batches.

Batch t depends only on the split, the seed and t. The position in the data is thus the
step: epoch t // steps_per_epoch, and `resident.batch_start` within it.

Every process of a multi-host job hands to its devices only their rows of a batch, and
of a stream it reads only those.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from insvp_jax.data import preprocess, resident
from insvp_jax.data.preprocess import Preset
from insvp_jax.data.splits import ArraySplit, Split


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Returns the number of full batches in one epoch.

  Raises:
    ValueError: if not even one batch can be filled.
  """
  if not 1 <= batch_size <= num_examples:
    raise ValueError(
      f"batch_size={batch_size} does not fit a training split of {num_examples} "
      f"images. Set config.batch_size to at most {num_examples} (and at least 1), "
      f"or give more images."
    )
  return num_examples // batch_size


def train_batches(
  examples: Split | resident.Examples,
  *,
  batch_size: int,
  seed: int,
  preset: Preset | None = None,
  image_size: int = 0,
  start_step: int = 0,
  balanced_classes: int = 0,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, Array]]:
  """Yields batches for ever; batch t depends only on the examples, `seed` and t.

  Each epoch visits the examples in a new order; what does not fill a last batch is left
  out of that epoch. Close the iterator to end a stream's threads.

  Args:
    examples: what is trained on: a split, or its images or features on the devices.
    batch_size: number of examples in a batch, b, over all devices and processes.
    seed: the seed of the order, the crops and the flips.
    preset: how images are cropped and flipped; None leaves them as they are stored.
    image_size: side of the crops in pixels; used only with a preset.
    start_step: the first step to yield, to go on after an interruption.
    balanced_classes: number of classes that are to be shown alike, see
      `resident.balanced_order`; 0 shows each example once an epoch.
    sharding: the sharding of a batch, by its leading axis; None for the default device.

  Returns:
    An iterator of {"images": uint8 [b, h, w, 3], "labels": int32 [b]}, or with
    "features" [b, d] instead of images where the examples have these.

  Raises:
    ValueError: if there are fewer than `batch_size` examples.
  """
  on_devices = isinstance(examples, Mapping)
  num_examples = examples["labels"].shape[0] if on_devices else len(examples)
  # This function is no generator, so that the check runs now, not at the first `next`.
  schedule = Schedule(
    num_examples=num_examples,
    batch_size=batch_size,
    steps_per_epoch=steps_per_epoch(num_examples, batch_size),
    seed=seed,
    start_step=start_step,
    balanced_classes=balanced_classes,
  )
  from_memory = on_devices or isinstance(examples, ArraySplit)
  batches = _resident_batches if from_memory else _streamed_batches
  return batches(examples, schedule, preset, image_size, sharding)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Which examples make up which batch of a run.

  Attributes:
    num_examples: number of examples, n.
    batch_size: number of examples in a batch, b.
    steps_per_epoch: number of batches in an epoch.
    seed: the run's seed.
    start_step: the first step to yield.
    balanced_classes: as for `train_batches`.
  """

  num_examples: int
  batch_size: int
  steps_per_epoch: int
  seed: int
  start_step: int
  balanced_classes: int

  def steps(self, labels, out_shardings=None) -> Iterator[tuple[int, Array]]:
    """Yields (step, order of its epoch) from the first step on, for ever.

    Args:
      labels: class of each example, int32 [n].
      out_shardings: the sharding of the order; None for the default device.
    """
    # Static arguments, not closures: the next call finds the compiled program.
    static = ("size", "balanced_classes")
    permute = jax.jit(
      resident.epoch_order, static_argnames=static, out_shardings=out_shardings
    )
    seed = np.uint32(self.seed % 2**32)
    balanced = {"labels": labels, "balanced_classes": self.balanced_classes}
    options = balanced if self.balanced_classes else {}
    epoch, order, step = None, None, self.start_step
    while True:
      if epoch != step // self.steps_per_epoch:
        epoch = step // self.steps_per_epoch
        order = permute(seed, np.uint32(epoch), size=self.num_examples, **options)
      yield step, order
      step += 1


def _resident_batches(examples, schedule: Schedule, preset, image_size, sharding):
  """Yields the batches of examples in memory or on the devices."""
  if isinstance(examples, ArraySplit):
    examples = resident.put_split(examples, sharding)
  options = {
    "batch_size": schedule.batch_size,
    "preset": preset,
    "image_size": image_size,
  }
  take_batch = jax.jit(
    resident.take_batch, static_argnames=tuple(options), out_shardings=sharding
  )
  # As uint32, because JAX refuses a Python number that is no int32.
  seed = np.uint32(schedule.seed % 2**32)
  everywhere = resident.replicated(sharding)
  for step, order in schedule.steps(examples["labels"], everywhere):
    yield take_batch(examples, order, seed, np.int32(step), **options)


def _streamed_batches(split, schedule: Schedule, preset, image_size, sharding):
  """Yields the batches of a streamed split; each process reads its own rows only."""
  rows = local_rows(sharding, schedule.batch_size)
  augments = preset is not None and preset.augments
  whole = preset is not None and preset.crops_whole_images
  # The reader runs ahead: what it has been asked for waits here for its images.
  requested: list[tuple[int, np.ndarray]] = []

  def requests():
    epoch, order = None, np.zeros(0, np.int64)
    for step, on_device in schedule.steps(split.labels):
      # One transfer an epoch, not one a step.
      if epoch != step // schedule.steps_per_epoch:
        epoch, order = step // schedule.steps_per_epoch, jax.device_get(on_device)
      start = resident.batch_start(step, schedule.num_examples, schedule.batch_size)
      indices = order[start : start + schedule.batch_size][rows]
      requested.append((step, indices))
      yield indices

  images = split.read(requests(), whole=whole)
  try:
    for pixels in images:
      step, indices = requested.pop(0)
      if augments:
        key = resident.augment_key(schedule.seed, step)
        pixels = _crop_and_flip(
          pixels, preset, key, rows, schedule.batch_size, image_size
        )
      yield put_rows(
        {"images": np.asarray(pixels), "labels": split.labels[indices]},
        rows,
        schedule.batch_size,
        sharding,
      )
  finally:
    images.close()


def _crop_and_flip(pixels, preset, key, rows, batch_size: int, image_size: int):
  """Crops and flips this process's rows of a batch on the host.

  Args:
    pixels: the images of these rows, uint8 [h, w, 3] each.
    preset: how images are cropped and flipped.
    key: the key of the whole batch.
    rows: which rows of the batch these are, ascending.
    batch_size: number of rows of the whole batch.
    image_size: side of the crops in pixels.

  Returns:
    The crops, uint8 [number of rows, image_size, image_size, 3].
  """
  # Windows are drawn for the whole batch, so that they do not depend on the number of
  # processes. Each row has its own random numbers, so the sides of other rows, which
  # this process does not know, do not matter.
  sides = np.full((2, batch_size), image_size, np.int32)
  sides[:, rows] = np.transpose([image.shape[:2] for image in pixels])
  draw = jax.jit(preprocess.draw_windows, static_argnums=(0, 4))
  # On the CPU, so that the accelerator goes on with the step before.
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
    batch_size: number of examples in a batch, b, over all devices and processes.
    sharding: the sharding of a batch, by its leading axis; None for the default device.

  Returns:
    An iterator of {"images": uint8 [b, h, w, 3], "labels": int32 [b],
    "mask": float32 [b]}; the masks sum to the number of examples.

  Raises:
    ValueError: if the batch size is not positive.
  """
  if batch_size < 1:
    raise ValueError(f"eval_batch_size has to be at least 1, got {batch_size}.")
  return _eval_batches(split, batch_size, sharding)


def _eval_batches(split, batch_size, sharding):
  """Yields the batches of `eval_batches`."""
  rows = local_rows(sharding, batch_size)
  starts = range(0, len(split), batch_size)
  # In the last batch a process may have no real rows: nothing is read for it then.
  batches = [start + rows[start + rows < len(split)] for start in starts]
  images = split.read(indices for indices in batches if len(indices))
  try:
    for indices in batches:
      pixels = np.asarray(next(images)) if len(indices) else _no_images(split)
      batch = {
        "images": pixels,
        "labels": split.labels[indices],
        "mask": np.ones(len(indices), np.float32),
      }
      # Zeros are what an example that is none has: black, class 0, mask 0.
      if missing := len(rows) - len(indices):
        batch = {
          name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
          for name, array in batch.items()
        }
      yield put_rows(batch, rows, batch_size, sharding)
  finally:
    images.close()


def _no_images(split: Split) -> np.ndarray:
  """Returns images [0, s, s, 3] of the split's size."""
  return np.empty((0, split.stored_size, split.stored_size, 3), np.uint8)


def local_rows(sharding, batch_size: int) -> np.ndarray:
  """Returns the rows of a batch that lie on this process's devices, ascending."""
  all_rows = np.arange(batch_size)
  if sharding is None:
    return all_rows
  parts = sharding.addressable_devices_indices_map((batch_size,)).values()
  # Unique, because several devices may hold the same rows.
  return np.unique(np.concatenate([all_rows[index] for index in parts]))


def put_rows(
  batch: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, sharding: Any
) -> dict[str, Array]:
  """Puts a batch on the devices, of which this process has some rows.

  Args:
    batch: arrays [number of rows, ...] by name.
    rows: which rows of the whole batch they are, ascending.
    batch_size: number of rows of the whole batch.
    sharding: the sharding of the batch; None for the default device.

  Returns:
    Global arrays [batch_size, ...] by name.
  """
  if sharding is None:
    return {name: jnp.asarray(array) for name, array in batch.items()}
  # Where a row of the whole batch stands among those of this process. JAX asks for the
  # rows of this process's devices only.
  local = np.zeros(batch_size, np.int64)
  local[rows] = np.arange(len(rows))

  def put(array: np.ndarray) -> Array:
    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_callback(
      shape, sharding, lambda index: array[local[index[0]]]
    )

  return {name: put(array) for name, array in batch.items()}
