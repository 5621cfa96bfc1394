"""FGVC and HTA from folders of images with train.json, val.json and test.json."""

import dataclasses
import json
import re

import data_fixtures as fixtures
from data_fixtures import data_config, number_of, pixels, png
import numpy as np
import pytest

from insvp_jax.data import load_data
from insvp_jax.data.tasks import TASKS

# Class ids as the published lists have them, with the name of a class's i-th image.
_SETS = {
  "cub": (
    "CUB_200_2011",
    "images/",
    ("001", "002", "010", "100", "200"),
    "{id}.Bird_{id}/Bird_{i:04d}.jpg",
  ),
  "nabirds": ("nabirds", "images/", (295, 299, 313, 975, 1010), "{id:04d}/{i:04d}.jpg"),
  "stanford_dogs": (
    "stanford-dogs",
    "Images/",
    (1, 2, 3, 10, 20),
    "n{id:04d}-Dog/n{id:04d}_{i}.jpg",
  ),
  "oxford_flowers": (
    "OxfordFlower",
    "",
    (1, 2, 3, 10, 20),
    "jpg/image_{id:02d}{i:03d}.jpg",
  ),
  "stanford_cars": (
    "stanford-cars",
    "",
    (1, 2, 3, 10, 20),
    "car_ims/{id:03d}{i:03d}.jpg",
  ),
}
_CLASSES = 5
_TASKS = [f"{b}_{s}" for b in ("fgvc", "hta") for s in _SETS if f"{b}_{s}" in TASKS]


@pytest.fixture(autouse=True)
def _few_classes(monkeypatch):
  for name in _TASKS:
    task = dataclasses.replace(TASKS[name], num_classes=_CLASSES)
    monkeypatch.setitem(TASKS, name, task)


def _lists(data_set):
  """Returns the lists: of each class 9 train, 1 val and 2 test images.

  NABirds' val lacks two classes, as the published one does.
  """
  _, _, ids, name = _SETS[data_set]
  lists = {"train": {}, "val": {}, "test": {}}
  for i in range(12):
    for label, class_id in enumerate(ids):
      split = "train" if i < 9 else "val" if i == 9 else "test"
      if data_set == "nabirds" and label in (1, 3) and split == "val":
        split = "train"
      lists[split][name.format(id=class_id, i=i)] = class_id
  return lists


def _numbers_of(data_set):
  """Returns {split: (numbers shown by the images, labels)}."""
  ids = _SETS[data_set][2]
  found, number = {}, 0
  for split, members in _lists(data_set).items():
    labels = [ids.index(value) for value in members.values()]
    found[split] = list(range(number, number + len(members))), labels
    number += len(members)
  train, val = found["train"], found["val"]
  found["train_val"] = train[0] + val[0], train[1] + val[1]
  return found


def _images(data_set):
  """Returns {name below the data set's folder: content}."""
  inner, names = _SETS[data_set][1], []
  for members in _lists(data_set).values():
    names += members
  return {f"{inner}{name}": png(pixels(i)) for i, name in enumerate(names)}


def _json(lists):
  return {f"{split}.json": json.dumps(m).encode() for split, m in lists.items()}


def _write(folder, data_set="cub", **changed):
  """Writes a data set's folder; `changed` replaces lists."""
  content = {**_images(data_set), **_json({**_lists(data_set), **changed})}
  return fixtures.write_folder(folder, content)


def _load(root, task="fgvc_cub", **changes):
  return load_data(task, data_config(root=str(root), **changes), 8)


def _numbers(split):
  return [number_of(image) for image in split.images]


def _check(data, data_set):
  expected = _numbers_of(data_set)
  assert list(data.splits) == ["train", "val", "train_val", "test"]
  for split, (numbers, labels) in expected.items():
    assert _numbers(data.splits[split]) == numbers
    assert data.splits[split].labels.tolist() == labels


def _fails(root, error, *parts, **changes):
  """Checks that loading fails with one line that has all these parts, in order."""
  with pytest.raises(error) as caught:
    _load(root, **changes)
  (message,) = caught.value.args
  assert "\n" not in message
  assert re.search(".*".join(map(re.escape, parts)), message), message


@pytest.mark.parametrize("data_set", _SETS)
@pytest.mark.parametrize("inside", [True, False])
def test_each_data_set_is_read_as_listed(tmp_path, data_set, inside):
  folder = _SETS[data_set][0]
  _write(tmp_path / folder, data_set)
  root = tmp_path / folder if inside else tmp_path
  data = _load(root, f"fgvc_{data_set}")
  _check(data, data_set)
  assert data.final_split == "train"  # as VPT has it
  assert data.source == f"images of {root}"


def test_classes_that_val_lacks_do_not_shift_its_labels(tmp_path):
  data = _load(_write(tmp_path, "nabirds"), "fgvc_nabirds")
  assert data.splits["val"].labels.tolist() == [0, 2, 4]
  assert data.splits["test"].labels.tolist() == 2 * [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
  "data_set,names",
  [
    ("cub", [f"{i}.Bird_{i}" for i in ("001", "002", "010", "100", "200")]),
    ("nabirds", ["0295", "0299", "0313", "0975", "1010"]),
    ("stanford_dogs", [f"n{i:04d}-Dog" for i in (1, 2, 3, 10, 20)]),
    ("oxford_flowers", [f"class {i}" for i in range(5)]),
    ("stanford_cars", [f"class {i}" for i in range(5)]),
  ],
)
def test_class_names_are_the_folders_where_each_class_has_one(
  tmp_path, data_set, names
):
  data = _load(_write(tmp_path, data_set), f"fgvc_{data_set}")
  assert list(data.class_names) == names


@pytest.mark.parametrize("task,subset", [("fgvc_cub", "drawn"), ("hta_cub", "")])
def test_val_is_drawn_from_both_lists_class_by_class(tmp_path, task, subset):
  root = _write(tmp_path)
  data = _load(root, task, subset=subset)
  listed = _numbers_of("cub")
  train, val = _numbers(data.splits["train"]), _numbers(data.splits["val"])
  assert sorted(train + val) == sorted(listed["train_val"][0])
  assert sorted(data.splits["val"].labels.tolist()) == list(range(_CLASSES))
  assert _numbers(data.splits["train_val"]) == train + val
  assert _numbers(data.splits["test"]) == listed["test"][0]
  label_of = dict(zip(*listed["train_val"], strict=True))
  assert data.splits["train"].labels.tolist() == [label_of[i] for i in train]
  assert data.final_split == ("train" if task == "fgvc_cub" else "train_val")
  again = _load(root, task, subset=subset)
  assert _numbers(again.splits["val"]) == val
  others = [
    _numbers(_load(root, task, subset=subset, split_seed=seed).splits["val"])
    for seed in (1, 2)
  ]
  assert others[0] != val or others[1] != val


@pytest.mark.parametrize("task", [name for name in _TASKS if name.startswith("hta_")])
def test_insvps_release_trains_on_the_listed_train_alone(tmp_path, task):
  data_set = task.removeprefix("hta_")
  data = _load(_write(tmp_path, data_set), task, subset="insvp_release")
  _check(data, data_set)
  assert data.final_split == "train"


def test_an_unknown_subset_lists_the_known_ones(tmp_path):
  _fails(
    _write(tmp_path),
    ValueError,
    "'train90'",
    "fgvc_cub has vpt, drawn",
    subset=("train90"),
  )


@pytest.mark.parametrize("wrap", ["", "CUB_200_2011/"])
@pytest.mark.parametrize("archive", [False, True])
def test_lists_may_lie_elsewhere(tmp_path, wrap, archive):
  lists = fixtures.write_folder(tmp_path / "lists", _json(_lists("cub")))
  content = {f"{wrap}{name}": data for name, data in _images("cub").items()}
  write = fixtures.write_zip if archive else fixtures.write_folder
  root = write(tmp_path / ("x.zip" if archive else "x"), content)
  _check(_load(root, lists=str(lists)), "cub")


def test_lists_elsewhere_have_precedence(tmp_path):
  root = _write(tmp_path / "set")
  lists = _lists("cub")
  lists["val"] = dict(list(lists["val"].items())[:2])
  fixtures.write_folder(tmp_path / "lists", _json(lists))
  data = _load(root, lists=str(tmp_path / "lists"))
  assert len(data.splits["val"]) == 2


def test_an_archive_without_lists_elsewhere_is_explained(tmp_path):
  content = {**_images("cub"), **_json(_lists("cub"))}
  root = fixtures.write_zip(tmp_path / "cub.zip", content)
  _fails(root, FileNotFoundError, str(root), "point config.data.lists", "val.json")


def test_missing_lists_are_named(tmp_path):
  root = _write(tmp_path / "CUB_200_2011")
  (root / "val.json").unlink()
  _fails(tmp_path, FileNotFoundError, f"no file {root}/val.json", "{image: class id}")
  (root / "train.json").unlink()
  _fails(tmp_path, FileNotFoundError, f"no file {root}/train.json")
  nowhere = tmp_path / "nowhere"
  _fails(root, FileNotFoundError, f"no file {nowhere}/train.json", lists=str(nowhere))


def test_missing_images_are_counted_and_the_first_named(tmp_path):
  root = _write(tmp_path)
  first = next(iter(_lists("cub")["train"]))
  (root / "images" / first).unlink()
  parts = (f"{root}/train.json names 1 files", f"{root}/images/{first}", "unpack")
  _fails(root, FileNotFoundError, *parts)
  (root / "images").rename(root / "pictures")
  parts = (f"{root}/train.json names 45 files", f"{root}/{first}", "unpack the images")
  _fails(root, FileNotFoundError, *parts)


@pytest.mark.parametrize(
  "content,message",
  [
    (b"{'a.jpg': 1}", "is no JSON"),
    (b"", "is no JSON"),
    (b"\xff\xfe{", "is no JSON"),
    (b"{}", "holds no {image: class id}"),
    (b'["a.jpg"]', "holds no {image: class id}"),
    (
      b'{"a.jpg": "001", "b.jpg": "001", "a.jpg": "002"}',
      "holds 'a.jpg' more than once",
    ),
  ],
)
def test_a_malformed_list_is_named(tmp_path, content, message):
  root = _write(tmp_path)
  (root / "val.json").write_bytes(content)
  _fails(root, ValueError, f"{root}/val.json {message}")


@pytest.mark.parametrize("first,second", [("train", "val"), ("val", "test")])
def test_an_image_in_two_splits_is_named(tmp_path, first, second):
  lists = _lists("cub")
  name, value = next(iter(lists[first].items()))
  lists[second][name] = value
  root = _write(tmp_path, **lists)
  _fails(
    root, ValueError, f"{second}.json", f"{first}.json both hold {name!r}", "one split"
  )


def test_class_ids_that_train_lacks_are_named(tmp_path):
  lists = _lists("cub")
  name = next(iter(lists["test"]))
  lists["test"][name] = "003"
  root = _write(tmp_path, **lists)
  _fails(root, ValueError, f"test.json in {root}", repr(name), "'003'", "train.json")
  # A number is not the text that writes it.
  lists["test"][name] = 1
  _fails(
    _write(tmp_path, **lists), ValueError, "test.json", "class id 1,", "train.json"
  )


def test_mixed_kinds_of_class_ids_are_refused(tmp_path):
  lists = _lists("cub")
  lists["train"] = {
    name: value if i else 1 for i, (name, value) in enumerate(lists["train"].items())
  }
  _fails(_write(tmp_path, **lists), ValueError, "train.json", "mixes kinds", "as text")


def test_another_number_of_classes_is_refused(tmp_path):
  lists = _lists("cub")
  lists["train"] = {n: value for n, value in lists["train"].items() if value != "010"}
  root = _write(tmp_path, **lists)
  _fails(root, ValueError, "train.json", "has 4 classes, expected 5", "anew")


def test_an_image_that_does_not_decode_is_named(tmp_path):
  root = _write(tmp_path)
  name = list(_lists("cub")["test"])[3]
  (root / "images" / name).write_bytes(b"")
  _fails(root, ValueError, f"{root}/images/{name} is empty", "Copy the file anew")


def test_large_splits_are_streamed_with_the_same_order(tmp_path):
  root = _write(tmp_path)
  data = _load(root, subset="drawn", resident_mb=0)
  small = _load(root, subset="drawn")
  assert "train 45 (streamed)" in data.summary()
  for name, split in data.splits.items():
    (images,) = split.read([np.arange(len(split))])
    assert [number_of(image) for image in images] == _numbers(small.splits[name])
    np.testing.assert_array_equal(split.labels, small.splits[name].labels)
