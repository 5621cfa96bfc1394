"""FGVC, HTA and CIFAR-100-LT from TFRecords: which images, by name and by pixels."""

import json
import random

from data_fixtures import data_config, png
import numpy as np
import pytest
from tfds_fixtures import (
  UNSEEN,
  bit_image,
  coloured,
  features_of,
  number_in,
  places,
  prepare,
  prepare_named,
  record,
  shards_of,
)

from insvp_jax.data import load_data, splits
from insvp_jax.data.sources import tfds, tfds_builder
from insvp_jax.data.subsets import stratified_mask
from insvp_jax.data.tasks import TASKS


def _cifar(builder, classes):
  labels = np.random.default_rng(classes).permutation(np.arange(50_000) % classes)
  names = [f"train_{i:05d}" for i in range(50_000)]
  return builder, "id", names, labels, ("test", 10_000)


def _svhn():
  labels = np.random.default_rng(0).integers(0, 10, 73_257)
  names = [f"train_{i:06d}" for i in range(73_257)]
  return "svhn_cropped", "id", names, labels, ("test", 26_032)


def _food(version="2.1.0", feature="id"):
  names = sorted(f"food_{i % 101:03d}/{i * 37}" for i in range(75_750))
  labels = [int(name[5:8]) for name in names]
  return f"food101:{version}", feature, names, labels, ("validation", 25_250)


def _cub():
  # 29 or 30 of each class; TFDS's names start with two folders.
  names = [f"{1 + i % 200:03d}.Bird/Bird_{i:04d}.jpg" for i in range(5994)]
  names = [f"CUB_200_2011/images/{name}" for name in sorted(names)]
  labels = [int(name.split("/")[2][:3]) - 1 for name in names]
  return "caltech_birds2011", "image/filename", names, labels, ("test", 5794)


def _dogs():
  names = [f"n{200 + i % 120}-Dog/n{200 + i % 120}_{i}.jpg" for i in range(12_000)]
  labels = [int(name[1:4]) - 200 for name in names]
  return "stanford_dogs", "image/filename", names, labels, ("test", 8580)


def _cars():
  return "cars196", "", [], np.arange(8144) % 196, ("test", 8041)


_SETS = {
  "cifar10": lambda: _cifar("cifar10", 10),
  "cifar100": lambda: _cifar("cifar100", 100),
  "svhn": _svhn,
  "food101": _food,
  "cub": _cub,
  "stanford_dogs": _dogs,
  "stanford_cars": _cars,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Prepares a set once; returns (TFDS's folder, order, names, labels)."""
  root, done = tmp_path_factory.mktemp("tfds"), {}

  def make(name):
    if name not in done:
      builder, feature, names, labels, test = _SETS[name]()
      order = prepare_named(root, builder, feature, names, labels, test)
      done[name] = order, names, np.array(labels)
    return root, *done[name]

  return make


def _config(root, **options):
  cache_dir = str(root / "cache")
  return data_config(data_dir=str(root), resident_mb=0, cache_dir=cache_dir, **options)


def _load(task, root, order, **options):
  """Returns a task and for each split the numbers of the original files."""
  config = _config(root, **options)
  return load_data(task, config, 8), _numbers(task, config, order)


def _numbers(task, config, order):
  builder = tfds_builder.find_builder(TASKS[task], config.data_dir)
  records = tfds.records_of_splits(builder, TASKS[task], config)
  numbers = {
    split: order[places(builder, "train", records[split])].tolist()
    for split in ("train", "val", "train_val")
  }
  assert numbers["train_val"] == numbers["train"] + numbers["val"]
  return numbers


def _check_pixels(data, numbers, labels):
  for split, members in numbers.items():
    assert data.splits[split].labels.tolist() == labels[members].tolist()
    shown = [i for i, number in enumerate(members) if number % 50 == 0][:40]
    images = splits.to_memory(data.splits[split], np.array(shown)).images
    assert [number_in(image) for image in images] == [members[i] for i in shown]


@pytest.mark.parametrize(
  ("task", "subset"),
  [
    ("hta_cifar10", "official"),
    ("hta_cifar100", "official"),
    ("hta_svhn", "official"),
    ("hta_food101", "official"),
    ("hta_cub", "official"),
    ("hta_stanford_dogs", "official"),
    ("fgvc_cub", "drawn"),
    ("fgvc_stanford_dogs", "drawn"),
    ("fgvc_stanford_cars", "drawn"),
  ],
)
def test_a_drawn_val_has_its_share_of_each_class(task, subset, prepared, caplog):
  root, order, _, labels = prepared(task.split("_", 1)[1])
  data, numbers = _load(task, root, order, subset=subset)
  assert "published" not in caplog.text
  assert sorted(numbers["train_val"]) == list(range(len(labels)))
  expected = np.bincount(labels) * len(numbers["val"]) / len(labels)
  assert np.all(abs(np.bincount(labels[numbers["val"]]) - expected) < 1)
  # Both parts keep TFDS's order, and another seed draws others.
  place = np.argsort(order)
  for split in ("train", "val"):
    assert np.all(np.diff(place[numbers[split]]) > 0)
  other = _numbers(task, _config(root, subset=subset, split_seed=1), order)
  assert set(other["val"]) != set(numbers["val"])
  _check_pixels(data, numbers, labels)
  # VPT trains FGVC on its 90% alone.
  assert data.final_split == ("train" if subset == "drawn" else "train_val")
  assert data.source.endswith(f", subset {subset}")
  assert data.num_classes == TASKS[task].num_classes == len(set(data.class_names))


@pytest.mark.parametrize(
  ("task", "number"),
  [("hta_cifar10", 40_000), ("hta_cifar100", 40_000), ("hta_svhn", 58_605)]
  + [("hta_food101", 60_600)],
)
def test_insvps_release_speaks_of_the_original_files(task, number, prepared, caplog):
  root, order, _, labels = prepared(task.removeprefix("hta_"))
  data, numbers = _load(task, root, order, subset="insvp_release")
  expected = list(range(len(labels)))
  if task == "hta_food101":
    random.Random(3407).shuffle(expected)
  assert numbers["train"] == expected[:number]
  assert numbers["val"] == expected[number:]
  assert data.final_split == "train"
  assert "published" not in caplog.text
  _check_pixels(data, numbers, labels)


@pytest.mark.parametrize(
  ("imbalance", "total"), [(10, 19_573), (50, 12_608), (100, 10_847)]
)
def test_the_long_tail_is_that_of_ldam(imbalance, total, prepared, caplog):
  root, order, _, labels = prepared("cifar100")
  data, numbers = _load(f"cifar100_lt{imbalance}", root, order)
  # kaidic/LDAM-DRW, imbalance_cifar.py, on the original files.
  rng, expected = np.random.RandomState(0), []
  for label in range(100):
    members = np.flatnonzero(labels == label)
    rng.shuffle(members)
    size = int(500 * (1 / imbalance) ** (label / 99))
    expected.extend(members[:size].tolist())
  assert len(expected) == total
  chosen = stratified_mask(labels[expected], total // 10, seed=0)
  assert numbers["train"] == [
    n for n, val in zip(expected, chosen, strict=True) if not val
  ]
  assert numbers["val"] == [n for n, val in zip(expected, chosen, strict=True) if val]
  assert len(data.splits["test"]) == 10_000
  assert data.final_split == "train_val"
  assert "published" not in caplog.text
  _check_pixels(data, numbers, labels)


@pytest.mark.parametrize(
  "task", ["hta_dtd", "hta_oxford_flowers", "fgvc_oxford_flowers"]
)
def test_official_splits_are_taken_as_they_stand(task, tmp_path, caplog):
  builder = TASKS[task].spec.split(":")[0]
  features = features_of(builder)
  train, test = (1880, 1880) if builder == "dtd" else (1020, 6149)

  def example(number):
    image = png(coloured(bit_image(number, 16, 16)))
    return record(features, image=image, label=number % TASKS[task].num_classes)

  offsets = {"train": (0, train), "validation": (10_000, train), "test": (20_000, test)}
  shards = {
    split: shards_of(
      size, [(0, 9), (size - 9, size)], lambda i, start=start: example(start + i)
    )
    for split, (start, size) in offsets.items()
  }
  prepare(tmp_path, builder, shards, unseen=example(UNSEEN))
  data = load_data(task, data_config(data_dir=str(tmp_path), resident_mb=0), 8)
  assert "published" not in caplog.text
  for split, (start, size) in zip(
    ("train", "val", "test"), offsets.values(), strict=True
  ):
    assert len(data.splits[split]) == size
    ends = np.array([0, 1, 2, size - 2, size - 1])
    found = splits.to_memory(data.splits[split], ends)
    assert [number_in(image) for image in found.images] == (start + ends).tolist()
  final = "train_val" if task.startswith("hta") else "train"
  assert data.final_split == final


def test_the_release_on_official_splits_trains_on_train_alone():
  for name in ("hta_dtd", "hta_oxford_flowers"):
    assert TASKS[name].final_split("insvp_release") == "train"


def _lists(folder, train, val):
  """Writes VPT's train.json and val.json."""
  folder.mkdir(exist_ok=True)
  for name, members in {"train": train, "val": val}.items():
    (folder / f"{name}.json").write_text(json.dumps(members))
  return str(folder)


def _vpt_lists(names, labels, class_id):
  """Returns lists as VPT has them: two parts of a path, ids from 1."""
  rng = np.random.default_rng(11)
  members = [
    ("/".join(names[i].split("/")[-2:]), class_id(int(labels[i])))
    for i in rng.permutation(len(names))
  ]
  cut = len(members) // 10 + 1  # 600 of 5994 birds
  return dict(members[cut:]), dict(members[:cut])


@pytest.mark.parametrize(
  ("task", "subset"),
  [("fgvc_cub", "vpt"), ("hta_cub", "insvp_release"), ("fgvc_stanford_dogs", "vpt")],
)
def test_vpts_lists_are_joined_to_tfds_by_name(task, subset, prepared, tmp_path):
  root, order, names, labels = prepared(task.split("_", 1)[1])
  padded = task.endswith("cub")  # text there, numbers elsewhere
  train, val = _vpt_lists(
    names, labels, (lambda i: f"{i + 1:03d}") if padded else (lambda i: i + 1)
  )
  lists = _lists(tmp_path / "lists", train, val)
  data, numbers = _load(task, root, order, subset=subset, lists=lists)
  number_of_name = {"/".join(n.split("/")[-2:]): i for i, n in enumerate(names)}
  assert numbers["train"] == [number_of_name[name] for name in train]
  assert numbers["val"] == [number_of_name[name] for name in val]
  assert data.final_split == "train"
  _check_pixels(data, numbers, labels)


def _message(kind, call):
  with pytest.raises(kind) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_lists_that_are_not_given_are_asked_for(prepared):
  root = prepared("cub")[0]
  config = data_config(data_dir=str(root))
  message = _message(FileNotFoundError, lambda: load_data("fgvc_cub", config, 8))
  assert "config.data.lists" in message and "config.data.subset=drawn" in message
  config.lists = str(root / "nowhere")
  message = _message(FileNotFoundError, lambda: load_data("fgvc_cub", config, 8))
  assert str(root / "nowhere" / "train.json") in message


def test_cars_cannot_be_joined(prepared, tmp_path):
  config = data_config(data_dir=str(prepared("stanford_cars")[0]), lists=str(tmp_path))
  message = _message(ValueError, lambda: load_data("fgvc_stanford_cars", config, 8))
  assert "config.data.root" in message and "config.data.subset=drawn" in message


def test_lists_that_contradict_themselves_or_tfds_are_named(prepared, tmp_path):
  root, _, names, labels = prepared("cub")
  train, val = _vpt_lists(names, labels, lambda i: f"{i + 1:03d}")
  first, second = list(train)[:2]
  other = next(name for name in train if train[name] != train[first])
  spoilt = next(iter(val))
  swap = {"001": "002", "002": "001"}
  cases = {
    "unknown": (
      train | {"001.Bird/none.jpg": "001"},
      val,
      r"names '001.Bird/none.jpg'",
    ),
    "overlap": (train, val | {first: train[first]}, f"both hold '{first}'"),
    "two paths": (
      train,
      val | {f"images/{first}": train[first]},
      f"names 'images/{first}', but that image is listed as '{first}' already",
    ),
    "kinds": (train | {first: 1}, val, "mixes kinds of class ids"),
    "class": (train | {first: train[other]}, val, "with images that TFDS has in anoth"),
    "few": ({n: i for n, i in train.items() if i != "007"}, val, "has 199 classes"),
    "many": (train | {first: "201"}, val, "has 201 classes"),
    "val id": (train, val | {spoilt: "300"}, f"gives '{spoilt}' the class id '300'"),
    "val kind": (train, val | {spoilt: 1}, f"gives '{spoilt}' the class id 1"),
    "nested": (train | {first: {"a": 1}}, val, f"gives '{first}' the class id"),
    "a list": (list(train), val, "train.json holds no {image: class id}"),
    "empty": (train, {}, "val.json holds no {image: class id}"),
  }
  config = data_config(data_dir=str(root), cache_dir=str(root / "cache"))
  for name, (some, others, expected) in cases.items():
    config.lists = _lists(tmp_path / name, some, others)
    message = _message(ValueError, lambda: load_data("fgvc_cub", config, 8))
    assert expected in message, name
    assert str(tmp_path / name) in message
  # Labels are those of TFDS: other names for the classes change nothing.
  renamed = {n: swap.get(i, i) for n, i in train.items()}
  config.lists = _lists(
    tmp_path / "swap", renamed, {n: swap.get(i, i) for n, i in val.items()}
  )
  config.resident_mb = 0
  data = load_data("fgvc_cub", config, 8)
  assert data.splits["train"].labels.tolist() == [int(i) - 1 for i in train.values()]
  path = tmp_path / "twice" / "train.json"
  config.lists = _lists(tmp_path / "twice", train, val)
  path.write_text(path.read_text()[:-1] + f', "{first}": "001"}}')
  message = _message(ValueError, lambda: load_data("fgvc_cub", config, 8))
  assert f"train.json holds '{first}' more than once" in message
  path.write_text('{"a": ')
  message = _message(ValueError, lambda: load_data("fgvc_cub", config, 8))
  assert "train.json is no JSON" in message


def test_food101_without_ids_serves_what_needs_none(tmp_path):
  _, _, names, labels, _ = _food()
  test = ("validation", 10)
  prepare_named(tmp_path, "food101:2.0.0", "", names, labels[:200], test)
  config = data_config(data_dir=str(tmp_path))
  assert len(load_data("hta_food101", config, 8).splits["val"]) == 20
  config.subset = "insvp_release"
  message = _message(ValueError, lambda: load_data("hta_food101", config, 8))
  assert (
    "food101/2.0.0" in message and "has no feature 'id', only image, label" in message
  )
  assert "prepare another version of it with insvp prepare" in message
  # The version that has them is the one that is read as soon as it is there.
  prepare_named(tmp_path, "food101:2.1.0", "id", names, labels[:200], test)
  assert len(load_data("hta_food101", config, 8).splits["val"]) == 40


@pytest.mark.parametrize("task", ["fgvc_nabirds", "hta_nabirds", "hta_gtsrb"])
def test_what_tfds_lacks_is_asked_for_as_a_folder(task, tmp_path):
  config = data_config(data_dir=str(tmp_path))
  message = _message(FileNotFoundError, lambda: load_data(task, config, 8))
  assert "config.data.root" in message and task in message


def test_an_unknown_subset_is_named_before_anything_is_read(tmp_path):
  config = data_config(data_dir=str(tmp_path), subset="releese")
  message = _message(ValueError, lambda: load_data("hta_cifar10", config, 8))
  assert "'releese', but hta_cifar10 has official, insvp_release" in message
