"""VTAB-1k from folders of images with train800.txt, val200.txt, test.txt."""

import re

import data_fixtures as fixtures
from data_fixtures import data_config, number_of, pixels, png
import numpy as np
import pytest

from insvp_jax.data import load_data
from insvp_jax.data.tasks import TASKS

_TRAIN, _VAL, _TEST = range(6), range(6, 9), range(9, 17)
_ALL = "train800val200.txt"


def _lines(numbers, ending="\n", prefix="images/"):
  return "".join(f"{prefix}{i:03d}.png {i % 3}{ending}" for i in numbers).encode()


def _content(**lines):
  """Returns the files of a small task: image i has the label i % 3."""
  content = {f"images/{i:03d}.png": png(pixels(i)) for i in range(17)}
  content["train800.txt"] = _lines(_TRAIN)
  content["val200.txt"] = _lines(_VAL)
  content[_ALL] = _lines([*_TRAIN, *_VAL])
  content["test.txt"] = _lines(_TEST)
  return content


def _below(folder, content):
  return {f"{folder}/{name}": data for name, data in content.items()}


def _load(root, task="svhn", **changes):
  return load_data(task, data_config(root=str(root), **changes), 8)


def _numbers(split):
  return [number_of(image) for image in split.images]


def _check(data):
  expected = {"train": _TRAIN, "val": _VAL, "train_val": range(9), "test": _TEST}
  assert list(data.splits) == list(expected)
  for name, numbers in expected.items():
    assert _numbers(data.splits[name]) == list(numbers)
    assert data.splits[name].labels.tolist() == [i % 3 for i in numbers]


def _fails(root, error, *parts, **changes):
  """Checks that loading fails with one line that has all these parts, in order."""
  with pytest.raises(error) as caught:
    _load(root, **changes)
  (message,) = caught.value.args
  assert "\n" not in message
  assert re.search(".*".join(map(re.escape, parts)), message), message


def test_the_lists_define_splits_and_labels(tmp_path):
  data = _load(fixtures.write_folder(tmp_path, _content()))
  _check(data)
  assert data.name == "svhn" and data.num_classes == 10
  assert data.class_names == tuple(f"class {i}" for i in range(10))
  assert data.final_split == "train_val"
  assert data.source == f"images of {tmp_path}"


@pytest.mark.parametrize(
  "task", sorted(name for name, task in TASKS.items() if task.benchmark == "vtab")
)
def test_each_task_is_found_in_a_collection_by_noahs_name(tmp_path, task):
  noahs = {
    "cifar100": "cifar",
    "clevr_distance": "clevr_dist",
    "kitti_distance": "kitti",
    "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
  }
  content = _content()
  if task == "patch_camelyon":  # it has two classes
    for name in content.keys() & {"train800.txt", "val200.txt", _ALL, "test.txt"}:
      content[name] = content[name].replace(b" 2\n", b" 1\n")
  for folder in {noahs.get(task, task), task}:
    root = fixtures.write_folder(tmp_path / folder, _below(folder, content))
    data = _load(root, task)
    assert _numbers(data.splits["train_val"]) == list(range(9))
    assert data.num_classes == TASKS[task].num_classes


def test_structured_tasks_have_their_rules_class_names(tmp_path):
  data = _load(fixtures.write_folder(tmp_path, _content()), "kitti_distance")
  assert data.class_names[3] == "no vehicle"


@pytest.mark.parametrize("wrap", ["", "svhn", "vtab/svhn", "vtab"])
def test_an_archive_equals_the_folder(tmp_path, wrap):
  content = _below(wrap, _content()) if wrap else _content()
  noise = {"__MACOSX/svhn/._test.txt": b"x"}
  data = _load(fixtures.write_zip(tmp_path / "vtab.zip", {**noise, **content}))
  _check(data)


def test_other_ways_to_write_the_lists(tmp_path):
  content = _content()
  content["train800.txt"] = b"\n" + _lines(_TRAIN, "\r\n\r\n", "./images/")
  content["val200.txt"] = b"\xef\xbb\xbf" + _lines(_VAL, "  \n").strip()
  _check(_load(fixtures.write_folder(tmp_path, content)))


def test_names_may_hold_blanks(tmp_path):
  content = _content()
  for name in ("train800.txt", "val200.txt", _ALL, "test.txt"):
    content[name] = content[name].replace(b"images/", b"my images/")
  for i in range(17):
    content[f"my images/{i:03d}.png"] = content.pop(f"images/{i:03d}.png")
  _check(_load(fixtures.write_folder(tmp_path, content)))


@pytest.mark.parametrize("resident_mb", [0, 1024])
def test_train_val_is_train_then_val_whatever_its_own_list_says(tmp_path, resident_mb):
  content = {**_content(), _ALL: _lines([*_VAL, *reversed(_TRAIN)])}
  root = fixtures.write_folder(tmp_path, content)
  data = _load(root, resident_mb=resident_mb)
  assert data.splits["train_val"].labels.tolist() == [i % 3 for i in range(9)]


def test_sizes_that_are_not_the_published_ones_are_warned_of(tmp_path, caplog):
  _load(fixtures.write_folder(tmp_path, _content()))
  for line in (
    "svhn: the train split has 6 images, published are 800",
    "svhn: the val split has 3 images, published are 200",
    "svhn: the test split has 8 images, published are 26032",
  ):
    assert line in caplog.text


@pytest.mark.parametrize("file", ["train800.txt", "val200.txt", _ALL])
def test_a_missing_list_is_named(tmp_path, file):
  content = _content()
  del content[file]
  root = fixtures.write_folder(tmp_path / "svhn", content)
  _fails(root, FileNotFoundError, f"no index file {root}/{file}", "copy")
  path = fixtures.write_zip(tmp_path / "x.zip", content)
  _fails(path, FileNotFoundError, f"no index file {path}/{file}", "copy")


def test_a_folder_without_lists_is_explained(tmp_path):
  root = fixtures.write_folder(tmp_path, {"images/0.png": b""})
  parts = (str(root), "test.txt", "a folder cifar", "train800.txt", "data.root empty")
  _fails(root, FileNotFoundError, *parts, task="cifar100")
  _fails(root / "nowhere", FileNotFoundError, "config.data.root", "nowhere")


def test_missing_images_are_counted_and_the_first_named(tmp_path):
  content = _content()
  for i in (11, 13, 14):
    del content[f"images/{i:03d}.png"]
  content["images/014.png"] = None  # a folder of that name is no image
  for root in (
    fixtures.write_folder(tmp_path / "f", content),
    fixtures.write_zip(tmp_path / "f.zip", content),
  ):
    parts = (f"{root}/test.txt names 3 files", f"{root}/images/011.png", "unpack")
    _fails(root, FileNotFoundError, *parts)


@pytest.mark.parametrize(
  "line",
  [
    b"images/000.png",
    b"3",
    b"images/000.png\t3",
    b"images/000.png three",
    b"images/000.png 3.0",
    b"images/000.png -1",
    b"images/000.png 10",
    b"images/000.png 99999999999999999999",
    "images/000.png ²".encode(),
  ],
)
def test_a_line_without_path_or_known_label_is_named(tmp_path, line):
  content = _content()
  content["val200.txt"] += b"\n" + line + b"\n"
  root = fixtures.write_folder(tmp_path, content)
  where, shown = f"line 5 of {root}/val200.txt", repr(line.decode())
  _fails(root, ValueError, where, shown, "label, 0 to 9", "mend")


def test_an_image_listed_twice_is_named(tmp_path):
  content = _content()
  content["train800.txt"] += b"./images//002.png 2\n"
  root = fixtures.write_folder(tmp_path, content)
  parts = (f"line 7 of {root}/train800.txt", "images/002.png again", "one of its lines")
  _fails(root, ValueError, *parts)


@pytest.mark.parametrize("first,second", [("train800", "val200"), (_ALL[:-4], "test")])
def test_an_image_in_two_splits_is_named(tmp_path, first, second):
  content = _content()
  content[f"{second}.txt"] += _lines([4])
  root = fixtures.write_folder(tmp_path, content)
  parts = (f"{first}.txt", f"{second}.txt share 1 images", "images/004.png", "anew")
  _fails(root, ValueError, *parts)


@pytest.mark.parametrize("change", ["less", "more", "label"])
def test_a_train_val_that_is_not_train_and_val_is_named(tmp_path, change):
  content = _content()
  numbers = {"less": range(8), "more": [*range(9), 20], "label": range(9)}[change]
  content[_ALL] = _lines(numbers)
  if change == "label":
    content[_ALL] = content[_ALL].replace(b"008.png 2", b"008.png 1")
  wanted = "images/020.png" if change == "more" else "images/008.png"
  root = fixtures.write_folder(tmp_path, content)
  _fails(root, ValueError, f"{root}/{_ALL} is not train800.txt", wanted, "anew")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_list_is_named(tmp_path, content):
  root = fixtures.write_folder(tmp_path, {**_content(), "val200.txt": content})
  _fails(root, ValueError, f"{root}/val200.txt names no image", "anew")


def test_a_list_that_is_no_text_is_named(tmp_path):
  root = fixtures.write_folder(tmp_path, {**_content(), "test.txt": b"\xff\xfe0"})
  _fails(root, ValueError, f"{root}/test.txt is no text", "anew")


@pytest.mark.parametrize("archive", [False, True])
def test_an_image_that_does_not_decode_is_named_and_nothing_cached(tmp_path, archive):
  noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  content = {**_content(), "images/012.png": png(noise)[:120]}
  root, cache_dir = tmp_path / "set", tmp_path / "cache"
  if archive:
    root = fixtures.write_zip(tmp_path / "set.zip", content)
  else:
    fixtures.write_folder(root, content)
  parts = (f"{root}/images/012.png does not decode", "Copy the file anew.")
  _fails(root, ValueError, *parts, cache_dir=str(cache_dir))
  kept = [np.load(path)["images"] for path in cache_dir.iterdir()]
  assert sorted(map(len, kept)) == [3, 6]  # train and val, which were whole
  if not archive:
    (root / "images/012.png").write_bytes(png(pixels(12)))
    _check(_load(root, cache_dir=str(cache_dir)))


def test_the_second_run_reads_no_image(tmp_path):
  root = fixtures.write_zip(tmp_path / "a.zip", _content())
  _check(_load(root, cache_dir=str(tmp_path / "cache")))
  # What tells of a change stays, the images' content goes.
  raw = root.read_bytes()
  for i in range(17):
    name = f"images/{i:03d}.png".encode()
    start = raw.index(name) + len(name)
    raw = raw[:start] + bytes(20) + raw[start + 20 :]
  root.write_bytes(raw)
  _fails(root, ValueError, "images/000.png is damaged")
  _check(_load(root, cache_dir=str(tmp_path / "cache")))


def test_the_digest_says_which_images_not_where_they_are(tmp_path):
  content = _content()
  roots = [
    fixtures.write_folder(tmp_path / "own", content),
    fixtures.write_folder(tmp_path / "all", _below("svhn", content)),
    fixtures.write_zip(tmp_path / "x.zip", content),
  ]
  other = {**content, "images/003.png": png(np.zeros((9, 9, 3), np.uint8))}
  roots.append(fixtures.write_folder(tmp_path / "other", other))
  for resident_mb in (0, 1024):
    digests = [
      _load(root, resident_mb=resident_mb).digest(["train", "test"]) for root in roots
    ]
    assert digests[0] == digests[1] == digests[2] != digests[3]
