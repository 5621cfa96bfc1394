"""Classes of the pixels of an image of any size, by a model that takes one size.

The image is resized to each of some scales, the model is applied to windows that cover
it, logits are averaged where windows overlap, and resized to the image's own size.

Memory is bounded: of one scale no more than a band of logits is held, as high as a
window and as wide as the image. With several scales or flips probabilities are averaged
over them, for which there is one array of the image's own size.

Letters in shapes: h and w height and width of an image in pixels, s side of a window, k
classes.

Source: mmsegmentation's `slide_inference` and `aug_test`, which SETR and VPT are
evaluated with; here windows, scales and the order of sums are the same.
"""

from collections.abc import Callable, Iterator
import dataclasses

from jaxtyping import Float32, Int16, UInt8
import numpy as np

from insvp_jax.data.mask_batches import base_scale

# Of what is computed at a time of an image's own size, at most so many bytes.
_STRIP_BYTES = 2**24

# Maps windows, uint8 [n, s, s, 3], to their logits, float32 [n, s, s, k].
LogitsOf = Callable[[np.ndarray], np.ndarray]


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
  shape = image.shape[:2]
  views = [(scale, flip) for scale in windows.scales for flip in (False, True)]
  views = [view for view in views if windows.flips or not view[1]]
  classes = np.empty(shape, np.int16)
  if len(views) == 1:
    for rows, logits in _view(image, logits_of, windows, *views[0]):
      classes[rows] = logits.argmax(axis=-1)
    return classes
  total: np.ndarray | None = None
  for view in views:
    for rows, logits in _view(image, logits_of, windows, *view):
      if total is None:
        total = np.zeros((*shape, logits.shape[-1]), np.float32)
      total[rows] += _softmax(logits)
  step = _strip_rows(shape[1], total.shape[-1])
  for start in range(0, shape[0], step):
    rows = slice(start, start + step)
    classes[rows] = total[rows].argmax(axis=-1)
  return classes


def _strip_rows(width: int, num_classes: int) -> int:
  """Returns how many rows of an image's own size are computed at a time."""
  return max(1, _STRIP_BYTES // (4 * width * num_classes))


def _view(
  image: np.ndarray, logits_of: LogitsOf, windows: Windows, scale: float, flip: bool
) -> Iterator[tuple[slice, Float32[np.ndarray, "r w k"]]]:
  """Yields (rows, their logits at the image's own size), from the top down."""
  height, width = image.shape[:2]
  scale *= base_scale(height, width, windows.resize, windows.size)
  rows, columns = (max(1, round(side * scale)) for side in (height, width))
  resized = _resized(image, rows, columns)
  band = _Band(resized[:, ::-1] if flip else resized, logits_of, windows)
  start = 0
  left, right, across = _taps(columns, np.arange(width), width)
  while start < height:
    # How many classes there are is known once there are logits.
    step = _strip_rows(width, band.num_classes) if band.num_classes else 1
    own = np.arange(start, min(start + step, height))
    low, high, down = _taps(rows, own, height)
    source = band.rows(int(low[0]), int(high[-1]) + 1)
    if flip:
      source = source[:, ::-1]
    low, high = low - low[0], high - low[0]
    if rows != height:
      source = _mix(source[low], source[high], down[:, None, None])
    if columns != width:
      source = _mix(source[:, left], source[:, right], across[:, None])
    yield slice(start, start + len(own)), source
    start += len(own)


def _resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Returns an image resized bilinearly, with antialias where it becomes smaller."""
  if image.shape[:2] == (rows, columns):
    return image
  from PIL import Image

  resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
  return np.asarray(resized)


def _taps(
  size: int, positions: np.ndarray, out_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the two source positions of some new ones, and the second's weight.

  Bilinear, with half-pixel centres; the identity where both sizes are equal.
  """
  source = np.clip((positions + 0.5) * size / out_size - 0.5, 0, size - 1)
  low = np.floor(source).astype(np.int64)
  # No second one where it has no weight: it may not be there yet, or never.
  return low, low + (source > low), (source - low).astype(np.float32)


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Returns first + (second - first) * weight, in place of both: they are copies."""
  second -= first
  second *= weight
  second += first
  return second


def _softmax(logits: Float32[np.ndarray, "r w k"]) -> Float32[np.ndarray, "r w k"]:
  values = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return values / values.sum(axis=-1, keepdims=True)


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
  """Logits of an image, averaged over windows, some rows at a time, downwards."""

  def __init__(self, image: np.ndarray, logits_of: LogitsOf, windows: Windows):
    """Computes nothing yet."""
    self._size, self._logits_of = windows.size, logits_of
    self._height, self._width = image.shape[:2]
    shape = [max(side, windows.size) for side in image.shape[:2]]
    if shape != list(image.shape[:2]):
      whole = np.empty((*shape, 3), np.uint8)
      whole[:] = np.array(windows.fill, np.uint8)
      whole[: self._height, : self._width] = image
      image = whole
    self._image = image
    self._tops, self._lefts = (
      starts(side, self._size, windows.stride) for side in shape
    )
    self._down, self._across = (
      _cover(begins, self._size, side)
      for begins, side in zip((self._tops, self._lefts), shape, strict=True)
    )
    # Sums of the s rows from `_start` on, and averages of rows before them that may
    # still be asked for.
    self._start, self._next = 0, 0
    self._sums: np.ndarray | None = None
    self._done: list[tuple[int, np.ndarray]] = []
    self._batch = windows.batch

  @property
  def num_classes(self) -> int:
    """Returns k; 0 before any logits were computed."""
    return 0 if self._sums is None else self._sums.shape[-1]

  def rows(self, low: int, high: int) -> Float32[np.ndarray, "r w k"]:
    """Returns the averages of rows low, ..., high - 1; `low` must never become less."""
    while self._start < high:
      self._advance()
    self._done = [(at, x) for at, x in self._done if at + len(x) > low]
    parts = [x[max(low - at, 0) : high - at] for at, x in self._done if at < high]
    # Always a copy: what is returned is written to.
    return np.concatenate(parts)[:, : self._width]

  def _advance(self) -> None:
    """Adds the next row of windows; what is above the one after it is done then."""
    top, self._next = self._tops[self._next], self._next + 1
    for left, logits in self._logits(top):
      if self._sums is None:
        shape = (self._size, self._image.shape[1], logits.shape[-1])
        self._sums = np.zeros(shape, np.float32)
      self._sums[:, left : left + self._size] += logits
    is_last = self._next == len(self._tops)
    count = (len(self._image) if is_last else self._tops[self._next]) - top
    counts = self._down[top : top + count, None] * self._across
    self._done.append((top, self._sums[:count] / counts[..., None]))
    self._start = top + count
    if not is_last:
      self._sums[: self._size - count] = self._sums[count:]
      self._sums[self._size - count :] = 0

  def _logits(self, top: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (left, logits [s, s, k]) of the windows that begin at `top`."""
    size = self._size
    for i in range(0, len(self._lefts), self._batch):
      lefts = self._lefts[i : i + self._batch]
      windows = [self._image[top : top + size, x : x + size] for x in lefts]
      yield from zip(lefts, self._logits_of(np.stack(windows)), strict=True)


def _cover(begins: list[int], window: int, size: int) -> Float32[np.ndarray, "n"]:
  """Returns how many windows cover each position of a side."""
  counts = np.zeros(size, np.float32)
  for begin in begins:
    counts[begin : begin + window] += 1
  return counts
