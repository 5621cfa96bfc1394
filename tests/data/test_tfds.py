"""The table of tasks, and the real reading path on real TFRecords."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
import re
import subprocess
import sys

from data_fixtures import data_config, number_of
import numpy as np
import pytest
from tfds_fixtures import Copies, import_tfds, prepare, prepare_cifar

from insvp_jax.data import load_data, splits
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
  assert f"insvp prepare --task=cifar100 --data_dir={tmp_path}" in message
  assert "cifar100 3.*.*" in message
  assert not list(tmp_path.iterdir())


def test_a_wrong_version_is_named(small, tmp_path):
  root = prepare_cifar(tmp_path, shards=(100,))
  (root / "cifar100" / "3.0.2").rename(root / "cifar100" / "1.0.0")
  with pytest.raises(FileNotFoundError, match=r"3\.\*\.\*.*Found only: 1.0.0"):
    load_data("cifar100", data_config(data_dir=str(root)), 32)


_FILE = "cifar100-train.tfrecord-00000-of-00001"


def _broken(root, change):
  """Prepares a small set and changes its training file; returns (config, path)."""
  path = prepare_cifar(root, shards=(100,)) / "cifar100" / "3.0.2" / _FILE
  change(path)
  return data_config(data_dir=str(root), cache_dir=str(root / "cache")), path


def _message(kind, config, task="cifar100"):
  with pytest.raises(kind) as caught:
    load_data(task, config, 32)
  message = str(caught.value)
  assert "\n" not in message and "{{" not in message
  return message


def _decoded(config):
  """Returns the sizes of the decoded splits in the cache."""
  found = []
  for path in Path(config.cache_dir).glob("*.npz"):
    with np.load(path) as stored:
      found += [len(stored["images"])] if "images" in stored.files else []
  return sorted(found)


def _records(path):
  import tensorflow as tf

  return list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())


def _rewrite(path, records):
  import tensorflow as tf

  with tf.io.TFRecordWriter(str(path)) as writer:
    for data in records:
      writer.write(data)


def _change(number, **values):
  """Returns what changes features of one record."""

  def change(path):
    records = _records(path)
    records[number] = Copies(records[number])(**values)
    _rewrite(path, records)

  return change


def test_a_damaged_file_is_named_with_its_record(small, tmp_path):
  def cut(path):
    length = len(_records(path)[0]) + 16
    path.write_bytes(path.read_bytes()[: 3 * length + length // 2])

  def flip(place):
    def change(path):
      raw = bytearray(path.read_bytes())
      raw[place] ^= 255
      path.write_bytes(bytes(raw))

    return change

  changes = {
    "cut": (cut, 3),
    "flipped length": (flip(0), 0),
    "flipped byte": (flip(50), 0),
  }
  for name, (change, number) in changes.items():
    config, path = _broken(tmp_path / name, change)
    message = _message(ValueError, config)
    assert message.startswith(f"record {number} of {path} is damaged: "), name
    assert message.endswith("; prepare cifar100/3.0.2 anew.")
    assert not Path(config.cache_dir).exists()


def test_damage_before_a_slice_and_in_it_is_found(small, tmp_path):
  def flip(record):
    def change(path):
      ends = np.cumsum([len(data) + 16 for data in _records(path)])
      raw = bytearray(path.read_bytes())
      raw[int(ends[record]) - 20] ^= 1
      path.write_bytes(bytes(raw))

    return change

  config, path = _broken(tmp_path / "in", flip(92))
  assert f"record 92 of {path} is damaged" in _message(ValueError, config)
  assert _decoded(config) == []
  # Only the lengths of what lies between the slices are looked at.
  config, _ = _broken(tmp_path / "between", flip(50))
  assert _numbers(load_data("cifar100", config, 32).splits["val"])[0] == 90


def test_missing_files_and_records_are_named(small, tmp_path):
  config, path = _broken(tmp_path / "gone", lambda path: path.unlink())
  message = _message(FileNotFoundError, config)
  assert f"the file {path} is missing; prepare cifar100/3.0.2 anew" in message
  for number in (0, 5, 50, 92):
    config, path = _broken(
      tmp_path / str(number), lambda p, n=number: _rewrite(p, _records(p)[:n])
    )
    expected = f"the file {path} has {number} records, but dataset_info.json says 100"
    assert expected in _message(ValueError, config)


@pytest.mark.parametrize("resident_mb", [0, 1024])
def test_an_image_that_does_not_decode_is_named(small, tmp_path, resident_mb):
  config, path = _broken(tmp_path, _change(92, image=b"no image"))
  config.resident_mb = resident_mb
  expected = rf"the image of record 92 of {path} does not decode: .*; prepare"
  if resident_mb:
    assert re.match(expected, _message(ValueError, config))
    assert _decoded(config) == [8]  # train alone, which is whole
  else:
    data = load_data("cifar100", config, 32)
    assert _numbers(splits.to_memory(data.splits["train"])) == list(range(8))
    with pytest.raises(ValueError, match=expected) as caught:
      splits.to_memory(data.splits["val"])
    assert "\n" not in str(caught.value) and "{{" not in str(caught.value)


@pytest.mark.parametrize("label", [-1, 100, 2**40, -(2**40)])
def test_a_label_out_of_range_is_named(small, tmp_path, label):
  config, path = _broken(tmp_path, _change(5, label=label))
  message = _message(ValueError, config)
  assert f"the label of record 5 of {path} (train of cifar100) is " in message
  assert "expected 0 to 99" in message
  assert _decoded(config) == []


def test_a_record_without_a_label_is_named(small, tmp_path):
  def change(path):
    import tensorflow as tf

    records = _records(path)
    example = tf.train.Example.FromString(records[3])
    del example.features.feature["label"]
    records[3] = example.SerializeToString()
    _rewrite(path, records)

  config, path = _broken(tmp_path, change)
  message = _message(ValueError, config)
  assert message.startswith(f"record 3 of {path} is damaged: ")
  assert "Feature: label (data type: int64) is required" in message


def test_a_file_that_changes_while_it_is_streamed_is_named(small, tmp_path):
  config, path = _broken(tmp_path, lambda path: None)
  config.resident_mb = 0
  split = load_data("cifar100", config, 32).splits["train"]
  content = path.read_bytes()
  path.write_bytes(content[:300])
  with pytest.raises(ValueError, match=rf"record 1 of {path} is cut off"):
    splits.to_memory(split)
  path.unlink()
  with pytest.raises(ValueError, match=rf"cannot read record 0 of {path} \(No such"):
    splits.to_memory(split)


def test_another_format_of_files_is_named(tmp_path):
  prepare(tmp_path, "dtd", {"train": [1]}, unseen=b"", suffix="array_record")
  message = _message(ValueError, data_config(data_dir=str(tmp_path)), "dtd")
  assert "holds array_record files, expected tfrecord" in message
  assert "insvp prepare --task=dtd" in message


@pytest.mark.parametrize(
  ("task", "lacks", "named"),
  [
    ("dtd", ["label"], "'label'"),
    ("dtd", ["image"], "'image'"),
    ("hta_cifar10", ["id"], "'id'"),
    ("clevr_distance", ["objects", "pixel_coords"], "'pixel_coords'"),
    ("clevr_count", ["objects"], "'objects'"),
  ],
)
def test_a_set_without_a_feature_is_named(task, lacks, named, tmp_path):
  builder = TASKS[task].spec.split(":")[0]
  folder = prepare(tmp_path, builder, {"train": [[b""]], "test": [[b""]]})
  path = folder / "features.json"
  content = json.loads(path.read_text())
  inner = content["featuresDict"]["features"]
  for name in lacks[:-1]:
    inner = inner[name]["sequence"]["feature"]["featuresDict"]["features"]
  del inner[lacks[-1]]
  path.write_text(json.dumps(content))
  subset = "insvp_release" if named == "'id'" else ""
  config = data_config(data_dir=str(tmp_path), subset=subset)
  message = _message(ValueError, config, task)
  assert f"{builder}/" in message and f"has no feature {named}" in message
  assert (
    str(folder) in message
    and "prepare another version of it with insvp prepare" in message
  )


def test_damaged_metadata_are_named(small, tmp_path):
  config, path = _broken(tmp_path, lambda path: None)
  info = path.parent / "dataset_info.json"
  info.write_text(info.read_text()[:100])
  expected = f"what describes cifar100 in {tmp_path} is damaged: "
  assert expected in _message(ValueError, config)
  info.unlink()
  expected = f"Could not read dataset info from {info}"
  assert expected in _message(ValueError, config)


def test_tensorflow_says_nothing_of_its_own(tmp_path):
  """The message is all that a user sees of a damaged file, or of an image."""
  _broken(tmp_path / "cut", lambda path: path.write_bytes(path.read_bytes()[:600]))
  _broken(tmp_path / "image", _change(1, image=b"no image"))
  code = """
import dataclasses, sys
from insvp_jax.data import load_data, tasks
import ml_collections
small = dict(train="train[:8]", val="train[90:95]")
tasks.TASKS["cifar100"] = dataclasses.replace(tasks.TASKS["cifar100"], **small)
for name in sys.argv[1:]:
  config = dict(preset="vtab", split_seed=0, root="", subset="", lists="")
  config |= dict(data_dir=name, cache_dir="off", resident_mb=1024)
  try:
    load_data("cifar100", ml_collections.ConfigDict(config), 32)
  except ValueError as error:
    print(error)
"""
  folders = [str(tmp_path / name) for name in ("cut", "image")]
  environ = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
  done = subprocess.run(
    [sys.executable, "-c", code, *folders],
    cwd=Path(__file__).parents[2],
    env=environ,
    check=True,
    capture_output=True,
    text=True,
  )
  first, second = done.stdout.splitlines()
  assert "is damaged" in first and "does not decode" in second
  own = [line for line in done.stderr.splitlines() if "published are" in line]
  assert done.stderr.splitlines() == own


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
    return sorted(
      keys,
      key=lambda k: hashlib.md5(
        f"{split}{k}".encode(), usedforsecurity=False
      ).hexdigest(),
    )

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
from insvp_jax.data import load_data, pipeline, preprocess, tasks
from insvp_jax.data.sources import tfds
import ml_collections
config = ml_collections.ConfigDict(dict(preset="vtab", split_seed=0))
load_data("digits", config, 8)
assert not [name for name in sys.modules if name.startswith("tensorflow")]
assert "matplotlib" not in sys.modules
"""
  subprocess.run(
    [sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True
  )
