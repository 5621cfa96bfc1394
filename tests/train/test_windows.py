"""Images of any size by a model of one size: every pixel once, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax.data.label_maps import IGNORED
from insvp_jax.train import windows as windows_lib
from insvp_jax.train.objectives.segmentation import confusion_of, metrics
from insvp_jax.train.windows import Windows, score, segment, starts

NUM_CLASSES = 5


def image_of(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def logits_of(windows):
  """A model of one pixel and of where it is in the window, so that windows differ."""
  x = windows.astype(np.float32) / 255
  place = np.linspace(0, 1, windows.shape[2], dtype=np.float32)[None, None, :, None]
  parts = [x, x[..., :1] * place, 1 - x[..., 1:2] * place.swapaxes(1, 2)]
  return np.concatenate(parts, axis=-1)


def resized(values, height, width):
  """Bilinear, half-pixel centres, written as two matrices."""

  def matrix(size, out):
    rows = np.zeros((out, size))
    at = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.floor(at).astype(int)
    for i in range(out):
      rows[i, low[i]] += 1 - (at[i] - low[i])
      rows[i, min(low[i] + 1, size - 1)] += at[i] - low[i]
    return rows

  down, across = matrix(values.shape[0], height), matrix(values.shape[1], width)
  return np.einsum("ab,bcd,ec->aed", down, values.astype(np.float64), across)


def averaged(image, size, stride):
  """All windows at once: sums and counts of the whole image."""
  height, width = image.shape[:2]
  padded = np.full((max(height, size), max(width, size), 3), 128, np.uint8)
  padded[:height, :width] = image
  sums, counts = np.zeros((*padded.shape[:2], NUM_CLASSES)), np.zeros(padded.shape[:2])
  for y in starts(padded.shape[0], size, stride):
    for x in starts(padded.shape[1], size, stride):
      window = padded[y : y + size, x : x + size]
      sums[y : y + size, x : x + size] += logits_of(window[None])[0]
      counts[y : y + size, x : x + size] += 1
  assert counts.min() >= 1
  return (sums / counts[..., None])[:height, :width]


def test_windows_cover_a_side_and_end_with_it():
  assert starts(16, 16, 10) == [0]
  assert starts(17, 16, 10) == [0, 1]
  assert starts(40, 16, 10) == [0, 10, 20, 24]
  # mmsegmentation's for an image of ADE20K.
  assert starts(683, 512, 341) == [0, 171]


def test_one_window_is_one_whole_pass():
  image = image_of(16, 16)
  whole = logits_of(image[None])[0].argmax(-1)
  for resize in ("none", "shorter"):
    found = segment(image, logits_of, Windows(16, 10, resize))
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("height, width", [(16, 40), (37, 23), (9, 30), (5, 7)])
@pytest.mark.parametrize("batch", [1, 3])
def test_overlapping_windows_are_averaged(height, width, batch):
  image = image_of(height, width)
  windows = Windows(16, 10, "none", batch=batch)
  expected = averaged(image, 16, 10).argmax(-1)
  np.testing.assert_array_equal(segment(image, logits_of, windows), expected)


@pytest.mark.parametrize(
  "height, width, scales, strip_bytes",
  [
    (29, 50, (0.75, 1.5), 2**26),
    # Strips of two rows, and then of four, since the band is half as wide.
    (11, 30, (3.0, 0.75), 4 * 128 * NUM_CLASSES * 2),
  ],
)
def test_logits_are_resized_to_the_image_and_scales_and_flips_are_averaged(
  monkeypatch, height, width, scales, strip_bytes
):
  from PIL import Image

  monkeypatch.setattr(windows_lib, "_STRIP_BYTES", strip_bytes)
  image = image_of(height, width)
  total = np.zeros((height, width, NUM_CLASSES))
  for scale in scales:
    factor = scale * 16 / min(height, width)
    sides = round(width * factor), round(height * factor)
    scaled = np.asarray(Image.fromarray(image).resize(sides, Image.BILINEAR))
    for flip in (False, True):
      view = averaged(scaled[:, ::-1] if flip else scaled, 16, 10)
      logits = resized(view[:, ::-1] if flip else view, height, width)
      if (scale, flip) == (0.75, False):
        one = segment(image, logits_of, Windows(16, 10, scales=(0.75,)))
        np.testing.assert_array_equal(one, logits.argmax(-1))
      shares = np.exp(logits)
      total += shares / shares.sum(-1, keepdims=True)
  windows = Windows(16, 10, scales=scales, flips=True)
  labels = np.random.default_rng(1).integers(-1, NUM_CLASSES, (height, width), np.int16)
  found, nats = score(image, labels, logits_of, windows)
  assert (found == total.argmax(-1)).mean() > 0.995  # but for ties in float32
  each = -np.log(total / total.sum(-1, keepdims=True))
  expected = sum(each[i][labels[i]] for i in np.ndindex(labels.shape) if labels[i] >= 0)
  assert nats == pytest.approx(expected, rel=1e-4)


def test_an_image_of_2048_pixels_never_has_the_logits_of_all_windows(monkeypatch):
  size, stride, num_classes = 512, 341, 8
  seen, held = [], []
  before = live_bytes()

  def cheap(windows):
    seen.append(len(windows))
    held.append(live_bytes() - before)
    zeros = jnp.zeros((*windows.shape[:3], num_classes), jnp.float32)
    return zeros.at[..., 1].set(windows[..., 0])

  programs = ("_add_windows", "_shift", "_strip", "_read")
  for name in programs:
    monkeypatch.setattr(windows_lib, name, measured(getattr(windows_lib, name), held))
  image = image_of(2048, 2048)
  found = segment(image, cheap, Windows(size, stride, "none", batch=2))
  window = 4 * size**2 * num_classes
  assert sum(seen) == 36 and max(seen) == 2
  # Two bands, of four windows each, two windows and two strips: less than the image's
  # own logits, which are 16, and not the 36 windows.
  assert 4 * window < max(held) < 14 * window, max(held) / window
  np.testing.assert_array_equal(found, image[..., 0] > 0)


def live_bytes():
  return sum(array.nbytes for array in jax.live_arrays())


def measured(program, held):
  """Returns a program that says what is there while it runs, its temporaries too."""
  before = live_bytes()

  own = []

  def run(*arguments):
    if not own:  # All calls are of one shape.
      analysis = program.lower(*arguments).compile().memory_analysis()
      new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
      own.append(analysis.temp_size_in_bytes + new)
    held.append(live_bytes() - before + own[0])
    return program(*arguments)

  return run


def test_miou_is_that_of_numpy_written_out():
  rng = np.random.default_rng(0)
  confusion = np.zeros((6, 6), np.int64)
  everything = []
  for height, width in ((7, 9), (13, 4), (1, 30)):
    # The classes 4 and 5 are in no mask; 5 is found nowhere either.
    labels = rng.integers(-1, 4, (height, width)).astype(np.int16)
    found = rng.integers(0, 5, (height, width)).astype(np.int16)
    confusion += confusion_of(labels, found, 6)
    keep = labels != IGNORED
    everything.append((labels[keep], found[keep]))
  labels, found = (np.concatenate(parts) for parts in zip(*everything, strict=True))
  ious = [
    ((labels == c) & (found == c)).sum() / ((labels == c) | (found == c)).sum()
    for c in range(5)
  ]
  scored = metrics(confusion)
  assert scored["miou"] == pytest.approx(np.mean(ious), rel=1e-12)
  assert scored["pixel_accuracy"] == pytest.approx(np.mean(labels == found))
  recalls = [np.mean(found[labels == c] == c) for c in range(4)]
  assert scored["mean_accuracy"] == pytest.approx(np.mean(recalls))
  assert scored["class_iou"][4] == 0 and np.isnan(scored["class_iou"][5])
  assert scored["class_pixels"].tolist() == np.bincount(labels, minlength=6).tolist()
  with pytest.raises(ValueError, match="no pixel that counts"):
    metrics(np.zeros((2, 2), np.int64))
