import json

from data_fixtures import data_config, pixels
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import ArraySplit, TaskData, load_data
from insvp_jax.data.sources import stored_splits


def _split(labels):
  images = np.stack([pixels(i, 2) for i in range(len(labels))])
  return ArraySplit(images, np.array(labels, np.int32))


def test_task_data_checks_labels():
  data = TaskData("t", ("a", "b"), {"train": _split([0, 1, 1])}, skipped=2)
  assert data.num_classes == 2
  assert data.summary().splitlines() == [
    "t: 2 classes, train 3, 2 unreadable images skipped",
    "images of each class (train): a 1, b 2",
  ]


def test_of_many_classes_the_smallest_median_and_largest_are_told():
  names = tuple(f"c{i}" for i in range(21))
  splits = {"train": _split([*range(21), 4, 4, 9]), "test": _split([*range(20)])}
  assert TaskData("t", names, splits).summary().splitlines()[1] == (
    "images of the smallest, median and largest class: train 1 (c0), 1, 3 (c4); "
    "test 0 (c20), 1, 1 (c0)"
  )
  with pytest.raises(ValueError, match="'val' of 't' go from 0 to 2, expected 0 to 1"):
    TaskData("t", ("a", "b"), {"val": _split([0, 2])})
  with pytest.raises(ValueError, match="'val' of 't' has no images"):
    TaskData("t", ("a", "b"), {"val": _split([0]).take(np.array([], np.int64))})


def test_the_digest_sees_classes_images_and_labels():
  def data(names=("a", "b"), labels=(0, 1), shift=0, split="train"):
    images = np.stack([pixels(i + shift, 2) for i in range(len(labels))])
    return TaskData("t", names, {split: ArraySplit(images, np.array(labels, np.int32))})

  def digest(*args, names=("train",), **kwargs):
    return data(*args, **kwargs).digest(names)

  assert digest() == digest() == digest(names=("train", "not there"))
  others = [digest(("a", "c")), digest(labels=(1, 0)), digest(shift=1)]
  others += [digest(names=()), digest(split="val", names=("val",))]
  # Bytes that are no text, as a file system has them.
  others.append(digest(("a", "\udcff")))
  assert len({digest(), *others}) == 7


def test_unknown_tasks_and_sizes_are_named():
  with pytest.raises(ValueError, match="unknown task 'cifar_100'. Nearest: cifar100"):
    load_data("cifar_100", data_config(), 32)
  with pytest.raises(ValueError, match="unknown preset 'nope'"):
    load_data("digits", data_config(preset="nope"), 32)
  with pytest.raises(ValueError, match="image_size has to be positive, got 0"):
    load_data("digits", data_config(), 0)


def test_few_shots_leave_val_and_test_as_they_are():
  whole = load_data("digits", data_config(), 8)
  few = load_data("digits", data_config(shots=2), 8)
  assert set(few.splits) == {"train", "val", "test"} and few.final_split == "train"
  assert np.bincount(few.splits["train"].labels).tolist() == [2] * 10
  for name in ("val", "test"):
    assert few.splits[name].digest == whole.splits[name].digest
  again = load_data("digits", data_config(shots=2), 8)
  other = load_data("digits", data_config(shots=3), 8)
  read = {"train", "val"}
  assert few.digest(read) == again.digest(read) != other.digest(read)


def test_a_fraction_leaves_val_and_test_as_they_are():
  whole = load_data("digits", data_config(), 8)
  fewer = load_data("digits", data_config(fraction=0.25), 8)
  assert set(fewer.splits) == {"train", "val", "test"}
  assert fewer.final_split == "train"
  counts = [np.bincount(data.splits["train"].labels) for data in (fewer, whole)]
  assert counts[0].tolist() == [int(0.25 * m + 0.5) for m in counts[1]]
  for name in ("val", "test"):
    assert fewer.splits[name].digest == whole.splits[name].digest
  assert fewer.source.endswith(", 25% of the training images of each class")


@pytest.mark.parametrize("resident_mb", [0, 1024])
def test_few_shots_of_a_folder_are_the_same_in_memory_and_streamed(
  tmp_path, resident_mb
):
  rng = np.random.default_rng(0)
  for i in range(24):
    path = tmp_path / "set" / "train" / ("ant", "bee", "cat")[i % 3] / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)

  def load(**changes):
    changes = {"resident_mb": resident_mb, "root": str(tmp_path / "set"), **changes}
    return load_data("folder", data_config(**changes), 8)

  whole, few = load(resident_mb=1024), load(shots=2)
  names, labels = few.files["train"]
  assert labels.tolist() == few.splits["train"].labels.tolist() == [0, 0, 1, 1, 2, 2]
  # Their pixels are those of the files that are stored with a run.
  (images,) = few.splits["train"].read([np.arange(6)])
  position = {name: i for i, name in enumerate(whole.files["train"][0])}
  (expected,) = whole.splits["train"].read([np.array([position[n] for n in names])])
  np.testing.assert_array_equal(images, expected)
  # A run's own lists give the same images again.
  (tmp_path / "splits.json").write_text(
    json.dumps(stored_splits.to_json(few.class_names, few.files))
  )
  again = load(shots=2, splits_json=str(tmp_path / "splits.json"))
  assert again.files["train"][0] == names


def test_names_of_classes_reach_every_terminal():
  split = _split([0, 1])
  data = TaskData("x\x1b[2J", ("a\nb", "\u202ec"), {"train": split})
  assert data.name == r"x\x1b[2J" and data.class_names == (r"a\nb", r"\u202ec")
