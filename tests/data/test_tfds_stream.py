"""What is decoded as it is read equals what is decoded at once."""

import dataclasses
import functools
import gc
import itertools
import os
from pathlib import Path
import threading
import time

from data_fixtures import data_config, png
import jax
import numpy as np
import pytest
from tfds_fixtures import features_of, import_tfds, prepare, record

from insvp_jax.data import load_data, pipeline, preprocess, splits
from insvp_jax.data.preprocess import PRESETS
from insvp_jax.data.tasks import TASKS
from insvp_jax.distributed import mesh as mesh_lib

_SIZE = 24
_SIDES = {"cifar100": (32, 32), "dtd": (40, 56)}


def _noise(number, sides):
  return np.random.default_rng(number).integers(0, 256, (*sides, 3), np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """CIFAR-100's squares and DTD's elongated images, as noise, in several files."""
  import_tfds()
  folder = tmp_path_factory.mktemp("tfds")
  for builder, sides in _SIDES.items():
    features = features_of(builder)
    content = [
      record(features, image=png(_noise(i, sides)), label=i % 47) for i in range(110)
    ]
    shards = {"train": [content[:7], content[7:50], content[50:90]]}
    if builder == "dtd":
      shards["validation"] = [content[90:]]
    prepare(folder, builder, {**shards, "test": [content[90:103], content[103:]]})
  return folder


@pytest.fixture(scope="module")
def load(root):
  """Reads a task's splits, once for each of the arguments."""
  cifar = dataclasses.replace(TASKS["cifar100"], train="train[:70]", val="train[80:90]")
  dtd = dataclasses.replace(TASKS["dtd"], train="train[:70]", val="validation[:10]")

  @functools.cache
  def read(task, preset, resident_mb):
    config = data_config(
      data_dir=str(root),
      preset=preset,
      resident_mb=resident_mb,
      # So that where the records lie is searched once for all presets.
      cache_dir=str(root / "cache"),
    )
    return load_data(task, config, _SIZE)

  def make(task="cifar100", preset="vtab", resident_mb=0):
    return read(task, preset, resident_mb)

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(TASKS, "cifar100", cifar)
    patch.setitem(TASKS, "dtd", dtd)
    yield make


def _equal(first, second):
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", _SIDES)
def test_streamed_pixels_are_those_of_the_preset(preset, task, load):
  streamed, resident = (load(task, preset, mb) for mb in (0, 1024))
  assert "train 70 (streamed)" in streamed.summary()
  assert not isinstance(resident.splits["val"], type(streamed.splits["val"]))
  numbers = {"train": range(70), "val": range(80, 90), "test": range(90, 110)}
  if task == "dtd":
    numbers["val"] = range(90, 100)
  for split, members in numbers.items():
    found = splits.to_memory(streamed.splits[split])
    expected = [
      preprocess.resize(PRESETS[preset], _noise(i, _SIDES[task]), _SIZE)
      for i in members
    ]
    np.testing.assert_array_equal(found.images, np.stack(expected))
    assert found.labels.tolist() == [i % 47 for i in members]
    if not isinstance(resident.splits[split], type(streamed.splits[split])):
      _equal(vars(found), vars(splits.to_memory(resident.splits[split])))


def test_positions_come_in_the_order_asked_for(load):
  data = load()
  split, everything = (
    data.splits["train_val"],
    splits.to_memory(data.splits["train_val"]),
  )
  indices = np.random.default_rng(0).integers(0, 80, 200)
  np.testing.assert_array_equal(
    splits.to_memory(split, indices).images, everything.images[indices]
  )
  sizes = [1, 33, 2, 64, 1, 1, 40]
  requests = np.split(indices, np.cumsum(sizes))[: len(sizes)]
  for asked, found in zip(requests, split.read(iter(requests)), strict=True):
    np.testing.assert_array_equal(found, everything.images[asked])


@pytest.mark.parametrize("preset", ["vtab", "insvp_release"])
@pytest.mark.parametrize("devices", [1, 4])
def test_train_batches_are_the_same_from_files_and_from_memory(
  preset, devices, load, make_mesh
):
  sharding = mesh_lib.batch_sharding(make_mesh(devices)) if devices > 1 else None
  options = {
    "batch_size": 16,
    "seed": 3,
    "preset": PRESETS[preset],
    "image_size": _SIZE,
    "sharding": sharding,
  }
  found = []
  for mb in (0, 1024):
    split = load(preset=preset, resident_mb=mb).splits["train"]
    batches = pipeline.train_batches(split, **options)
    found.append(list(itertools.islice(batches, 9)))  # two epochs and a part
    batches.close()
  for streamed, resident in zip(*found, strict=True):
    _equal(streamed, resident)
    assert streamed["images"].shape == (16, _SIZE, _SIZE, 3)
    assert streamed["images"].sharding.is_equivalent_to(resident["images"].sharding, 4)
  assert not np.array_equal(found[0][0]["images"], found[0][4]["images"])
  # From the middle of an epoch on.
  split = load(preset=preset).splits["train"]
  batches = pipeline.train_batches(split, start_step=6, **options)
  for expected in found[0][6:8]:
    _equal(next(batches), expected)
  batches.close()


@pytest.mark.parametrize("devices", [1, 4])
def test_eval_batches_are_the_same_from_files_and_from_memory(devices, load, make_mesh):
  sharding = mesh_lib.batch_sharding(make_mesh(devices)) if devices > 1 else None
  streamed, resident = (
    list(
      pipeline.eval_batches(
        load(resident_mb=mb).splits["test"], batch_size=8, sharding=sharding
      )
    )
    for mb in (0, 1024)
  )
  assert len(streamed) == len(resident) == 3
  for first, second in zip(streamed, resident, strict=True):
    _equal(first, second)
  assert sum(float(batch["mask"].sum()) for batch in streamed) == 20


def test_the_digest_is_that_of_the_images(load, root, tmp_path):
  """Equal for a copy elsewhere; another preset or split has another."""
  first = load()
  config = data_config(data_dir=str(tmp_path / "copy"), resident_mb=0)
  for path in (root / "cifar100").rglob("*"):
    if path.is_file():
      copy = tmp_path / "copy" / path.relative_to(root)
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(path.read_bytes())
  copied = load_data("cifar100", config, _SIZE)
  names = ("train", "val", "train_val", "test")
  digests = [first.splits[name].digest for name in names]
  assert [copied.splits[name].digest for name in names] == digests
  assert len(set(digests)) == 4
  assert load(preset="insvp_release").splits["train"].digest not in digests


def _open_files():
  """Returns which TFRecord files this process has open."""
  found = []
  for link in Path("/proc/self/fd").iterdir():
    try:
      found.append(os.readlink(link))
    except OSError:
      continue  # the folder's own
  return [name for name in found if "tfrecord" in name]


def _settled(count, limit, seconds=10.0):
  """Waits until `count()` is at most `limit`; returns it."""
  end = time.monotonic() + seconds
  while count() > limit and time.monotonic() < end:
    gc.collect()
    time.sleep(0.02)
  return count()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_closing_ends_threads_and_closes_files(load):
  split = load().splits["train"]
  options = {"batch_size": 16, "seed": 0, "preset": PRESETS["vtab"]}

  def some(number):
    batches = pipeline.train_batches(split, image_size=_SIZE, **options)
    for _ in range(number):
      next(batches)
    return batches

  def threads():
    return len(list(Path("/proc/self/task").iterdir()))

  some(1).close()  # TensorFlow's own threads start
  assert _settled(lambda: len(_open_files()), 0) == 0
  before, python_threads = threads(), threading.active_count()
  batches = [some(3) for _ in range(3)]
  assert _open_files()
  for iterator in batches:
    iterator.close()
  assert _settled(lambda: len(_open_files()), 0) == 0
  for number in (0, 1, 5, 9):  # not started, and in the second epoch, too
    some(number).close()
  list(pipeline.eval_batches(split, batch_size=16))
  assert _settled(lambda: len(_open_files()), 0) == 0
  # A thread or two of TensorFlow's pools may have come.
  assert _settled(threads, before + 4) <= before + 4
  assert _settled(threading.active_count, python_threads) <= python_threads


def test_endless_requests_are_read_a_bounded_way_ahead(load):
  split = load().splits["train"]
  taken = []

  def requests():
    for i in itertools.count():
      taken.append(i)
      yield np.arange(16) + i % 50

  images = split.read(requests())
  for _ in range(3):
    next(images)
  time.sleep(0.3)
  first = len(taken)
  time.sleep(0.3)
  # 16 images to a request: some hundred are on their way.
  assert len(taken) == first < 60
  for _ in range(20):
    next(images)
  time.sleep(0.3)
  assert len(taken) < first + 30
  images.close()


def test_an_error_of_the_requests_is_raised_as_it_is(load):
  def requests():
    yield np.arange(4)
    raise KeyError("no such order")

  images = load().splits["train"].read(requests())
  with pytest.raises(KeyError, match="no such order"):
    list(images)


def test_elongated_images_are_cropped_from_the_whole(load):
  """insvp_release crops from all of an image: the squares in memory would not do."""
  data = load("dtd", "insvp_release", 1024)
  assert data.summary().count("(streamed)") == 2  # train and train_val
  split, preset = data.splits["train"], PRESETS["insvp_release"]
  (whole,) = split.read([np.arange(3)], whole=True)
  for i, image in enumerate(whole):
    expected = preprocess.resize_whole(preset, _noise(i, _SIDES["dtd"]), _SIZE)
    np.testing.assert_array_equal(image, expected)
    assert image.shape == (27, 37, 3)
  batches = pipeline.train_batches(
    split, batch_size=70, seed=1, preset=preset, image_size=_SIZE
  )
  batch = jax.device_get(next(batches))
  batches.close()
  # Each is a window of its own image; some lie outside of the central square.
  centre = range(5, 5 + 27 - _SIZE + 1)
  outside = 0
  windows = {}
  for i in range(70):
    resized = preprocess.resize_whole(preset, _noise(i, _SIDES["dtd"]), _SIZE)
    for top, left in itertools.product(range(4), range(14)):
      window = resized[top : top + _SIZE, left : left + _SIZE]
      windows[window.tobytes()] = windows[window[:, ::-1].tobytes()] = i, left
  seen = set()
  for image in batch["images"]:
    number, left = windows[np.ascontiguousarray(image).tobytes()]
    seen.add(number)
    outside += left not in centre
  assert seen == set(range(70)) and outside > 20
