from data_fixtures import data_config, pixels
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax.data import ArraySplit, TaskData, load_data
from insvp_jax.data.stratify import stratified_choice, stratified_parts


def _split(labels):
  images = np.stack([pixels(i, 2) for i in range(len(labels))])
  return ArraySplit(images, np.array(labels, np.int32))


def test_task_data_checks_labels():
  data = TaskData("t", ("a", "b"), {"train": _split([0, 1, 1])}, skipped=2)
  assert data.num_classes == 2
  assert data.describe() == "t: 2 classes, train 3, 2 unreadable images skipped"
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
  assert len({digest(), *others}) == 6


def test_unknown_tasks_and_sizes_are_named():
  with pytest.raises(ValueError, match="unknown task 'cifar_100'.*mean 'cifar100'"):
    load_data("cifar_100", data_config(), 32)
  with pytest.raises(ValueError, match="unknown preset 'nope'"):
    load_data("digits", data_config(preset="nope"), 32)
  with pytest.raises(ValueError, match="image_size has to be positive, got 0"):
    load_data("digits", data_config(), 0)


@given(st.data())
def test_stratified_choice_keeps_shares(data):
  labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=60)))
  number = data.draw(st.integers(0, len(labels)))
  seed = data.draw(st.integers(0, 3))
  chosen = stratified_choice(labels, number, seed)
  assert chosen.sum() == number
  for label in np.unique(labels):
    share = (labels == label).mean() * number
    assert abs(chosen[labels == label].sum() - share) < 1 + 1e-9
  np.testing.assert_array_equal(chosen, stratified_choice(labels, number, seed))


def test_stratified_choice_depends_on_the_seed_and_refuses_too_many():
  labels = np.zeros(30, np.int64)
  assert any(
    (stratified_choice(labels, 10, 0) != stratified_choice(labels, 10, seed)).any()
    for seed in (1, 2)
  )
  with pytest.raises(ValueError, match="cannot choose 31 of 30"):
    stratified_choice(labels, 31, 0)


@given(
  st.lists(st.integers(3, 30), min_size=1, max_size=4),
  st.sampled_from([(0.1, 0.2), (0.4, 0.5), (0.01, 0.9), (0.3, 0.3)]),
)
def test_stratified_parts_serve_every_class(counts, shares):
  labels = np.repeat(np.arange(len(counts)), counts)
  names = [f"c{i}" for i in range(len(counts))]
  fractions = dict(zip(("val", "test"), shares, strict=True))
  parts = stratified_parts(labels, fractions, 0, names)
  for label, count in enumerate(counts):
    own = parts[labels == label]
    for name, fraction in fractions.items():
      number = (own == name).sum()
      assert 1 <= number <= max(1, fraction * count + 0.5)
    assert (own == "train").sum() >= 1


def test_stratified_parts_refuse_what_cannot_be_split():
  labels = np.array([0, 0, 0, 1, 1])
  names = ["cat", "dog"]
  with pytest.raises(ValueError, match="'dog' has 2 images.*train, val, test"):
    stratified_parts(labels, {"val": 0.1, "test": 0.1}, 0, names)
  parts = stratified_parts(labels, {"val": 0.1, "test": 0.0}, 0, names)
  assert sorted(parts) == ["train"] * 3 + ["val"] * 2
  for bad in ({"val": 0.5, "test": 0.5}, {"val": -0.1, "test": 0.2}):
    with pytest.raises(ValueError, match="val_fraction=.*together below 1"):
      stratified_parts(labels, bad, 0, names)
