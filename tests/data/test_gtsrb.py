"""GTSRB as torchvision unpacks it."""

import random
import re
import zipfile

import data_fixtures as fixtures
from data_fixtures import data_config, encode, number_of, pixels
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import load_data

_CLASSES, _PER_CLASS, _TEST = 43, 10, 7
_CSV = "GT-final_test.csv"
_HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"


def _ppm(number):
  return encode(Image.fromarray(pixels(number)), "PPM")


def _csv(labels, ending="\n"):
  rows = [f"{i:05d}.ppm;53;54;6;5;48;49;{label}" for i, label in enumerate(labels)]
  return ending.join([_HEAD, *rows, ""]).encode()


def _content():
  """Returns the files; those of training show 0, 1, ... in the order of names."""
  content, number = {}, 0
  for label in range(_CLASSES):
    folder = f"GTSRB/Training/{label:05d}"
    content[f"{folder}/GT-{label:05d}.csv"] = b"Filename;Width"
    for i in range(_PER_CLASS):
      content[f"{folder}/{i // 3:05d}_{i % 3:05d}.ppm"] = _ppm(number)
      number += 1
  for i in range(_TEST):
    content[f"GTSRB/Final_Test/Images/{i:05d}.ppm"] = _ppm(1000 + i)
  content["GTSRB/Final_Test/Images/GT-final_test.test.csv"] = b"Filename;Width"
  content[_CSV] = _csv([16, 1, 38, 33, 11, 42, 0])
  return content


_FILES = _content()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return fixtures.write_folder(tmp_path_factory.mktemp("set"), _FILES)


def _small(**changed):
  """Returns the files with training images of three classes; None drops one."""
  kept = re.compile(r"GTSRB/(?!Training)|GTSRB/Training/000(00|05|42)/|GT-")
  content = {name: data for name, data in _FILES.items() if kept.match(name)}
  content.update(changed)
  return {name: data for name, data in content.items() if data is not None}


def _load(root, **changes):
  return load_data("hta_gtsrb", data_config(root=str(root), **changes), 8)


def _numbers(split):
  return [number_of(image) for image in split.images]


def _fails(root, error, *parts, **changes):
  """Checks that loading fails with one line that has all these parts, in order."""
  with pytest.raises(error) as caught:
    _load(root, **changes)
  (message,) = caught.value.args
  assert "\n" not in message
  assert re.search(".*".join(map(re.escape, parts)), message), message


def test_a_tenth_of_each_class_is_val(root):
  data = _load(root)
  assert data.num_classes == _CLASSES
  assert data.class_names[0] == "00000" and data.class_names[42] == "00042"
  train, val = data.splits["train"], data.splits["val"]
  assert sorted(_numbers(train) + _numbers(val)) == list(range(430))
  assert sorted(val.labels.tolist()) == list(range(_CLASSES))
  for split in (train, val):
    assert [i // _PER_CLASS for i in _numbers(split)] == split.labels.tolist()
  assert _numbers(data.splits["train_val"]) == _numbers(train) + _numbers(val)
  assert data.final_split == "train_val"
  assert _numbers(_load(root).splits["val"]) == _numbers(val)
  assert _numbers(_load(root, split_seed=1).splits["val"]) != _numbers(val)


def test_test_labels_come_from_the_csv(root):
  test = _load(root).splits["test"]
  assert _numbers(test) == list(range(1000, 1007))
  assert test.labels.tolist() == [16, 1, 38, 33, 11, 42, 0]


def test_insvps_release_shuffles_the_sorted_files(root):
  data = _load(root, subset="insvp_release")
  order = list(range(430))
  random.Random(3407).shuffle(order)
  assert _numbers(data.splits["train"]) == order[:344]
  assert _numbers(data.splits["val"]) == order[344:]
  assert data.final_split == "train"


@pytest.mark.parametrize("wrap", ["", "gtsrb/"])
@pytest.mark.parametrize("archive", [False, True])
def test_the_folder_around_it_and_archives(tmp_path, wrap, archive):
  content = {f"{wrap}{name}": data for name, data in _small().items()}
  write = fixtures.write_zip if archive else fixtures.write_folder
  data = _load(write(tmp_path / "a.zip" if archive else tmp_path / "a", content))
  assert data.splits["train_val"].labels[:-3].tolist() == 9 * [0] + 9 * [5] + 9 * [42]
  assert _numbers(data.splits["test"]) == list(range(1000, 1007))


def test_sizes_that_are_not_the_published_ones_are_warned_of(root, caplog):
  _load(root)
  assert "hta_gtsrb: the train split has 387 images, published are 23976" in caplog.text
  assert "hta_gtsrb: the test split has 7 images, published are 12630" in caplog.text


def test_windows_line_ends_and_marks(tmp_path):
  content = _small(**{_CSV: b"\xef\xbb\xbf" + _csv(range(7), "\r\n")})
  data = _load(fixtures.write_folder(tmp_path, content))
  assert data.splits["test"].labels.tolist() == list(range(7))


def test_another_layout_is_explained(tmp_path):
  root = fixtures.write_folder(tmp_path, _small(**{_CSV: None}))
  _fails(root, FileNotFoundError, f"root: {root} is not GTSRB", _CSV, "GTSRB/Training/")
  (root / _CSV).write_bytes(_FILES[_CSV])
  (root / "GTSRB" / "Training").rename(root / "GTSRB" / "Train")
  _fails(root, FileNotFoundError, f"{root}/GTSRB/Training", "no images", "<class>")


@pytest.mark.parametrize("name", ["43/1.ppm", "00043/1.ppm", "stop/1.ppm", "1.ppm"])
def test_other_class_folders_are_named(tmp_path, name):
  content = _small(**{f"GTSRB/Training/{name}": _ppm(0)})
  root = fixtures.write_folder(tmp_path, content)
  odd = repr(name.split("/")[0])
  _fails(root, ValueError, f"{root}/GTSRB/Training", f"holds {odd}", "00000 to 00042")


@pytest.mark.parametrize(
  "content,message",
  [
    (b"", "names no image"),
    (f"{_HEAD}\n".encode(), "names no image"),
    (b"Filename,ClassId\n00000.ppm,3\n", "expected columns Filename and ClassId"),
    (b"Filename;ClassId\n00000.ppm;43\n", "ClassId (0 to 42) between semicolons"),
    (b"Filename;ClassId\n00000.ppm;-1\n", "ClassId (0 to 42) between semicolons"),
    (b"Filename;ClassId\n00000.ppm;\n", "ClassId (0 to 42) between semicolons"),
    (b"Filename;ClassId\n00000.ppm\n", "ClassId (0 to 42) between semicolons"),
    (b"Filename;ClassId\n00000.ppm;1\n00000.ppm;1\n", "names 00000.ppm more than once"),
    (b"Filename;ClassId\n\xff;1\n", "is no text"),
    (b"Filename;ClassId\n00000.ppm;1\nx\n7.ppm;2\n", "expected columns Filename"),
  ],
)
def test_a_malformed_list_of_test_labels_is_named(tmp_path, content, message):
  root = fixtures.write_folder(tmp_path, _small(**{_CSV: content}))
  _fails(root, ValueError, f"{root}/{_CSV}", message)


def test_missing_test_images_are_counted_and_the_first_named(tmp_path):
  drop = {f"GTSRB/Final_Test/Images/0000{i}.ppm": None for i in (2, 5)}
  for root in (
    fixtures.write_folder(tmp_path / "f", _small(**drop)),
    fixtures.write_zip(tmp_path / "f.zip", _small(**drop)),
  ):
    parts = (f"{root}/{_CSV} names 2 files", "Final_Test/Images/00002.ppm", "unpack")
    _fails(root, FileNotFoundError, *parts)


def test_an_image_that_does_not_decode_is_named(tmp_path):
  name = "GTSRB/Training/00005/00000_00000.ppm"
  root = fixtures.write_folder(tmp_path, _small(**{name: _FILES[name][:40]}))
  _fails(root, ValueError, f"{root}/{name} does not decode", "Copy the file anew")


def test_real_signs(shared_dir, tmp_path):
  # The numbers of classes are this copy's; the decoder sees real files.
  with zipfile.ZipFile(shared_dir / "data" / "gtsrb.zip") as archive:
    names = [n for n in archive.namelist() if not n.endswith("/")][::40][:12]
    images = [archive.read(name) for name in names]
  content = {f"GTSRB/Training/{i:05d}/a.png": data for i, data in enumerate(images)}
  content.update({f"GTSRB/Final_Test/Images/{i}.png": d for i, d in enumerate(images)})
  rows = "".join(f"{i}.png;{i}\n" for i in range(len(images)))
  content[_CSV] = f"Filename;ClassId\n{rows}".encode()
  data = _load(fixtures.write_folder(tmp_path, content), preset="insvp_release")
  assert data.splits["test"].images.std() > 20
  assert data.splits["test"].images.shape == (12, 9, 9, 3)
  np.testing.assert_array_equal(data.splits["test"].labels, np.arange(12))
