"""Splits that are decoded while they are read: the same batches as from memory."""

from collections import deque
import contextlib
import dataclasses
import itertools
import os
import threading
import time

import data_fixtures as fixtures
from data_fixtures import data_config, encode, number_of, pixels, png
from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import (
  ArraySplit,
  StreamSplit,
  image_files,
  pipeline,
  prefetch,
  preprocess,
  resident,
  splits,
)
from insvp_jax.data.image_files import ImageFiles
from insvp_jax.data.preprocess import PRESETS

_RELEASE = PRESETS["insvp_release"]
# (height, width) of images, far from square and near to it.
_SIZES = [(40, 90), (33, 34), (80, 20), (32, 131), (57, 57), (31, 45), (100, 99)]

# Under jit NumPy's arrays will do.
_draw = jax.jit(preprocess.draw_windows, static_argnums=(0, 4))
_augment = jax.jit(preprocess.augment, static_argnums=(0, 3))


def _noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _write(root, images):
  """Writes images as files; their labels are their numbers."""
  names = [f"{i:03d}.png" for i in range(len(images))]
  content = dict(zip(names, map(png, images), strict=True))
  write = fixtures.write_zip if root.suffix == ".zip" else fixtures.write_folder
  return ImageFiles(
    str(write(root, content)), names, np.arange(len(images)).astype("i4")
  )


@pytest.fixture
def squares(tmp_path):
  images = [_noise(6 + i, 6 + i, i) for i in range(11)]
  return images, _write(tmp_path / "squares", images)


@pytest.fixture
def elongated(tmp_path):
  images = [_noise(*size, i) for i, size in enumerate(_SIZES)]
  return images, _write(tmp_path / "elongated.zip", images)


def _batches(split, number, **kwargs):
  batches = pipeline.train_batches(split, **kwargs)
  found = list(itertools.islice(batches, number))
  batches.close()
  return found


def _assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _decoders():
  return [t for t in threading.enumerate() if t.name.startswith("insvp_jax_decode")]


def _open_below(folder):
  targets = []
  for fd in os.listdir("/proc/self/fd"):
    with contextlib.suppress(FileNotFoundError):  # closed by now
      targets.append(os.readlink(f"/proc/self/fd/{fd}"))
  return [path for path in targets if path.startswith(str(folder))]


def _rows(mesh):
  return NamedSharding(mesh, PartitionSpec("data"))


@pytest.mark.parametrize("name", PRESETS)
def test_square_images_are_the_same_streamed_and_in_memory(squares, name):
  images, files = squares
  stream = files.stream(PRESETS[name], 14)
  stored = [preprocess.resize(PRESETS[name], image, 14) for image in images]
  memory = ArraySplit(np.stack(stored), np.arange(11, dtype=np.int32))
  taken = splits.to_memory(stream)
  np.testing.assert_array_equal(taken.images, memory.images)
  np.testing.assert_array_equal(taken.labels, memory.labels)
  some = np.array([7, 0, 7])
  np.testing.assert_array_equal(
    splits.to_memory(stream, some).images, memory.images[some]
  )
  assert stream.stored_size == memory.stored_size
  assert stream.nbytes == memory.images.nbytes
  options = {"batch_size": 4, "seed": 3, "preset": PRESETS[name], "image_size": 14}
  _assert_equal(_batches(stream, 5, **options), _batches(memory, 5, **options))
  known = dataclasses.replace(files, square=True).stream(PRESETS[name], 14)
  _assert_equal(_batches(known, 5, **options), _batches(memory, 5, **options))
  evaluated = pipeline.eval_batches(stream, batch_size=4)
  _assert_equal(evaluated, pipeline.eval_batches(memory, batch_size=4))


def _resize(image, size):
  """Returns the PIL image after torchvision's Resize(size)."""
  height, width = image.shape[:2]
  if height <= width:
    sides = (int(size * width / height), size)
  else:
    sides = (size, int(size * height / width))
  return Image.fromarray(image).resize(sides, Image.Resampling.BILINEAR)


def test_elongated_images_are_cropped_as_torchvision_does_it(elongated):
  images, files = elongated
  stream, steps, seed = files.stream(_RELEASE, 28), 6, 5
  whole = [_resize(image, 32) for image in images]
  batches = _batches(
    stream, steps, batch_size=3, seed=seed, preset=_RELEASE, image_size=28
  )
  flipped = set()
  for step, batch in enumerate(batches):
    chosen = [whole[label] for label in batch["labels"].tolist()]
    widths, heights = np.array([image.size for image in chosen]).T
    key = resident.augment_key(seed, step)
    windows, flips = _draw(_RELEASE, key, heights, widths, 28)
    for image, (top, left), flip, got in zip(
      chosen, windows.tolist(), flips.tolist(), batch["images"], strict=True
    ):
      assert 0 <= top <= image.height - 28 and 0 <= left <= image.width - 28
      crop = image.crop((left, top, left + 28, top + 28))
      if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      np.testing.assert_array_equal(got, np.asarray(crop))
      flipped.add(flip)
  assert flipped == {False, True}


def test_crops_reach_both_ends_of_the_long_side(tmp_path):
  # Pixels tell their row and column.
  rows, columns = np.mgrid[:32, :96]
  wide = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
  files = _write(tmp_path / "x", [wide, wide.transpose(1, 0, 2), wide, wide])
  options = {"batch_size": 4, "seed": 0, "preset": _RELEASE, "image_size": 28}
  lefts, tops = set(), set()
  for batch in _batches(files.stream(_RELEASE, 28), 160, **options):
    for image, label in zip(np.asarray(batch["images"]), batch["labels"], strict=True):
      if label != 1:
        tops.add(int(image[..., 0].min()))
        lefts.add(int(image[..., 1].min()))
  assert tops == set(range(5)) and lefts == set(range(69))


def test_evaluation_sees_torchvisions_centre(elongated):
  images, files = elongated
  (batch,) = pipeline.eval_batches(files.stream(_RELEASE, 28), batch_size=len(images))
  got = preprocess.eval_preprocess(_RELEASE, batch["images"], 28)
  for image, pixels_of in zip(images, got, strict=True):
    whole = _resize(image, 32)
    # CenterCrop(28)
    top, left = round((whole.height - 28) / 2.0), round((whole.width - 28) / 2.0)
    crop = np.asarray(whole.crop((left, top, left + 28, top + 28)))
    expected = (crop / 255 - _RELEASE.mean) / _RELEASE.std
    np.testing.assert_allclose(pixels_of, expected, rtol=1e-4, atol=1e-5)


def test_a_stream_is_a_function_of_seed_and_step(elongated):
  stream = elongated[1].stream(_RELEASE, 28)
  options = {"batch_size": 2, "preset": _RELEASE, "image_size": 28}
  batches = _batches(stream, 9, seed=4, **options)  # three batches in an epoch
  _assert_equal(_batches(stream, 9, seed=4, **options), batches)
  for start in (1, 3, 5):
    later = _batches(stream, 3, seed=4, start_step=start, **options)
    _assert_equal(later, batches[start : start + 3])
  labels = [
    np.concatenate([b["labels"] for b in batches[i : i + 3]]) for i in (0, 3, 6)
  ]
  assert all(len(set(epoch.tolist())) == 6 for epoch in labels)
  assert len({epoch.tobytes() for epoch in labels}) == 3
  other = np.concatenate([b["labels"] for b in _batches(stream, 3, seed=5, **options)])
  assert other.tolist() != labels[0].tolist()


def test_four_devices_see_what_one_sees(elongated, mesh):
  stream = elongated[1].stream(_RELEASE, 28)
  options = {"batch_size": 4, "seed": 2, "preset": _RELEASE, "image_size": 28}
  one = _batches(stream, 3, **options)
  four = _batches(stream, 3, sharding=_rows(mesh), **options)
  _assert_equal(four, one)
  shapes = {shard.data.shape for shard in four[0]["images"].addressable_shards}
  assert shapes == {(1, 28, 28, 3)}
  evaluated = pipeline.eval_batches(stream, batch_size=4, sharding=_rows(mesh))
  _assert_equal(evaluated, pipeline.eval_batches(stream, batch_size=4))


def test_an_archive_and_a_folder_give_the_same(squares, tmp_path):
  images, files = squares
  archive = _write(tmp_path / "squares.zip", images)
  left, right = (f.stream(_RELEASE, 14) for f in (files, archive))
  assert left.digest == right.digest and left.stamp != right.stamp
  np.testing.assert_array_equal(
    splits.to_memory(left).images, splits.to_memory(right).images
  )


def test_what_shapes_a_stream_shapes_its_digest(squares, tmp_path):
  images, files = squares
  digest = files.stream(_RELEASE, 14).digest
  other = [
    files.stream(_RELEASE, 28),
    files.stream(PRESETS["vtab"], 16),
    dataclasses.replace(files, labels=files.labels[::-1]).stream(_RELEASE, 14),
    files.take(np.arange(10)).stream(_RELEASE, 14),
    files.take(np.array([1, 0, *range(2, 11)])).stream(_RELEASE, 14),
    _write(tmp_path / "other", [*images[:-1], _noise(5, 5)]).stream(_RELEASE, 14),
  ]
  assert len({digest, *(stream.digest for stream in other)}) == 7


@pytest.mark.parametrize("archive", [False, True])
def test_a_bad_image_is_named_in_its_turn_and_the_threads_end(tmp_path, archive):
  root = tmp_path / ("x.zip" if archive else "x")
  content = {f"{i:03d}.png": png(pixels(i)) for i in range(40)}
  bad = {"025.png": b"", "021.png": png(_noise(8, 8))[:120]}
  write = fixtures.write_zip if archive else fixtures.write_folder
  write(root, {**content, **bad})
  files = ImageFiles(str(root), list(content), np.zeros(40, np.int32), "Mend it.")
  read = files.stream(PRESETS["vtab"], 8).read(
    np.array([2 * i, 2 * i + 1]) for i in (range(20))
  )
  seen = [number_of(image) for _ in range(10) for image in next(read)]
  assert seen == list(range(20)) and _decoders()
  with pytest.raises(ValueError, match=f"{root}/021.png does not decode.* Mend it.$"):
    next(read)
  assert not _decoders() and not _open_below(tmp_path)


def test_training_ends_with_the_bad_images_name(tmp_path):
  files = _write(tmp_path / "x", [pixels(i) for i in range(8)])
  (tmp_path / "x" / "006.png").write_bytes(b"junk")
  stream = files.stream(_RELEASE, 8)
  batches = pipeline.train_batches(
    stream, batch_size=2, seed=0, preset=_RELEASE, image_size=8
  )
  with pytest.raises(ValueError, match="x/006.png is not an image"):
    for _ in itertools.islice(batches, 4):
      pass
  with pytest.raises(ValueError, match="x/006.png is not an image"):
    list(pipeline.eval_batches(stream, batch_size=3))
  assert not _decoders()


@pytest.mark.parametrize("archive", [False, True])
def test_closing_a_stream_ends_its_threads_and_closes_its_files(tmp_path, archive):
  root = tmp_path / ("x.zip" if archive else "x")
  stream = _write(root, [pixels(i) for i in range(8)]).stream(_RELEASE, 8)
  options = {"batch_size": 2, "seed": 0, "preset": _RELEASE, "image_size": 8}
  for batches in (
    pipeline.train_batches(stream, **options),
    pipeline.eval_batches(stream, batch_size=2),
  ):
    next(batches)
    assert _decoders() and len(_open_below(tmp_path)) >= archive
    batches.close()
    assert not _decoders() and not _open_below(tmp_path)
  list(pipeline.eval_batches(stream, batch_size=2))
  assert not _decoders() and not _open_below(tmp_path)


def test_a_stream_looks_a_bounded_way_ahead(tmp_path):
  taken = []

  def requests():
    for i in itertools.count():
      taken.append(i)
      yield np.array([i % 3, (i + 1) % 3])

  stream = _write(tmp_path / "x", [pixels(i) for i in range(3)]).stream(_RELEASE, 8)
  read = stream.read(requests())
  for i in range(5):
    assert [number_of(image) for image in next(read)] == [i % 3, (i + 1) % 3]
    assert len(taken) <= i + 2 + 128
  read.close()


def _lists(root, train, val):
  """Writes train, val and test of images of these (height, width) to one root."""
  lists = {}
  for name, sizes in (("train", train), ("val", val), ("test", val)):
    files = _write(root / name, [_noise(*size) for size in sizes])
    names = [f"{name}/{file}" for file in files.names]
    lists[name] = dataclasses.replace(files, root=str(root), names=names)
  return lists


def _place(lists, preset="insvp_release", **changes):
  config = data_config(preset=preset, **changes)
  return image_files.load_or_stream_lists(lists, config, PRESETS[preset], 28, {})


def _streamed(placed):
  return {name for name, split in placed.items() if isinstance(split, StreamSplit)}


@pytest.mark.parametrize(
  "train,val,streamed",
  [
    ("square", "square", set()),
    ("wide", "square", {"train", "train_val"}),
    ("wide", "wide", {"train", "train_val"}),
    ("square", "wide", {"train_val"}),  # val trains the final model
    ("nearly", "nearly", set()),
    ("hardly", "nearly", {"train", "train_val"}),
  ],
)
def test_elongated_training_sets_stay_in_their_files(tmp_path, train, val, streamed):
  sizes = {
    "square": [(50, 50), (9, 9)],
    "wide": [(50, 50), (40, 60)],
    # Shorter sides become 32 pixels, longer ones are rounded down.
    "nearly": [(51, 50), (50, 51)],
    "hardly": [(52, 50), (50, 50)],
  }
  lists = _lists(tmp_path, sizes[train], sizes[val])
  placed = _place(lists)
  assert list(placed) == ["train", "val", "train_val", "test"]
  assert _streamed(placed) == streamed
  # Presets that stretch images need no more than squares.
  assert not _streamed(_place(lists, "cifar"))


@pytest.mark.parametrize(
  "train,val,streamed",
  [
    (161, 180, set()),
    (162, 180, {"train_val"}),
    (1, 341, {"train_val"}),
    (1, 342, {"val", "train_val", "test"}),
    (342, 1, {"train", "train_val"}),
  ],
)
def test_splits_above_the_limit_stay_in_their_files(tmp_path, train, val, streamed):
  # 341 squares of 32 pixels are a little below 1 MiB.
  placed = _place(_lists(tmp_path, train * [(4, 4)], val * [(4, 4)]), resident_mb=1)
  assert _streamed(placed) == streamed
  assert {name: len(split) for name, split in placed.items()} == {
    "train": train,
    "val": val,
    "train_val": train + val,
    "test": val,
  }


def test_train_val_is_train_then_val_wherever_they_are(tmp_path):
  lists = _lists(tmp_path, [(9, 9), (8, 8)], [(7, 7), (6, 6), (5, 5)])
  both = [
    splits.to_memory(_place(lists, resident_mb=limit)["train_val"]) for limit in (0, 9)
  ]
  assert both[0].labels.tolist() == both[1].labels.tolist() == [0, 1, 0, 1, 2]
  np.testing.assert_array_equal(both[0].images, both[1].images)


def test_squares_are_told_by_headers_alone(tmp_path):
  whole = png(_noise(40, 40))
  broken = [whole[:120], b"junk"]  # decoding them tells what is wrong
  names = [f"{i}.png" for i in range(3)]
  for last, square in ((whole, True), (png(_noise(40, 60))[:120], False)):
    content = dict(zip(names, [*broken, last], strict=True))
    root = fixtures.write_folder(tmp_path, content)
    files = ImageFiles(str(root), names, np.zeros(3, np.int32))
    found = image_files.find_squares(files, data_config(), _RELEASE, 28)
    assert found.square is square


def test_the_second_run_opens_no_image(tmp_path, monkeypatch):
  lists = _lists(tmp_path, 20 * [(9, 9)], 20 * [(9, 9)])
  first = _place(lists, cache_dir=str(tmp_path / "cache"))

  def forbidden(*args, **kwargs):
    raise AssertionError("an image file was opened")

  monkeypatch.setattr(Image, "open", forbidden)
  second = _place(lists, cache_dir=str(tmp_path / "cache"))
  for name, split in first.items():
    np.testing.assert_array_equal(split.images, second[name].images)


@given(st.data())
def test_by_request_serves_any_requests_from_a_reader_that_runs_ahead(data):
  sizes = data.draw(st.lists(st.integers(1, 5), max_size=12))
  ahead = data.draw(st.integers(1, 20))
  stop = data.draw(st.integers(0, len(sizes)))
  closed = []

  def read(positions):
    waiting = deque(itertools.islice(positions, ahead))
    try:
      while waiting:
        result = waiting.popleft()
        waiting.extend(itertools.islice(positions, 1))
        yield result * 10
    finally:
      closed.append(True)

  starts = np.cumsum([0, *sizes])
  requests = [start + np.arange(n) for start, n in zip(starts, sizes, strict=False)]
  readers = []  # held, so that only an explicit close ends one

  def remember(positions):
    readers.append(read(positions))
    return readers[-1]

  groups = prefetch.by_request(iter(requests), remember)
  got = list(itertools.islice(groups, stop))
  assert got == [(10 * request).tolist() for request in requests[:stop]]
  groups.close()
  assert closed == ([True] if stop else [])


@given(st.integers(0, 60), st.integers(1, 70))
def test_ordered_map_keeps_the_order(number, ahead):
  def work(i):
    time.sleep(0.0005 * (i % 3))
    return i * i

  got = list(prefetch.ordered_map(work, range(number), ahead=ahead))
  assert got == [i * i for i in range(number)]
  assert not _decoders()


@given(st.integers(1, 40), st.integers(0, 60))
def test_ordered_map_takes_a_bounded_part_of_infinite_items(ahead, used):
  taken = itertools.count()
  items = (next(taken) for _ in itertools.repeat(0))
  results = prefetch.ordered_map(lambda i: -i, items, ahead=ahead)
  assert list(itertools.islice(results, used)) == [-i for i in range(used)]
  results.close()
  assert next(taken) <= (used + ahead if used else 0)
  assert not _decoders()


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 40))
def test_ordered_map_raises_the_first_error_in_its_turn(bad, ahead):
  def work(i):
    if i in bad:
      raise ValueError(f"item {i}")
    time.sleep(0.0003 * (i % 2))  # later items are done first
    return i

  results = prefetch.ordered_map(work, range(31), ahead=ahead)
  first = min(bad)
  assert list(itertools.islice(results, first)) == list(range(first))
  with pytest.raises(ValueError, match=f"item {first}$"):
    next(results)
  assert not _decoders() and not list(results)


def test_closing_ordered_map_cancels_what_has_not_begun():
  begun = []

  def work(i):
    begun.append(i)
    time.sleep(0.002)

  results = prefetch.ordered_map(work, range(300), ahead=300)
  next(results)
  results.close()
  assert len(begun) < 200 and not _decoders()


def test_ordered_map_works_in_parallel():
  together = threading.Barrier(2)  # one thread alone would wait for ever
  results = prefetch.ordered_map(lambda i: together.wait(20) + i * 0, range(8), ahead=4)
  assert sorted(results) == 4 * [0] + 4 * [1]


@given(st.sampled_from(["cifar", "insvp_release"]), st.integers(0, 2**31 - 1))
def test_the_host_cuts_what_the_device_would(name, seed):
  preset, size = PRESETS[name], 28
  side = preset.stored_size(size)
  images = np.stack([_noise(side, side, i) for i in range(4)])
  key = jax.random.key(seed)
  sides = np.full(4, side)
  offsets, flips = _draw(preset, key, sides, sides, size)
  host = [
    preprocess.cut_window(image, offset, flip, size)
    for image, offset, flip in zip(
      images, np.asarray(offsets), np.asarray(flips), strict=True
    )
  ]
  np.testing.assert_array_equal(host, _augment(preset, images, key, size))


def test_jpegs_of_a_camera_are_streamed_upright(tmp_path):
  image = Image.fromarray(
    np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 32, 3))
  )
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  data = encode(image, "JPEG", quality=95, exif=exif)
  fixtures.write_folder(tmp_path, {"a.jpg": data})
  files = ImageFiles(str(tmp_path), ["a.jpg"], np.zeros(1, np.int32))
  ((whole,),) = files.stream(_RELEASE, 28).read([np.array([0])], whole=True)
  assert whole.shape == (32, 64, 3) and whole[0, 0, 0] > whole[0, -1, 0] + 50
