"""Equal pictures in two splits or under two classes."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax.data import duplicates
from insvp_jax.data.splits import ArraySplit

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
# Two that differ in one pixel, which the quick look does not see.
PIXELS[8] = PIXELS[7]
PIXELS[8, 1, 1, 0] ^= 1


def make(**splits):
  """Makes splits of (number of a picture, label)."""
  arrays, files = {}, {}
  for name, rows in splits.items():
    numbers, labels = zip(*rows, strict=True)
    arrays[name] = ArraySplit(PIXELS[list(numbers)], np.array(labels, np.int32))
    files[name] = [f"{name}/{i}.png" for i in range(len(rows))]
  return arrays, files


def test_a_clean_set_is_left_as_it_is():
  splits, files = make(train=[(0, 0), (1, 1), (1, 1), (7, 0)], test=[(2, 0), (8, 1)])
  # Twice in one split under one class is no leak.
  kept = duplicates.check(splits, files, "error", "set")
  assert {name: len(positions) for name, positions in kept.items()} == {
    "train": 4,
    "test": 2,
  }


def test_leaks_and_contradictions_are_counted_and_two_named(caplog):
  splits, files = make(
    train=[(0, 0), (1, 1), (3, 0), (3, 1)], val=[(4, 0)], test=[(0, 0), (4, 0), (5, 1)]
  )
  with pytest.raises(ValueError, match="config.data.duplicates") as caught:
    duplicates.check(splits, files, "error", "set")
  assert str(caught.value).startswith(
    "set: 2 pictures are in two splits (equal pixels), such as train/0.png and "
    "test/0.png; 1 picture is under two classes (equal pixels), such as train/3.png "
    "and train/2.png."
  )
  kept = duplicates.check(splits, files, "warn", "set")
  assert [len(kept[name]) for name in ("train", "val", "test")] == [4, 1, 3]
  kept = duplicates.check(splits, files, "drop", "set")
  assert kept["train"].tolist() == [1] and kept["val"].tolist() == []
  assert kept["test"].tolist() == [0, 1, 2]


def test_names_that_no_terminal_can_show_are_escaped(caplog):
  splits, files = make(train=[(0, 0)], test=[(0, 0)])
  files["train"] = ["train/\udcb8.png"]
  duplicates.check(splits, files, "warn", "set")
  assert "such as train/\\xb8.png and test/0.png" in caplog.text


rows = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=1, max_size=9)


@given(train=rows, val=rows, test=rows)
def test_after_dropping_nothing_leaks_or_contradicts_outside_of_test(train, val, test):
  splits, files = make(train=train, val=val, test=test)
  kept = duplicates.check(splits, files, "drop", "set")
  left = {name: splits[name].take(positions) for name, positions in kept.items()}
  assert len(left["test"]) == len(test)
  for group in duplicates.find({n: s for n, s in left.items() if len(s)}):
    assert {split for split, _ in group.places} == {"test"}
