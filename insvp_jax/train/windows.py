"""Classes of the pixels of an image of any size, by a model that takes one size.

The image is resized to each of some scales, the model is applied to windows that cover
it, logits are averaged where windows overlap, and resized to the image's own size. All
of it happens where the model's logits are; what comes back is a class for each pixel.

Memory is bounded: of one scale no more than a band of logits is held, as high as a
window and as wide as the image, beside those of a batch of windows and of a strip of
the image's own size. With several scales or flips probabilities are averaged over them,
for which there is one array of the image's own size.

Programs are compiled for widths that are multiples of half a window, not for every one.

Letters in shapes: h and w height and width of an image in pixels, s side of a window, k
classes, r rows of a strip, c columns of the resized image, up to a multiple.

Source: mmsegmentation's `slide_inference` and `aug_test`, which SETR and VPT are
evaluated with; here windows, scales and the order of sums are the same.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int16, UInt8
import numpy as np

from insvp_jax.data.label_maps import IGNORED
from insvp_jax.data.mask_batches import base_scale

# Of what is computed at a time of an image's own size, at most so many bytes.
_STRIP_BYTES = 2**26
# Widths are rounded up to multiples of half a window, or of so many pixels.
_LEAST_STEP = 64

# Maps windows, uint8 [n, s, s, 3], to their logits, float32 [m, s, s, k]; beyond the
# first n there is padding.
LogitsOf = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Windows:
  """How an image is covered.

  Attributes:
    size: pixels per side of a window, s.
    stride: pixels from one window to the next, at most `size`.
    resize: "shorter" or "none", as `mask_batches.Crops.resize`.
    scales: factors of the sides of the resized image.
    flips: whether each scale is seen mirrored, too.
    fill: RGB of what is beyond an image that is smaller than a window.
    batch: windows that the model is applied to at once, at most.
  """

  size: int
  stride: int
  resize: str = "shorter"
  scales: tuple[float, ...] = (1.0,)
  flips: bool = False
  fill: tuple[int, int, int] = (128, 128, 128)
  batch: int = 8


def segment(
  image: UInt8[np.ndarray, "h w 3"], logits_of: LogitsOf, windows: Windows
) -> Int16[np.ndarray, "h w"]:
  """Returns the class of each pixel of an image.

  Args:
    image: of any size.
    logits_of: the model, of some windows of one row of them at a time.
    windows: how the image is covered.
  """
  return score(image, None, logits_of, windows)[0]


def score(
  image: UInt8[np.ndarray, "h w 3"],
  labels: Int16[np.ndarray, "h w"] | None,
  logits_of: LogitsOf,
  windows: Windows,
) -> tuple[Int16[np.ndarray, "h w"], float]:
  """Returns the class of each pixel, and the sum of the cross-entropies in nats.

  Args:
    image: of any size.
    labels: the class that each pixel has; `IGNORED` ones count for nothing. None where
      they are not known: then the sum is 0.
    logits_of: the model, of some windows of one row of them at a time.
    windows: how the image is covered.
  """
  height, width = image.shape[:2]
  views = [(scale, flip) for scale in windows.scales for flip in (False, True)]
  views = [view for view in views if windows.flips or not view[1]]
  found = _Found(height, width, labels)
  if len(views) == 1:
    for start, stop, logits in _view(image, logits_of, windows, *views[0]):
      found.add(start, stop, logits)
    return found.result()
  total: Array | None = None
  for view in views:
    for start, stop, logits in _view(image, logits_of, windows, *view):
      if total is None:
        # As many rows as any strip may begin at, and the longest strip.
        rows = _rounded(height, windows.size) + windows.size
        total = _zeros(logits, (rows, *logits.shape[1:]))
      total = _add_shares(total, logits, np.int32(start), np.int32(stop - start))
  for start in range(0, height, len(logits)):
    # The sum of probabilities has the cross-entropy of their mean.
    shares = _log_rows(total, np.int32(start), len(logits))
    found.add(start, min(start + len(logits), height), shares)
  return found.result()


class _Found:
  """Classes and nats of an image, strip by strip."""

  def __init__(self, height: int, width: int, labels: np.ndarray | None):
    """Has found nothing yet."""
    self._classes, self._labels = np.empty((height, width), np.int16), labels
    self._nats = 0.0

  def add(self, start: int, stop: int, logits: Float32[Array, "r w k"]) -> None:
    """Takes the logits of rows start, ..., stop - 1; what is beyond is padding."""
    shape, width = logits.shape[:2], self._classes.shape[1]
    labels = None
    if self._labels is not None:
      labels = np.full(shape, IGNORED, np.int16)
      labels[: stop - start, :width] = self._labels[start:stop]
    classes, nats = _read(logits, labels)
    self._classes[start:stop] = np.asarray(classes)[: stop - start, :width]
    self._nats += float(nats)

  def result(self) -> tuple[np.ndarray, float]:
    """Returns (classes, nats)."""
    return self._classes, self._nats


def _view(
  image: np.ndarray, logits_of: LogitsOf, windows: Windows, scale: float, flip: bool
) -> Iterator[tuple[int, int, Float32[Array, "r w k"]]]:
  """Yields (start, stop, logits of these rows at the image's own size), downwards.

  Beyond stop - start rows, and the image's width, there is padding.
  """
  height, width = image.shape[:2]
  scale *= base_scale(height, width, windows.resize, windows.size)
  rows, columns = (max(1, round(side * scale)) for side in (height, width))
  resized = _resized(image, rows, columns)
  band = _Band(resized[:, ::-1] if flip else resized, logits_of, windows)
  padded = _rounded(width, windows.size)
  left, right, across = (_padded(x, padded) for x in _taps(columns, width))
  if flip:
    left, right = columns - 1 - left, columns - 1 - right
  low, high, down = _taps(rows, height)
  start = 0
  while start < height:
    known = band.advance()
    # Where rows that are known are all that is needed: `high` ascends.
    ready = int(np.searchsorted(high, known))
    row_bytes = 4 * max(padded, band.sums.shape[1]) * band.sums.shape[2]
    step = min(windows.size, max(1, _STRIP_BYTES // row_bytes))
    while start < ready:
      stop = min(start + step, ready)
      at = (low[start:stop] - band.first, high[start:stop] - band.first)
      taps = tuple(_padded(x, step) for x in (*at, down[start:stop]))
      yield start, stop, _strip(band.sums, *band.counts(), taps, (left, right, across))
      start = stop


def _rounded(side: int, size: int) -> int:
  """Returns a side, rounded up so that few programs are compiled."""
  step = max(_LEAST_STEP, size // 2)
  return -(-side // step) * step


def _padded(values: np.ndarray, size: int) -> np.ndarray:
  """Returns values, filled up with 0."""
  return np.pad(values, (0, size - len(values)))


def _resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Returns an image resized bilinearly, with antialias where it becomes smaller."""
  if image.shape[:2] == (rows, columns):
    return image
  from PIL import Image

  resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
  return np.asarray(resized)


def _taps(size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the two source positions of each new one, and the second's weight.

  Bilinear, with half-pixel centres; the identity where both sizes are equal.
  """
  source = np.clip((np.arange(out_size) + 0.5) * size / out_size - 0.5, 0, size - 1)
  low = np.floor(source).astype(np.int32)
  # No second one where it has no weight: it may not be there yet, or never.
  high = low + (source > low).astype(np.int32)
  return low, high, (source - low).astype(np.float32)


def held_bytes(size: int, num_classes: int, aspect: float = 2.0) -> int:
  """Returns how many bytes of logits are held at most, but for those of windows.

  Two bands, while one is moved, and two strips; of one scale, not mirrored.

  Args:
    size: pixels per side of a window.
    num_classes: k.
    aspect: the longer side of an image per its shorter one, which is `size`.
  """
  columns = _rounded(round(aspect * size), size)
  band = 4 * (size + 1) * columns * num_classes
  return 2 * band + 2 * min(_STRIP_BYTES, band)


def starts(size: int, window: int, stride: int) -> list[int]:
  """Returns where windows begin that cover a side; the last one ends with it.

  Args:
    size: of the side in pixels, at least that of a window.
    window: size of a window.
    stride: from one window to the next.
  """
  count = -(-(size - window) // stride) + 1
  return [min(i * stride, size - window) for i in range(count)]


class _Band:
  """Logits of an image, summed over windows, one row of windows at a time, downwards.

  Attributes:
    sums: float32 [s + 1, c, k], of the rows from `first` on: the last one of the row of
      windows before, since rows are interpolated, and those of this one.
    first: row of the image that the first one is; -1 at the top.
  """

  sums: Any

  def __init__(self, image: np.ndarray, logits_of: LogitsOf, windows: Windows):
    """Computes nothing yet."""
    size = windows.size
    self._size, self._logits_of, self._batch = size, logits_of, windows.batch
    shape = [max(side, size) for side in image.shape[:2]]
    if shape != list(image.shape[:2]):
      whole = np.empty((*shape, 3), np.uint8)
      whole[:] = np.array(windows.fill, np.uint8)
      whole[: image.shape[0], : image.shape[1]] = image
      image = whole
    self._image = image
    self._tops, self._lefts = (starts(side, size, windows.stride) for side in shape)
    # Nothing is divided by 0 in what is beyond the image.
    down = _cover(self._tops, size, shape[0])
    self._down = np.pad(down, (1, size), constant_values=1)
    across = _cover(self._lefts, size, shape[1])
    padding = _rounded(shape[1], size) - shape[1]
    self._across = np.pad(across, (0, padding), constant_values=1)
    self._next, self.first, self.sums = 0, -1, None

  def counts(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many windows cover each row, [s + 1], and column, [c], of `sums`."""
    return self._down[self.first + 1 :][: self._size + 1], self._across

  def advance(self) -> int:
    """Adds the next row of windows; returns the row before which all are complete."""
    top, size = self._tops[self._next], self._size
    if self._next:
      self.sums = _shift(self.sums, np.int32(top - 1 - self.first))
    self.first = top - 1
    for i in range(0, len(self._lefts), self._batch):
      lefts = self._lefts[i : i + self._batch]
      windows = [self._image[top : top + size, x : x + size] for x in lefts]
      logits = self._logits_of(np.stack(windows))
      if self.sums is None:
        shape = (size + 1, len(self._across), logits.shape[-1])
        self.sums = _zeros(logits, shape)
      places = _padded(np.array(lefts, np.int32), len(logits))
      self.sums = _add_windows(self.sums, logits, places, np.int32(len(lefts)))
    self._next += 1
    is_last = self._next == len(self._tops)
    return len(self._image) if is_last else self._tops[self._next]


def _cover(begins: list[int], window: int, size: int) -> Float32[np.ndarray, "n"]:
  """Returns how many windows cover each position of a side."""
  counts = np.zeros(size, np.float32)
  for begin in begins:
    counts[begin : begin + window] += 1
  return counts


# --- What is computed where the logits are.


@functools.partial(jax.jit, static_argnums=1, keep_unused=True)
def _zeros(logits: Array, shape: tuple[int, ...]) -> Array:
  """Returns zeros that lie where the logits do, on all devices and processes."""
  del logits
  return jnp.zeros(shape, jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def _add_windows(sums: Array, logits: Array, lefts: Array, count: Array) -> Array:
  """Returns the sums of a band with those of the first `count` windows."""

  def add(i: Array, sums: Array) -> Array:
    at = (1, lefts[i], 0)
    old = jax.lax.dynamic_slice(sums, at, logits.shape[1:])
    return jax.lax.dynamic_update_slice(sums, old + logits[i], at)

  return jax.lax.fori_loop(0, count, add, sums)


@jax.jit
def _shift(sums: Array, count: Array) -> Array:
  """Returns a band so many rows further down; what is new is 0."""
  rows = jnp.arange(len(sums)) + count
  moved = jnp.take(sums, rows, axis=0, mode="clip")
  return jnp.where((rows < len(sums))[:, None, None], moved, 0)


@jax.jit
def _strip(
  sums: Array,
  down: Array,
  across: Array,
  row_taps: tuple[Array, ...],
  column_taps: tuple[Array, ...],
) -> Float32[Array, "r w k"]:
  """Returns averages over windows, interpolated to rows and columns of the image.

  Args:
    sums: of a `_Band`.
    down: windows over each row of it.
    across: windows over each column of it.
    row_taps: as `_taps` of the rows, in those of `sums`.
    column_taps: as `_taps` of the columns.
  """

  def rows(at: Array) -> Array:
    return sums[at] / (down[at][:, None] * across)[..., None]

  low, high, weight = row_taps
  first = rows(low)
  values = first + (rows(high) - first) * weight[:, None, None]
  left, right, weight = column_taps
  first = values[:, left]
  return first + (values[:, right] - first) * weight[:, None]


@functools.partial(jax.jit, donate_argnums=0)
def _add_shares(total: Array, logits: Array, start: Array, count: Array) -> Array:
  """Returns the total with the probabilities of `count` rows from `start` on."""
  is_real = (jnp.arange(len(logits)) < count)[:, None, None]
  old = jax.lax.dynamic_slice_in_dim(total, start, len(logits))
  new = old + jnp.where(is_real, jax.nn.softmax(logits), 0)
  return jax.lax.dynamic_update_slice_in_dim(total, new, start, 0)


@functools.partial(jax.jit, static_argnums=2)
def _log_rows(total: Array, start: Array, count: int) -> Array:
  """Returns the logarithm of `count` rows from `start` on; finite, of 0, too."""
  rows = jax.lax.dynamic_slice_in_dim(total, start, count)
  return jnp.log(jnp.maximum(rows, jnp.finfo(rows.dtype).tiny))


@jax.jit
def _read(logits: Array, labels: Array | None) -> tuple[Array, Array]:
  """Returns the class of each pixel, int16, and the nats of all that have a label."""
  classes = jnp.argmax(logits, axis=-1).astype(jnp.int16)
  if labels is None:
    return classes, jnp.zeros((), jnp.float32)
  is_real = labels != IGNORED
  known = jnp.where(is_real, labels, 0).astype(jnp.int32)
  nats = jax.nn.logsumexp(logits, axis=-1)
  nats -= jnp.take_along_axis(logits, known[..., None], axis=-1)[..., 0]
  return classes, jnp.sum(jnp.where(is_real, nats, 0))
