import dataclasses
import re
import tracemalloc

from data_fixtures import pixels
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import preprocess
from insvp_jax.data.preprocess import PRESETS


def _train(preset, images, key, image_size):
  """Returns what the backbone sees of stored images while training."""
  return preprocess.normalise(
    preset, preprocess.augment(preset, images, key, image_size)
  )


def _noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", PRESETS)
def test_the_summary_is_one_line_with_the_name(name):
  line = PRESETS[name].summary()
  assert f"preset {name}: " in line and "\n" not in line


def test_published_values():
  assert "values in [-1, 1]" in PRESETS["vtab"].summary()
  assert PRESETS["vpt"].mean == (0.485, 0.456, 0.406)
  assert PRESETS["vpt"].std == (0.229, 0.224, 0.225)
  for name in ("vtab", "vpt"):
    assert PRESETS[name].resize == "tf1"
    assert not PRESETS[name].flip
  release = PRESETS["insvp_release"]
  assert release.flip and release.mean == PRESETS["vpt"].mean
  # The resize that VPT's code pairs with each crop; 36 is our 32-pixel models'.
  sizes = {224: 256, 384: 438, 448: 512, 32: 36}
  assert {size: release.stored_size(size) for size in sizes} == sizes


def test_unknown_preset_names_the_nearest():
  with pytest.raises(ValueError, match="unknown preset 'vtap'.*Did you mean 'vtab'"):
    preprocess.get_preset("vtap")


def test_resize_tf1_equals_tensorflow():
  tf = pytest.importorskip("tensorflow")
  for shape, (height, width) in [
    ((32, 32, 3), (224, 224)),
    ((8, 8, 3), (32, 32)),
    ((64, 96, 1), (32, 32)),
    ((37, 123, 3), (50, 224)),
    ((300, 200, 3), (224, 224)),
    ((1, 1, 3), (5, 7)),
  ]:
    image = _noise(*shape)
    expected = tf.raw_ops.ResizeBilinear(
      images=image[None],
      size=(height, width),
      align_corners=False,
      half_pixel_centers=False,
    ).numpy()[0]
    np.testing.assert_array_equal(
      preprocess.resize_tf1(image, height, width), expected, err_msg=str(shape)
    )


def test_resize_tf1_by_hand():
  # Without half-pixel centres, output i looks at input 1.5 i.
  row = np.array([0, 100, 200], np.uint8)
  image = np.broadcast_to(row[None, :, None], (2, 3, 1))
  np.testing.assert_array_equal(preprocess.resize_tf1(image, 1, 2)[0, :, 0], [0, 150])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(PRESETS)))
def test_any_shape_is_resized_to_the_stored_size(height, width, name):
  preset = PRESETS[name]
  size = preset.stored_size(14)
  resized = preprocess.resize(preset, _noise(height, width, 3), 14)
  assert resized.shape == (size, size, 3) and resized.dtype == np.uint8
  flat = np.full((height, width, 3), 99, np.uint8)
  assert (preprocess.resize(preset, flat, 14) == 99).all()


def test_shorter_side_keeps_the_aspect_ratio_and_the_centre():
  image = _noise(50, 101, 3)
  resized = preprocess.resize(PRESETS["insvp_release"], image, 28)
  # 256 / 224 * 28 = 32; 101 * 32 / 50 = 64.64 is cut to 64.
  whole = Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(resized, np.asarray(whole)[:, 16:48])


def test_tf1_aliases_and_modern_does_not():
  lines = np.zeros((64, 64, 3), np.uint8)
  lines[:, ::4] = 255
  assert preprocess.resize(PRESETS["vtab"], lines, 16).min() == 255
  assert preprocess.resize(PRESETS["modern"], lines, 16).max() < 100


def test_eval_takes_the_centre_and_normalises():
  preset = PRESETS["insvp_release"]
  images = _noise(2, 32, 32, 3)
  out = preprocess.eval_preprocess(preset, jax.numpy.asarray(images), 28)
  expected = (images[:, 2:30, 2:30] / 255 - preset.mean) / preset.std
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["vtab", "vpt", "modern"])
def test_presets_without_augmentation_train_as_they_evaluate(name):
  images = jax.numpy.asarray(_noise(3, 12, 12, 3))
  train = _train(PRESETS[name], images, jax.random.key(0), 12)
  evaluated = preprocess.eval_preprocess(PRESETS[name], images, 12)
  np.testing.assert_array_equal(train, evaluated)


def _candidates(preset, image, image_size):
  """Returns all crops and flips that one image may become, with their names."""
  pad = round(preset.pad * image_size)
  image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
  slack = image.shape[0] - image_size
  for top in range(slack + 1):
    for left in range(slack + 1):
      crop = image[top : top + image_size, left : left + image_size]
      yield (top, left, False), crop
      yield (top, left, True), crop[:, ::-1]


@pytest.mark.parametrize("name,stored", [("cifar", 16), ("insvp_release", 18)])
def test_augmented_images_are_crops_and_flips(name, stored):
  preset = dataclasses.replace(PRESETS[name], mean=(0.0,) * 3, std=(1.0,) * 3)
  assert preset.stored_size(16) == stored
  image = _noise(stored, stored, 3)
  known = {crop.tobytes(): what for what, crop in _candidates(preset, image, 16)}
  batch = jax.numpy.asarray(np.stack([image] * 256))
  train = jax.jit(lambda x, key: _train(preset, x, key, 16))
  out = np.rint(np.asarray(train(batch, jax.random.key(1))) * 255).astype(np.uint8)
  drawn = [known[augmented.tobytes()] for augmented in out]
  # Every offset and both directions occur, and no offset is favoured.
  for axis in (0, 1):
    counts = np.bincount([what[axis] for what in drawn])
    offsets = 5 if name == "cifar" else 3
    assert len(counts) == offsets and counts.min() > 256 / offsets * 0.6
  assert 90 < sum(flip for _, _, flip in drawn) < 166
  assert len({what[:2] for what in drawn}) == offsets**2  # axes are independent

  again = np.asarray(train(batch, jax.random.key(1)))
  other = np.asarray(train(batch, jax.random.key(2)))
  np.testing.assert_array_equal(np.rint(again * 255).astype(np.uint8), out)
  assert not np.array_equal(other, again)


def test_images_of_another_size_are_refused():
  images = jax.numpy.asarray(pixels(0, 20)[None])
  for call in (
    lambda: preprocess.eval_preprocess(PRESETS["vtab"], images, 16),
    lambda: _train(PRESETS["vtab"], images, jax.random.key(0), 16),
  ):
    with pytest.raises(ValueError, match="images of 20 pixels came.*keeps 16 pixels"):
      call()


@given(
  st.sampled_from([224, 384, 448]), st.integers(0, 300), st.sampled_from(["h", "w"])
)
def test_evaluation_sees_what_torchvisions_center_crop_sees(image_size, extra, longer):
  preset = PRESETS["insvp_release"]
  stored = preset.stored_size(image_size)
  height, width = (
    (stored + extra, stored) if longer == "h" else (stored, stored + extra)
  )
  # Each pixel tells its row and column, modulo 256 and in multiples of it.
  rows, columns = np.mgrid[:height, :width]
  codes = rows % 256, columns % 256, rows // 256 * 16 + columns // 256
  image = np.stack(codes, -1).astype(np.uint8)
  square = preprocess.central_square(image, stored, image_size)
  assert square.shape == (stored, stored, 3)
  start = round((stored - image_size) / 2)
  seen = square[start : start + image_size, start : start + image_size]
  # torchvision: int(round((side - crop) / 2)).
  top, left = (int(round((side - image_size) / 2)) for side in (height, width))
  expected = image[top : top + image_size, left : left + image_size]
  np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("height", [8, 31, 33, 300])
def test_tf1_reads_the_same_rows_of_tall_images(height):
  image = _noise(height, 5, 3)
  tall = preprocess.resize_tf1(image, 8, 6)
  # Of two images side by side, as of one with leading axes.
  both = preprocess.resize_tf1(np.stack([image, image]), 8, 6)
  np.testing.assert_array_equal(both[1], tall)
  top, bottom, weight = preprocess._taps(height, 8)
  columns = preprocess.resize_tf1(image, height, 6)
  expected = columns[top] + (columns[bottom] - columns[top]) * weight[:, None, None]
  np.testing.assert_array_equal(tall, expected)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("shape", [(1, 3_000_000, 3), (3_000_000, 1, 3)])
def test_elongated_images_take_little_memory(name, shape):
  preset = preprocess.get_preset(name)
  image = np.broadcast_to(np.uint8(7), shape)
  tracemalloc.start()
  try:
    square = preprocess.resize(preset, image, 32)
    assert (square == 7).all()
  except ValueError as error:
    assert re.search("an image of .* is too elongated to be resized to", str(error))
  assert tracemalloc.get_traced_memory()[1] < 2**28
  tracemalloc.stop()
