from data_fixtures import data_config, pixels
import numpy as np
import pytest

from insvp_jax.data import ArraySplit, TaskData, load_data


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
