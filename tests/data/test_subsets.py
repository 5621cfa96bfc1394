"""Which images train and which choose, in numbers that others published."""

import random
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax.data import subsets
from insvp_jax.data.original_rows import tfds_order
from insvp_jax.data.subsets import (
  draw_fraction,
  draw_shots,
  draw_train_val,
  long_tail,
  long_tail_sizes,
  stratified_mask,
  stratified_parts,
)
from insvp_jax.data.tasks import TASKS, Subset


def _keys(text, number):
  return [text % i for i in range(number)]


# (task, keys of train, split and keys of val, first and sum of train800 and val200):
# rows of the original files, checked against the lists that VPT and E2VPT publish.
_ROWS = [
  (
    "cifar100",
    range(50_000),
    ("train", range(50_000)),
    ([16399, 1680, 47917, 17307], 20135529),
    ([13431, 9237, 17462, 32685], 5048484),
  ),
  (
    "svhn",
    range(73_257),
    ("train", range(73_257)),
    ([16399, 1680, 47917, 17307], 30231982),
    ([21145, 64736, 23870, 1919], 6945712),
  ),
  (
    "dsprites_location",
    range(737_280),
    ("train", range(737_280)),
    ([16399, 634903, 206287, 470425], 295636588),
    ([220697, 85843, 84902, 106270], 68639137),
  ),
  (
    "smallnorb_azimuth",
    range(24_300),
    ("test", range(24_300)),
    ([16399, 1680, 17307, 1456], 9846660),
    ([23018, 16932, 19084, 9933], 2456687),
  ),
  (
    "patch_camelyon",
    _keys("train_%d", 262_144),
    ("validation", _keys("valid_%d", 32_768)),
    ([251464, 132287, 133786, 86259], 104253048),
    ([3270, 10310, 20603, 11608], 3417930),
  ),
  (
    "clevr_count",
    _keys("CLEVR_train_%06d.png", 70_000),
    ("train", _keys("CLEVR_train_%06d.png", 70_000)),
    ([43876, 33421, 62025, 21419], 28805322),
    ([35084, 29360, 4525, 24831], 7108492),
  ),
]


def _slice(expression, rows):
  low, high = expression.split("[")[1].rstrip("]").split(":")
  return rows[int(low or 0) : int(high)]


@pytest.mark.parametrize("row", _ROWS, ids=[row[0] for row in _ROWS])
def test_the_thousand_of_vtab_are_the_published_rows(row):
  name, train_keys, (val_split, val_keys), train, val = row
  task = TASKS[name]
  assert task.val.split("[")[0] == val_split
  order = tfds_order("train", train_keys)
  same = val_split == "train"
  val_order = order if same else tfds_order(val_split, val_keys)
  first, second = _slice(task.train, order), _slice(task.val, val_order)
  assert (first[:4], sum(first), len(first)) == (*train, 800)
  assert (second[:4], sum(second), len(second)) == (*val, 200)


def test_the_order_of_tfds_is_that_of_its_own_shuffler():
  hashing = pytest.importorskip("tensorflow_datasets.core.hashing")
  keys = [f"{i}.png" for i in range(100)] + list(range(100))
  hasher = hashing.Hasher("train")
  digests = [hasher.hash_key(key) for key in keys]
  expected = sorted(range(len(keys)), key=lambda i: digests[i])
  assert tfds_order("train", keys) == expected
  assert tfds_order("test", keys) != expected


_TAILS = {
  10: (19573, [500, 488], [51, 50], (69, 31, 0)),
  50: (12608, [500, 480], [10, 10], (41, 41, 18)),
  100: (10847, [500, 477], [5, 5], (35, 35, 30)),
}


@pytest.mark.parametrize("imbalance", _TAILS)
def test_the_tail_has_the_standard_sizes(imbalance):
  total, first, last, shots = _TAILS[imbalance]
  sizes = long_tail_sizes(100, imbalance)
  assert (sum(sizes), sizes[:2], sizes[-2:]) == (total, first, last)
  assert sizes == sorted(sizes, reverse=True)
  many, few = sum(n > 100 for n in sizes), sum(n < 20 for n in sizes)
  assert (many, 100 - many - few, few) == shots


def _cifar_labels(seed=0):
  return np.random.default_rng(seed).permutation(np.repeat(np.arange(100), 500))


@pytest.mark.parametrize("imbalance", _TAILS)
def test_the_tail_keeps_what_ldam_keeps(imbalance):
  labels = _cifar_labels()
  # kaidic/LDAM-DRW, imbalance_cifar.py, with numpy's global generator.
  state = np.random.get_state()
  np.random.seed(0)
  expected = []
  for label, size in enumerate(long_tail_sizes(100, imbalance)):
    members = np.where(labels == label)[0]
    np.random.shuffle(members)
    expected.extend(members[:size].tolist())
  np.random.set_state(state)
  assert long_tail(labels, imbalance).tolist() == expected


def test_the_tail_is_drawn_from_the_order_of_the_files():
  task = TASKS["cifar100_lt100"]
  labels, seed = _cifar_labels(), 3
  expected = set(long_tail(labels, 100).tolist())
  names = np.array([f"train_{i:05d}" for i in range(50_000)])
  order = np.random.default_rng(1).permutation(50_000)
  train, val = draw_train_val(
    task, task.subset(), labels[order], names[order].tolist(), seed
  )
  assert (len(train), len(val)) == (9763, 1084)
  assert {*order[train].tolist(), *order[val].tolist()} == expected
  whole = np.bincount(labels[order[np.concatenate([train, val])]], minlength=100)
  assert whole.tolist() == long_tail_sizes(100, 100)
  # Val holds a tenth of each class, to within one image.
  share = np.bincount(labels[order[val]], minlength=100)
  assert np.all(abs(share - whole * 1084 / 10847) <= 1)


def test_the_tail_names_a_class_that_is_too_small():
  labels = np.delete(_cifar_labels(), np.flatnonzero(_cifar_labels() == 7)[:200])
  with pytest.raises(ValueError, match="class 7 has 300 images, the long tail needs"):
    long_tail(labels, 10)


def test_the_tail_of_a_single_class_is_named():
  with pytest.raises(ValueError, match="class 0 has 499 .*whole training set"):
    long_tail(np.zeros(499, np.int64), 10)


@pytest.mark.parametrize(
  ("name", "number"), [("hta_cifar100", 40_000), ("hta_svhn", 58_605)]
)
def test_first_takes_the_first_of_the_original_files(name, number):
  task = TASKS[name]
  subset = task.subset("insvp_release")
  total = subset.train + subset.val
  names = [f"train_{i:06d}" for i in range(total)]
  order = np.random.default_rng(0).permutation(total)
  labels = np.zeros(total, np.int64)
  train, val = draw_train_val(task, subset, labels, [names[i] for i in order], 0)
  assert order[train].tolist() == list(range(number))
  assert order[val].tolist() == list(range(number, total))


@pytest.mark.parametrize(
  ("name", "number"), [("hta_food101", 60_600), ("hta_gtsrb", 21_312)]
)
def test_shuffled_takes_the_first_after_pythons_shuffle(name, number):
  task = TASKS[name]
  subset = task.subset("insvp_release")
  total = subset.train + subset.val
  names = [f"{i:06d}" for i in range(total)]
  order = np.random.default_rng(0).permutation(total)
  labels = np.zeros(total, np.int64)
  train, val = draw_train_val(task, subset, labels, [names[i] for i in order], 5)
  expected = list(range(total))
  random.seed(3407)
  random.shuffle(expected)
  assert order[train].tolist() == expected[:number]
  assert order[val].tolist() == expected[number:]


@pytest.mark.parametrize("task", ["fgvc_cub", "fgvc_stanford_dogs"])
def test_drawn_val_has_as_many_of_each_class_as_vpt(task):
  task = TASKS[task]
  subset = task.subset("drawn")
  if task.num_classes == 200:  # 29 or 30 of each
    counts, expected = [30] * 194 + [29] * 6, {3}
  else:
    counts, expected = [100] * 120, {10}
  labels = np.repeat(np.arange(task.num_classes), counts)
  labels = np.random.default_rng(0).permutation(labels)
  train, val = draw_train_val(task, subset, labels, None, 0)
  assert (len(train), len(val)) == (subset.train, subset.val)
  assert set(np.bincount(labels[val]).tolist()) == expected


_LABELS = st.lists(st.integers(0, 7), min_size=1, max_size=80).map(np.array)
_RULES = st.sampled_from(["stratified", "first", "shuffled"])


@given(labels=_LABELS, rule=_RULES, share=st.integers(1, 9), seed=st.integers(0, 3))
def test_each_image_trains_or_chooses_whatever_the_sizes(labels, rule, share, seed):
  subset = Subset(rule, 10 * share, 10 * (10 - share))
  names = [f"{(i * 37) % 101:03d}" for i in range(len(labels))]
  task = TASKS["hta_cifar10"]
  train, val = draw_train_val(task, subset, labels, names, seed)
  assert sorted([*train, *val]) == list(range(len(labels)))
  assert abs(len(train) - len(labels) * share / 10) < 1
  again = draw_train_val(task, subset, labels, names, seed)
  assert again[0].tolist() == train.tolist()
  if rule != "stratified":
    # The order of the source does not matter, only names do.
    order = np.random.default_rng(seed).permutation(len(labels))
    moved, _ = draw_train_val(
      task, subset, labels[order], [names[i] for i in order], seed
    )
    assert order[moved].tolist() == train.tolist()


@given(st.data())
def test_stratified_mask_keeps_shares(data):
  labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=60)))
  number = data.draw(st.integers(0, len(labels)))
  seed = data.draw(st.integers(0, 3))
  chosen = stratified_mask(labels, number, seed)
  assert chosen.sum() == number
  for label in np.unique(labels):
    share = (labels == label).mean() * number
    assert abs(chosen[labels == label].sum() - share) < 1 + 1e-9
  np.testing.assert_array_equal(chosen, stratified_mask(labels, number, seed))


def test_stratified_mask_depends_on_the_seed_and_refuses_too_many():
  labels = np.zeros(30, np.int64)
  assert any(
    (stratified_mask(labels, 10, 0) != stratified_mask(labels, 10, seed)).any()
    for seed in (1, 2)
  )
  with pytest.raises(ValueError, match="cannot choose 31 of 30"):
    stratified_mask(labels, 31, 0)


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


@given(
  st.lists(st.integers(1, 4), min_size=1, max_size=5),
  st.sampled_from([(0.1, 0.2), (0.3, 0.2), (0.0, 0.2), (0.1, 0.0), (0.0, 0.0)]),
)
def test_classes_of_few_images_serve_train_first_and_then_the_larger_part(
  counts, shares
):
  labels = np.repeat(np.arange(len(counts)), counts)
  names = [f"c{i}" for i in range(len(counts))]
  fractions = dict(zip(("val", "test"), shares, strict=True))
  wanted = sorted((f for f in fractions if fractions[f]), key=fractions.get)[::-1]
  with mock.patch.object(subsets.logging, "warning") as warning:
    parts = stratified_parts(labels, fractions, 0, names)
  for label, count in enumerate(counts):
    assert set(parts[labels == label]) == {"train", *wanted[: count - 1]}
  said = [call.args[0] % call.args[1:] for call in warning.call_args_list]
  expected = []
  for part in fractions:
    least = 2 + wanted.index(part) if part in wanted else 0
    classes = [name for name, n in zip(names, counts, strict=True) if n < least]
    if len(classes) == len(counts):
      expected.append(f"of each in {part}, so there is none")
    elif classes:
      expected.append(f"{len(classes)} of the classes have too few images for one in")
  assert len(said) == len(expected)
  assert all(part in line for part, line in zip(expected, said, strict=True))


def test_fractions_leave_something_for_train():
  labels = np.array([0, 0, 0, 1, 1])
  for bad in ({"val": 0.5, "test": 0.5}, {"val": -0.1, "test": 0.2}):
    with pytest.raises(ValueError, match="val_fraction=.*together below 1"):
      stratified_parts(labels, bad, 0, ["cat", "dog"])


def test_the_split_seed_changes_what_is_drawn():
  task = TASKS["hta_cifar100"]
  labels = _cifar_labels()
  first, second = (
    set(draw_train_val(task, task.subset(), labels, None, seed)[1].tolist())
    for seed in (0, 1)
  )
  assert len(first) == len(second) == 5000 and first != second


@pytest.mark.parametrize("rule", ["first", "shuffled", "long_tail"])
def test_rules_that_need_names_say_which_feature_has_them(rule):
  task = TASKS["hta_cifar100"]
  with pytest.raises(ValueError, match="hta_cifar100 .*have no names.*feature 'id'"):
    draw_train_val(task, Subset(rule, 8, 2), np.zeros(10, np.int64), None, 0)


def test_an_unknown_subset_is_named():
  with pytest.raises(ValueError, match="'ofical', but hta_dtd has official, insvp_rel"):
    TASKS["hta_dtd"].subset("ofical")


def test_published_sizes_add_up():
  for task in TASKS.values():
    for name, subset in task.subsets.items():
      sizes = {"train": subset.train, "val": subset.val, "test": task.num_test}
      assert task.unpublished_sizes(sizes, name) == []
      wrong = {**sizes, "val": subset.val + 1, "train_val": 0}
      (line,) = task.unpublished_sizes(wrong, name)
      assert line.startswith(f"{task.name}: the val split has {subset.val + 1} images")
  assert subsets.SHUFFLE_SEED == 3407


@given(
  counts=st.lists(st.integers(3, 9), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_shots_are_so_many_of_each_class_and_fewer_are_among_more(counts, seed):
  order = np.random.default_rng(seed).permutation(sum(counts))
  labels = np.repeat(np.arange(len(counts)), counts)[order]
  names = [str(label) for label in range(len(counts))]
  chosen = {shots: draw_shots(labels, shots, seed, names) for shots in (1, 2, 3)}
  for shots, positions in chosen.items():
    assert np.all(np.diff(positions) > 0)
    assert np.bincount(labels[positions]).tolist() == [shots] * len(counts)
  assert set(chosen[1]) < set(chosen[2]) < set(chosen[3])


@given(
  counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_a_fraction_is_that_share_of_each_class_and_less_is_among_more(counts, seed):
  order = np.random.default_rng(seed).permutation(sum(counts))
  labels = np.repeat(np.arange(len(counts)), counts)[order]
  fractions = (1e-6, 0.25, 0.5, 0.9, 1.0)
  drawn = [draw_fraction(labels, f, seed, len(counts)) for f in fractions]
  for fraction, positions in zip(fractions, drawn, strict=True):
    assert np.all(np.diff(positions) > 0)
    expected = [max(1, int(fraction * count + 0.5)) for count in counts]
    assert np.bincount(labels[positions]).tolist() == expected
  for less, more in zip(drawn, drawn[1:], strict=False):
    assert set(less) <= set(more)
  assert len(drawn[-1]) == len(labels)


def test_a_fraction_of_classes_of_one_size_is_their_shots_and_none_stays_none():
  labels, names = np.arange(40) % 2, ("ant", "bee")
  shots = draw_shots(labels, 2, 0, names)
  assert draw_fraction(labels, 0.1, 0, 2).tolist() == shots.tolist()
  # A class that train has not.
  assert draw_fraction(labels, 0.1, 0, 3).tolist() == shots.tolist()


def test_shots_are_drawn_by_the_seed_and_are_there():
  labels, names = np.arange(40) % 2, ("ant", "bee")
  assert draw_shots(labels, 2, 0, names).tolist() == [8, 23, 33, 38]
  assert draw_shots(labels, 2, 1, names).tolist() != [8, 23, 33, 38]
  with pytest.raises(ValueError, match="20 images of the class 'ant'; .* at most 20"):
    draw_shots(labels, 21, 0, names)
  with pytest.raises(ValueError, match="only 0 images of the class 'cat'; set it to 0"):
    draw_shots(labels, 1, 0, (*names, "cat"))
