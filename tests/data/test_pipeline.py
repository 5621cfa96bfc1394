from collections import Counter
import itertools

from data_fixtures import number_of, pixels
from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from insvp_jax.data import ArraySplit, StreamSplit, pipeline, resident


def _split(num_examples: int, size: int = 2) -> ArraySplit:
  images = np.stack([pixels(i, size) for i in range(num_examples)])
  return ArraySplit(images, np.arange(num_examples, dtype=np.int32) % 7)


def _numbers(batch) -> list[int]:
  return [number_of(image) for image in np.asarray(batch["images"])]


def _take(number, split, **kwargs):
  return list(itertools.islice(pipeline.train_batches(split, **kwargs), number))


_balanced_order = jax.jit(resident.balanced_order, static_argnums=3)


def _rows(mesh):
  return NamedSharding(mesh, PartitionSpec("data"))


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
  split = _split(20)
  batches = _take(10, split, batch_size=4, seed=3)
  epochs = [sum(map(_numbers, batches[i : i + 5]), []) for i in (0, 5)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
  assert epochs[0] != epochs[1] and epochs[0] != list(range(20))
  for batch in batches:
    assert [n % 7 for n in _numbers(batch)] == batch["labels"].tolist()
    assert batch["images"].dtype == np.uint8 and batch["labels"].dtype == np.int32


def test_what_fills_no_batch_is_left_out_of_the_epoch():
  numbers = sum(map(_numbers, _take(6, _split(11), batch_size=5, seed=0)), [])
  for epoch in range(3):
    assert len(set(numbers[10 * epoch : 10 * epoch + 10])) == 10


def test_the_stream_is_a_function_of_seed_and_step():
  split = _split(11)
  batches = _take(9, split, batch_size=3, seed=5)
  for start in (0, 2, 3, 7):
    later = _take(2, split, batch_size=3, seed=5, start_step=start)
    expected = batches[start : start + 2]
    assert list(map(_numbers, later[: len(expected)])) == list(map(_numbers, expected))
  other = _take(9, split, batch_size=3, seed=6)
  assert list(map(_numbers, other)) != list(map(_numbers, batches))


def test_the_order_is_the_documented_permutation():
  key = jax.random.fold_in(jax.random.key(4), 1)
  expected = jax.random.permutation(key, 12).tolist()
  (batch,) = _take(1, _split(12), batch_size=12, seed=4, start_step=1)
  assert _numbers(batch) == expected


@given(
  labels=st.lists(st.integers(0, 5), min_size=23, max_size=23),
  seed=st.integers(0, 2**32 - 1),
  epoch=st.integers(0, 2**31 - 1),
)
def test_balanced_epochs_show_all_classes_alike_and_their_images_in_turn(
  labels, seed, epoch
):
  labels = np.array(labels, np.int32)
  order = np.asarray(_balanced_order(np.uint32(seed), np.uint32(epoch), labels, 7))
  assert order.shape == labels.shape
  present, places = np.unique(labels[order], return_counts=True)
  np.testing.assert_array_equal(present, np.unique(labels))
  assert set(places - len(labels) // len(present)) <= {0, 1}
  seen = np.bincount(order, minlength=len(labels))
  for label in present:
    times = seen[labels == label]
    assert times.max() - times.min() <= 1


def test_balanced_batches_are_those_of_seed_and_step_on_any_devices(mesh):
  # Class 6 is rare.
  images = np.stack([pixels(i, 2) for i in range(31)])
  labels = np.array([6] * 2 + [0] * 20 + [3] * 9, np.int32)
  split = ArraySplit(images, labels)
  options = {"batch_size": 8, "seed": 3, "balanced_classes": 8}
  batches = list(map(_numbers, _take(9, split, **options)))
  orders = [sorted(sum(batches[3 * i : 3 * i + 3], [])) for i in range(3)]
  assert len({str(order) for order in orders}) == 3
  seen = Counter(int(labels[n]) for n in sum(batches, []))
  assert 20 <= min(seen.values()) and set(seen) == {0, 3, 6}
  resumed = _take(4, split, start_step=5, **options)
  assert list(map(_numbers, resumed)) == batches[5:]
  sharded = _take(9, split, sharding=_rows(mesh), **options)
  assert list(map(_numbers, sharded)) == batches
  stream = StreamSplit(
    labels, 2, "digest", lambda requests, whole: split.read(requests, whole=whole)
  )
  assert list(map(_numbers, _take(9, stream, **options))) == batches


def test_four_devices_see_what_one_sees(mesh, make_mesh):
  split = _split(16)
  runs = [
    _take(5, split, batch_size=8, seed=1, sharding=sharding)
    for sharding in (None, _rows(make_mesh(1)), _rows(mesh))
  ]
  assert len({str(list(map(_numbers, run))) for run in runs}) == 1
  sharded = runs[-1][0]
  assert sharded["images"].sharding.is_equivalent_to(_rows(mesh), 4)
  shapes = {shard.data.shape for shard in sharded["images"].addressable_shards}
  assert shapes == {(2, 2, 2, 3)}


def test_a_split_smaller_than_a_batch_names_both_numbers_at_once():
  with pytest.raises(ValueError, match="batch_size=8 .* 5 images.*at most 5"):
    pipeline.train_batches(_split(5), batch_size=8, seed=0)
  with pytest.raises(ValueError, match="batch_size=0"):
    pipeline.train_batches(_split(5), batch_size=0, seed=0)
  with pytest.raises(ValueError, match="at least 1, got 0"):
    pipeline.eval_batches(_split(5), batch_size=0)


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([None, 1, 2, 4]))
def test_evaluation_gives_every_example_exactly_once(make_mesh, number, rows, devices):
  sharding = devices and _rows(make_mesh(devices))
  batch_size = rows * (devices or 1)
  seen, total = Counter(), 0.0
  split = _split(number)
  for batch in pipeline.eval_batches(split, batch_size=batch_size, sharding=sharding):
    assert batch["images"].shape == (batch_size, 2, 2, 3)
    assert batch["mask"].dtype == np.float32
    real = np.asarray(batch["mask"]) == 1
    total += float(batch["mask"].sum())
    numbers = np.array(_numbers(batch))
    labels = np.asarray(batch["labels"])
    np.testing.assert_array_equal(labels[real], numbers[real] % 7)
    seen.update(numbers[real].tolist())
  assert seen == Counter(range(number)) and total == number


def test_evaluation_is_the_same_on_one_and_four_devices(mesh):
  split = _split(13)
  one = list(pipeline.eval_batches(split, batch_size=8))
  four = list(pipeline.eval_batches(split, batch_size=8, sharding=_rows(mesh)))
  for left, right in zip(one, four, strict=True):
    jax.tree.map(np.testing.assert_array_equal, left, right)
