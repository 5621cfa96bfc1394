"""The table of tasks, and the real reading path on real TFRecords."""

import dataclasses
import hashlib
from pathlib import Path
import subprocess
import sys

from data_fixtures import data_config, number_of
import numpy as np
import pytest
from tfds_fixtures import import_tfds, prepare_cifar

from insvp_jax.data import load_data
from insvp_jax.data.tasks import TASKS

_TEST = 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  return prepare_cifar(tmp_path_factory.mktemp("tfds"))


def _numbers(split):
  return [number_of(image) for image in split.images]


def test_cifar100_is_split_as_published(prepared, tmp_path, caplog):
  config = data_config(data_dir=str(prepared), cache_dir=str(tmp_path))
  for _ in range(2):  # the second time from the cache
    data = load_data("cifar100", config, 32)
    assert _numbers(data.splits["train"]) == list(range(800))
    assert _numbers(data.splits["val"]) == list(range(45_000, 45_200))
    assert _numbers(data.splits["test"]) == list(range(50_000, 50_000 + _TEST))
    both = _numbers(data.splits["train"]) + _numbers(data.splits["val"])
    assert _numbers(data.splits["train_val"]) == both and len(both) == 1000
    for name, first in {"train": 0, "val": 45_000, "test": 0}.items():
      labels = data.splits[name].labels
      expected = (first + np.arange(len(labels))) % 100
      np.testing.assert_array_equal(labels, expected)
      assert labels.dtype == np.int32
  assert data.num_classes == 100 and data.class_names[42] == "thing 42"
  assert data.source.startswith("tfds cifar100/3.0.2 (tensorflow-datasets 4.")
  assert "12 images, published are 10000" in caplog.text
  # An index of records and a decoded split for each of train, val and test.
  assert len(list(tmp_path.iterdir())) == 6


@pytest.fixture
def small(monkeypatch):
  """cifar100 with splits that small fixtures can hold."""
  task = dataclasses.replace(TASKS["cifar100"], train="train[:8]", val="train[90:95]")
  monkeypatch.setitem(TASKS, "cifar100", task)


def test_the_order_does_not_depend_on_the_shards(small, tmp_path):
  orders = []
  for i, shards in enumerate([(100,), (3, 90, 7), (2,) * 50]):
    root = prepare_cifar(tmp_path / str(i), shards=shards)
    data = load_data("cifar100", data_config(data_dir=str(root)), 32)
    orders.append([_numbers(data.splits[name]) for name in ("train", "val")])
    assert data.splits["val"].labels.tolist() == [90, 91, 92, 93, 94]
  assert orders[0] == orders[1] == orders[2]
  assert orders[0][0] == list(range(8))


def test_images_are_resized_by_the_preset(small, tmp_path):
  root = prepare_cifar(tmp_path, shards=(100,))
  for preset, size in {"vtab": 48, "insvp_release": 54}.items():
    data = load_data("cifar100", data_config(data_dir=str(root), preset=preset), 48)
    images = data.splits["train"].images
    assert images.shape == (8, size, size, 3)
    assert _numbers(data.splits["train"]) == list(range(8))


def test_an_unprepared_set_names_the_command(tmp_path):
  import_tfds()
  config = data_config(data_dir=str(tmp_path))
  with pytest.raises(FileNotFoundError) as caught:
    load_data("cifar100", config, 32)
  message = str(caught.value)
  assert "not prepared" in message and "\n" not in message
  assert f"prepare_data --task=cifar100 --data_dir={tmp_path}" in message
  assert "cifar100 3.*.*" in message
  assert not list(tmp_path.iterdir())


def test_a_wrong_version_is_named(small, tmp_path):
  root = prepare_cifar(tmp_path, shards=(100,))
  (root / "cifar100" / "3.0.2").rename(root / "cifar100" / "1.0.0")
  with pytest.raises(FileNotFoundError, match=r"3\.\*\.\*.*Found only: 1.0.0"):
    load_data("cifar100", data_config(data_dir=str(root)), 32)


def _broken(root, change):
  folder = root / "cifar100" / "3.0.2"
  change(folder / "cifar100-train.tfrecord-00000-of-00001")
  return data_config(data_dir=str(root), cache_dir=str(root / "cache"))


def test_damaged_files_are_named_and_nothing_is_cached(small, tmp_path):
  import_tfds()

  def cut(path):
    path.write_bytes(path.read_bytes()[:600])

  def flip(path):
    raw = bytearray(path.read_bytes())
    raw[300] ^= 255
    path.write_bytes(bytes(raw))

  for name, change in {"cut": cut, "flip": flip}.items():
    config = _broken(prepare_cifar(tmp_path / name, shards=(100,)), change)
    with pytest.raises(
      ValueError, match=r"tfrecord-00000-of.* near record 0: [^{]*; prepare"
    ):
      load_data("cifar100", config, 32)
    assert not (tmp_path / name / "cache").exists()
  config = _broken(
    prepare_cifar(tmp_path / "gone", shards=(100,)), lambda p: p.unlink()
  )
  with pytest.raises(FileNotFoundError, match="cifar100-train.tfrecord"):
    load_data("cifar100", config, 32)


def test_a_split_too_small_for_the_task_is_named(tmp_path):
  root = prepare_cifar(tmp_path, shards=(100,))
  with pytest.raises(ValueError, match=r"train\[:800\].*100 examples"):
    load_data("cifar100", data_config(data_dir=str(root)), 32)


VTAB = {name: task for name, task in TASKS.items() if task.benchmark == "vtab"}


def test_the_table():
  assert len(VTAB) == 19
  groups = [task.group for task in VTAB.values()]
  sizes = [groups.count(group) for group in ("natural", "specialized", "structured")]
  assert sizes == [7, 4, 8]
  assert all(name == task.name for name, task in TASKS.items())
  assert {task.train for task in VTAB.values()} == {"train[:800]"}
  # Official test sizes, from task_adaptation's own tests.
  published = "6084 10000 1880 6149 3669 26032 21750 32768 5400 6300 42670 15000 15000"
  published += " 22735 711 73728 73728 12150 12150"
  assert [t.num_test for t in VTAB.values()] == [int(n) for n in published.split()]
  classes = "102 100 47 102 37 10 397 2 10 45 5 8 6 6 4 16 16 18 9"
  assert [t.num_classes for t in VTAB.values()] == [int(n) for n in classes.split()]


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.spec])
def test_tfds_knows_every_builder(name, tmp_path):
  tfds = import_tfds()
  builder = tfds.builder(TASKS[name].spec, data_dir=str(tmp_path))
  if TASKS[name].label_rule == "label":
    assert builder.info.features["label"].num_classes == TASKS[name].num_classes


def test_the_splits_give_the_published_indices():
  # TFDS orders a split by the md5 of its name and each example's key.
  def order(split, keys):
    return sorted(keys, key=lambda k: hashlib.md5(f"{split}{k}".encode()).hexdigest())

  def bounds(expression):
    return [int(n or 0) for n in expression.split("[")[1].rstrip("]").split(":")]

  rows = order("train", range(50_000))
  (_, stop), (low, high) = (
    bounds(TASKS["cifar100"].train),
    bounds(TASKS["cifar100"].val),
  )
  assert (rows[:4], sum(rows[:stop])) == ([16399, 1680, 47917, 17307], 20135529)
  assert (rows[low : low + 2], sum(rows[low:high])) == ([13431, 9237], 5048484)


def test_tensorflow_is_imported_only_to_read_tfds():
  code = """
import sys
from insvp_jax.data import load_data, pipeline, preprocess, tasks, tfds_source
import ml_collections
config = ml_collections.ConfigDict(dict(preset="vtab", split_seed=0))
load_data("digits", config, 8)
assert not [name for name in sys.modules if name.startswith("tensorflow")]
assert "matplotlib" not in sys.modules
"""
  subprocess.run(
    [sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True
  )
