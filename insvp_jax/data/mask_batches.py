"""Batches of images and masks: random scale, crop and flip of both, on the host.

Batch t depends only on the split, the seed and t, as those of `pipeline`: its row r is
drawn from (seed, t, r). Every process reads and crops its own rows only, in threads.

Source: Zheng et al. 2021, "Rethinking Semantic Segmentation from a Sequence-to-Sequence
Perspective with Transformers", section 4.1, as mmsegmentation does it: the shorter side
is resized to the model's input times a factor, a window is cut out at random in which
no class has more than 75% of the pixels, if ten tries find one, and it is mirrored in
half of the cases. Where the window is larger than the image it is filled up with
pixels that count for nothing.
"""

from collections.abc import Iterator
import contextlib
import dataclasses

import jax
from jaxtyping import Array, Int16, UInt8
import numpy as np

from insvp_jax.data import pipeline, prefetch, resident
from insvp_jax.data.folder_or_zip import open_folder_or_zip
from insvp_jax.data.label_maps import IGNORED
from insvp_jax.data.masks import MaskSplit

# The longer side of an image is no more than so many times the model's input.
MAX_ASPECT = 4
# How often a window is drawn until no class fills it.
_TRIES = 10
# Crops that wait to be used, at least and for each row of a batch.
_AHEAD = 16


@dataclasses.dataclass(frozen=True)
class Crops:
  """How images and masks become a batch.

  Attributes:
    resize: "shorter": the factor is of an image whose shorter side is the model's
      input; "none": of the image as it is.
    scales: the least and the greatest factor; it is drawn uniformly.
    max_share: the most that one class may have of a window, if that can be had.
    flip: whether half of the windows are mirrored.
    photometric: whether their colours are changed; see `distort`.
    fill: RGB of what is beyond an image, in [0, 255].
  """

  resize: str = "shorter"
  scales: tuple[float, float] = (0.5, 2.0)
  max_share: float = 0.75
  flip: bool = True
  photometric: bool = False
  fill: tuple[int, int, int] = (128, 128, 128)


def base_scale(height: int, width: int, resize: str, image_size: int) -> float:
  """Returns by what an image's sides are multiplied before any factor.

  Args:
    height: of the image in pixels.
    width: of the image in pixels.
    resize: "shorter" or "none", as `Crops.resize`.
    image_size: side of the model's input in pixels.
  """
  if resize == "none":
    return 1.0
  shorter, longer = sorted((height, width))
  return min(image_size / shorter, MAX_ASPECT * image_size / longer)


def crop(
  image: UInt8[np.ndarray, "h w 3"],
  labels: Int16[np.ndarray, "h w"],
  rng: np.random.Generator,
  crops: Crops,
  image_size: int,
) -> tuple[UInt8[np.ndarray, "s s 3"], Int16[np.ndarray, "s s"]]:
  """Returns a window of an image and of its mask, of the same pixels.

  Only the window is resized: the image bilinearly, with antialias where it becomes
  smaller; the mask to the nearest.

  Args:
    image: the whole image.
    labels: the class of each pixel.
    rng: what is drawn comes from it, in a fixed order.
    crops: how.
    image_size: side of the window in pixels, s.
  """
  height, width = labels.shape
  low, high = crops.scales
  scale = base_scale(height, width, crops.resize, image_size)
  scale *= low + (high - low) * rng.random()
  # Of the resized image; the factor is then that of whole pixels.
  rows, columns = (max(1, round(side * scale)) for side in (height, width))
  size = min(rows, image_size), min(columns, image_size)
  for attempt in range(_TRIES):
    top, left = rng.integers(0, (rows - size[0] + 1, columns - size[1] + 1)).tolist()
    window = _nearest(labels, rows, columns, top, left, size)
    counts = np.bincount(window[window != IGNORED].ravel(), minlength=1)
    if counts.max() <= crops.max_share * counts.sum() or attempt == _TRIES - 1:
      break
    # One class alone is no better elsewhere.
  pixels = _bilinear(image, rows, columns, top, left, size)
  if crops.flip and rng.random() < 0.5:
    pixels, window = pixels[:, ::-1], window[:, ::-1]
  if crops.photometric:
    pixels = distort(pixels, rng)
  out = np.empty((image_size, image_size, 3), np.uint8)
  out[:] = np.array(crops.fill, np.uint8)
  out[: size[0], : size[1]] = pixels
  target = np.full((image_size, image_size), IGNORED, np.int16)
  target[: size[0], : size[1]] = window
  return out, target


def distort(
  pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns an image in other colours; each change is made in half of the cases.

  In this order: a number in [-32, 32] is added; either now or at last it is multiplied
  by one in [0.5, 1.5]; in HSV, saturation is multiplied by one in [0.5, 1.5], and hue
  turned by up to 36 degrees.

  Source: mmsegmentation's `PhotoMetricDistortion`, which is that of SSD (Liu et al.
  2016, "SSD: Single Shot MultiBox Detector") without its swap of channels.

  Args:
    pixels: RGB in [0, 255].
    rng: what is drawn comes from it, in a fixed order.
  """
  from PIL import Image

  is_on = rng.random(4) < 0.5
  contrast_is_first = rng.random() < 0.5
  brightness, hue = rng.uniform(-32, 32), rng.uniform(-36, 36)
  contrast, saturation = rng.uniform(0.5, 1.5, 2)
  values = pixels.astype(np.float32) + (brightness if is_on[0] else 0)
  if is_on[1] and contrast_is_first:
    values = np.clip(values, 0, 255) * contrast
  if is_on[2] or is_on[3]:
    hsv = np.asarray(Image.fromarray(_levels(values)).convert("HSV")).astype(np.float32)
    if is_on[2]:
      hsv[..., 1] *= saturation
    if is_on[3]:
      # Pillow's hue is 255 for a whole turn.
      hsv[..., 0] = (hsv[..., 0] + hue / 360 * 255) % 255
    channels = [Image.fromarray(_levels(hsv[..., i])) for i in range(3)]
    values = np.asarray(Image.merge("HSV", channels).convert("RGB"))
  if is_on[1] and not contrast_is_first:
    values = np.clip(values, 0, 255) * contrast
  return _levels(values)


def _levels(values: np.ndarray) -> np.ndarray:
  """Returns numbers as whole ones in [0, 255]."""
  return np.clip(values, 0, 255).round().astype(np.uint8)


def _nearest(
  labels: np.ndarray,
  rows: int,
  columns: int,
  top: int,
  left: int,
  size: tuple[int, int],
) -> np.ndarray:
  """Returns a window of what a mask is when it is resized to rows x columns."""
  height, width = labels.shape
  # In whole numbers: the pixel in which the middle of the new one lies.
  y = (2 * np.arange(top, top + size[0]) + 1) * height // (2 * rows)
  x = (2 * np.arange(left, left + size[1]) + 1) * width // (2 * columns)
  return labels[y][:, x]


def _bilinear(
  image: np.ndarray,
  rows: int,
  columns: int,
  top: int,
  left: int,
  size: tuple[int, int],
) -> np.ndarray:
  """Returns a window of what an image is when it is resized to rows x columns."""
  from PIL import Image

  height, width = image.shape[:2]
  y, x = height / rows, width / columns
  # Rounding must not lead out of the image.
  box = (
    left * x,
    top * y,
    min((left + size[1]) * x, width),
    min((top + size[0]) * y, height),
  )
  resized = Image.fromarray(image).resize(
    size[::-1], Image.Resampling.BILINEAR, box=box
  )
  return np.asarray(resized)


def train_batches(
  split: MaskSplit,
  *,
  batch_size: int,
  seed: int,
  crops: Crops,
  image_size: int,
  start_step: int = 0,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, Array]]:
  """Yields batches for ever; batch t depends only on the split, `seed` and t.

  Each epoch visits the images in a new order; what does not fill a last batch is left
  out of that epoch. Close the iterator to end its threads.

  Args:
    split: what is trained on.
    batch_size: number of images in a batch, b, over all devices and processes.
    seed: of the order and of all that is drawn.
    crops: how images are cropped.
    image_size: side of the model's input in pixels.
    start_step: the first step to yield, to go on after an interruption.
    sharding: the sharding of a batch, by its leading axis; None for the default device.

  Returns:
    An iterator of {"images": uint8 [b, s, s, 3], "masks": int16 [b, s, s]}, where
    `label_maps.IGNORED` is the class of pixels that count for nothing.

  Raises:
    ValueError: if there are fewer than `batch_size` images.
  """
  schedule = pipeline.Schedule(
    num_examples=len(split),
    batch_size=batch_size,
    steps_per_epoch=pipeline.steps_per_epoch(len(split), batch_size),
    seed=seed,
    start_step=start_step,
    balanced_classes=0,
  )
  return _train_batches(split, schedule, crops, image_size, sharding)


def _train_batches(split, schedule: pipeline.Schedule, crops, image_size, sharding):
  """Yields the batches of `train_batches`; each process reads its own rows only."""
  rows = pipeline.local_rows(sharding, schedule.batch_size)

  def items() -> Iterator[tuple[int, int, int]]:
    """Yields (step, row, position in the split) of each crop."""
    epoch, order = None, np.zeros(0, np.int64)
    for step, on_device in schedule.steps(split.labels):
      if epoch != step // schedule.steps_per_epoch:
        epoch, order = step // schedule.steps_per_epoch, jax.device_get(on_device)
      start = resident.batch_start(step, schedule.num_examples, schedule.batch_size)
      indices = order[start : start + schedule.batch_size]
      yield from ((step, int(row), int(indices[row])) for row in rows)

  with open_folder_or_zip(split.files.images.root) as root:

    def cut(item: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
      step, row, position = item
      image, labels = split.files.read(root, position)
      rng = np.random.default_rng((schedule.seed, step, row))
      return crop(image, labels, rng, crops, image_size)

    ahead = max(_AHEAD, 2 * len(rows))
    # Closed before the root is: the threads read from it until they end.
    with contextlib.closing(prefetch.ordered_map(cut, items(), ahead=ahead)) as cuts:
      while True:
        images, masks = zip(*(next(cuts) for _ in rows), strict=True)
        batch = {"images": np.stack(images), "masks": np.stack(masks)}
        yield pipeline.put_rows(batch, rows, schedule.batch_size, sharding)
